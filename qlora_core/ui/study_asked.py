"""What is asked for on the Compare tab, as it was typed -> a plan; and a plan in words, with the equal command line."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.data.rows import counted
from qlora_core.errors import ConfigError
from qlora_core.hub import acting_token
from qlora_core.planner.facts import Facts
from qlora_core.planner.studying import Pace, fit_sentence
from qlora_core.settings import Settings
from qlora_core.study import GRID, Study
from qlora_core.study_grid import KINDS, grid_problems, sentence
from qlora_core.study_plan import StudyPlan, Wanted, plan, values_of, vary_option
from qlora_core.ui.form import command_line
from qlora_core.ui.train_tab import what_stops
from qlora_core.ui.words import duration, esc, problems_panel, size

LADDER, ANYTHING = "rank-ladder", GRID
# Runs in the list of a plan, and those named where they do not fit.
LISTED, NAMED = 12, 3
PLAN_CSS = """
.plan { min-height: 118px; border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px;
  background: var(--block-background-fill); font-size: .9rem; }
.plan p { margin: 0 0 2px; } .plan p, .plan li { overflow-wrap: anywhere; } .plan p.over { color: var(--failed); }
.plan summary { cursor: pointer; color: var(--muted); margin-top: 4px; }
.plan ul { margin: 4px 0 0; padding-left: 18px; }
.plan pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; background: none; }
.plan .estimate { border-left: 3px dotted var(--muted); padding-left: 9px; margin: 4px 0; }
.plan .estimate i { float: right; font-style: normal; font-size: .8rem; color: var(--muted); margin-left: 10px; }
.plan.waits { color: var(--muted); }
"""


@dataclass(frozen=True)
class Asked:
    """What a person asks for, as it was typed; what is left empty is as the kind has it."""

    kind: str
    methods: Sequence[str] | None = None
    ranks: str = ""
    seeds: str = ""
    noise_floor: bool | None = None
    vary: str = ""
    name: str = ""

    def wanted(self) -> Wanted:
        """Raises ConfigError with all that is wrong."""
        problems: list[str] = []
        vary = dict(KINDS[self.kind].vary) if self.kind in KINDS else {}
        if "method" in vary and self.methods is not None:
            vary["method"] = list(self.methods)
            problems += [] if self.methods else ["Methods: none is chosen; choose LoRA, QLoRA or both"]
        if "rank" in vary and self.ranks.strip():
            vary["rank"] = _whole_numbers("Ranks", self.ranks, problems)
        seeds = _whole_numbers("Seeds", self.seeds, problems)
        vary |= _settings("Vary also", self.vary, problems)
        problems += grid_problems({name: values for name, values in vary.items() if values}, seeds)
        if problems:
            raise ConfigError(*problems)
        return Wanted(self.kind, vary, seeds, self.noise_floor, self.name)

    def problems(self) -> tuple[str, ...]:
        """All that is wrong with what was typed."""
        try:
            self.wanted()
        except ConfigError as error:
            return error.problems
        return ()


def plan_of_form(wanted: Wanted, config: TrainConfig, facts: Facts, paces: Sequence[Pace]) -> StudyPlan:
    """As `plan`, named for what is compared, and with what stops a single run. Raises ConfigError with all that is wrong."""
    if problems := what_stops(facts):
        raise ConfigError(*problems)
    return plan(replace(wanted, name=wanted.name.strip() or default_name(wanted.kind, config)), config, facts, paces)


def start_study(found: StudyPlan, settings: Settings, *, skip: bool) -> Study:
    """The study of this plan, queued; while such a one is under way, that one. Raises LabError."""
    found.check_fits(skip=skip, way_out="the runs that do not fit")
    study = found.create(settings, token=acting_token())
    study.start()
    return study


def default_name(kind: str, config: TrainConfig) -> str:
    """Of what is compared and the rows: the form's name is that of a single run."""
    return f"{KINDS[kind].title if kind in KINDS else 'Study'}, {Path(config.data).stem.replace('_', ' ')}"


def _whole_numbers(what: str, text: str, problems: list[str]) -> list[int]:
    """What is wrong joins the problems, so that all are told at once."""
    parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal()]:
        problems.append(f"{what}: {', '.join(wrong)} is no whole number; write them with commas between: 2, 4, 8")
    return [int(part) for part in parts if part.isdecimal()]


def _settings(what: str, text: str, problems: list[str]) -> dict[str, list[Any]]:
    """ "rank = 4, 8" a line; in one value, + joins several names. What is wrong joins the problems."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, values = line.partition("=")
        name = name.strip().lower().replace(" ", "_").replace("-", "_")
        if not equals or not values.strip(" ,"):
            remedy = "write a setting and its values: learning_rate = 1e-4, 2e-4"
            problems.append(f"{what}: {line!r} has no values; {remedy}")
            continue
        try:
            found[name] = values_of(name, values)
        except ConfigError as error:
            problems += [f"{what}: {problem}" for problem in error.problems]
    return found


# -- in words


def plan_html(found: StudyPlan) -> str:
    """Number of runs, memory, time; folded, each run and the equal command."""
    unfitting, seconds = _unfitting(found), found.estimate.seconds
    time = (
        f"{_about(duration(seconds))} in all, the analysis at the end not counted"
        if seconds
        else "How long it takes is known once a run of each method was measured here"
    )
    lines = [(unfitting or fit_sentence(found.estimate), "over" if unfitting else ""), (time, "")]
    told = "".join(f'<p class="{tone}">{esc(text[:1].upper() + text[1:])}.</p>' for text, tone in lines)
    notes = "".join(f'<p class="lab-hint">{esc(note[:1].upper() + note[1:])}.</p>' for note in found.notes)
    return (
        f'<div class="plan"><p><b>{esc(sentence(found.cells))}.</b></p>{notes}<div class="estimate"><i>estimate</i>{told}</div>'
        f"{_runs(found)}<details><summary>The same on the command line</summary><pre>{esc(command(found))}</pre></details></div>"
    )


def _unfitting(found: StudyPlan) -> str:
    """How many runs and which; what each needs stands in the list of runs. Empty where all fit."""
    names = [one.cell.label for one in found.estimate.cells if not one.fits]
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"{len(names)} of {counted(len(found.cells), 'run')} would not fit the {size(found.estimate.usable_bytes)} that may be "
        f"used: {'; '.join(names[:NAMED])}{more}"
    )


def _about(words: str) -> str:
    return words if words.startswith("less") else f"about {words}"


def _runs(found: StudyPlan) -> str:
    several = len({cell.seed for cell in found.cells if cell.role == "arm"}) > 1
    items = []
    for one in found.estimate.cells[:LISTED]:
        needed = f", {size(one.plan.estimate.needed_bytes)}" if one.plan else ""
        seed = f", seed {one.cell.seed}" if several else ""
        items.append(f"<li>{esc(one.cell.label)}{seed}{needed}{'' if one.fits else ' <b>does not fit</b>'}</li>")
    more = len(found.estimate.cells) - LISTED
    items += [f"<li>{more} more</li>"] if more > 0 else []
    return f"<details><summary>Its runs</summary><ul>{''.join(items)}</ul></details>"


def waiting_html(text: str) -> str:
    return f'<div class="plan waits" role="status">{esc(text)}</div>'


def refused_html(problems: Sequence[str]) -> str:
    return f'<div class="plan">{problems_panel(problems, title="Not possible yet")}</div>'


def command(found: StudyPlan) -> str:
    """What makes the same study in a shell."""
    words = [f"--kind {found.kind}"] if found.kind in KINDS else []
    words += [f"--vary {shlex.quote(vary_option(name, values))}" for name, values in found.said.items()]
    words += [f"--seeds {','.join(map(str, found.seeds))}"] if found.seeds else []
    if found.noise_floor != bool(found.kind in KINDS and KINDS[found.kind].noise_floor):
        words.append("--noise-floor" if found.noise_floor else "--no-noise-floor")
    return command_line(replace(found.config, name=found.name), "compare", *words)
