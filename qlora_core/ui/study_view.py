"""Studies as HTML: the list, one of them with its runs, what a new one will be, verdicts, answers. Reads, computes nothing."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from qlora_core.config import TrainConfig
from qlora_core.errors import RunError
from qlora_core.planner.studying import StudyEstimate, fit_sentence
from qlora_core.run_status import ACTIVE, FINISHED, RUNNING
from qlora_core.settings import Settings
from qlora_core.studies import PICKED, StudyStore
from qlora_core.study_grid import KINDS, Cell, sentence
from qlora_core.study_results import StudyResults
from qlora_core.study_status import StudyStatus
from qlora_core.ui import run_view
from qlora_core.ui.words import clock, duration, empty, esc, loss, memory, seconds, short, size, state_chip
from qlora_core.verdicts import Verdict
from qlora_core.wording import METHOD_NAMES

INTRODUCTION = (
    '<p class="lab-hint">A study trains runs that differ in one thing, on the same rows in the same order, and says what it '
    "cost and what it saved. It takes the dataset and the settings of the Train tab.</p>"
)
NO_STUDIES = empty("No studies yet", "Choose LoRA vs QLoRA above: two runs, their noise floor, and a verdict.")
CHECKING = '<p class="lab-hint" role="status">Checking the dataset and making the runs …</p>'
WRITING = '<p class="lab-hint" role="status">Writing the report …</p>'
HOLDS = {"yes": "✓ yes", "no": "✕ no", "unclear": "? unclear"}
SHOWN_ROWS = 12
VERDICTS_CSS = """
.lab-verdicts { display: grid; gap: 10px; margin: 6px 0 4px; }
.lab-verdict { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--tone); border-radius: 10px;
  padding: 10px 14px; background: var(--block-background-fill); }
.lab-verdict.yes { --tone: var(--finished); } .lab-verdict.no { --tone: var(--failed); }
.lab-verdict.unclear { --tone: var(--muted); }
.lab-verdict h4 { margin: 0 0 2px; font-size: .88rem; color: var(--muted); font-weight: 600; }
.lab-verdict h4 span { color: var(--tone); margin-left: 8px; white-space: nowrap; }
.lab-verdict p { margin: 0; overflow-wrap: anywhere; }
.lab-verdict.first p.told { font-size: 1.18rem; line-height: 1.4; }
.lab-verdict p.rests { margin-top: 4px; font-size: .82rem; color: var(--muted); }
"""
PLAN_CSS = """
.lab-plan ul { margin: 6px 0 0; padding-left: 18px; columns: 2; font-size: .9rem; }
.lab-plan li { break-inside: avoid; } .lab-plan code { overflow-wrap: anywhere; }
@media (max-width: 700px) { .lab-plan ul { columns: 1; } }
"""
ANSWERS_CSS = """
.lab-answers { display: grid; gap: 16px; }
.lab-answers section { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px; }
.lab-answers h4 { margin: 0 0 4px; font-size: .82rem; color: var(--muted); font-weight: 600; }
.lab-answers .each { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 10px 16px;
  margin-top: 8px; padding-top: 8px; border-top: 1px solid var(--border-color-primary); }
.lab-answers pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; background: none; }
"""


# -- reading


def statuses(settings: Settings) -> list[StudyStatus]:
    """Of all studies, newest first; one is folded again only when something of its runs changed."""
    found = []
    signature = hash(tuple(run_view.statuses(settings)))
    for study in StudyStore(settings).list():
        try:
            found.append(_status(study, signature, (study.path / "study.json").stat().st_mtime_ns))
        except (OSError, RunError):  # deleted meanwhile, or unreadable: `studies list` says why
            continue
    return found


@lru_cache(maxsize=256)
def _status(study: Any, _signature: int, _written: int) -> StudyStatus:
    return study.status()


def drawn(status: StudyStatus) -> str:
    """Changes when the figures do: a run has been evaluated or has ended, or the analysis has."""
    runs = [(run.run_id, run.state, run.eval_loss) if run else None for _, run in status.runs]
    analysis = (
        (status.analysis.state, status.analysis.phase if status.analysis.state == RUNNING else "")
        if status.analysis
        else None
    )
    return str(hash((status.study_id, str(runs), analysis)))


# -- before it starts


def default_name(kind: str, config: TrainConfig) -> str:
    """Of what is compared and the rows: the form's name is that of a single run."""
    return f"{KINDS[kind].title if kind in KINDS else 'Study'}, {Path(config.data).stem.replace('_', ' ')}"


def plan_html(config: TrainConfig, how: dict[str, Any], made: Sequence[Cell], found: StudyEstimate) -> str:
    """What Start will do: the runs, what they need, how long they take, and the equal command."""
    items = "".join(f"<li>{esc(cell.cell.label)}{_seed(cell.cell, how)}{_needed(cell)}</li>" for cell in found.cells)
    time = (
        f"about {duration(found.seconds)}, the analysis not counted"
        if found.seconds
        else ("unknown until a run of each method was measured here")
    )
    fits = fit_sentence(found)
    tone = "lab-warn" if found.problems() else "lab-hint"
    return (
        f'<div class="lab-card lab-plan"><h3>{esc(how["name"])}</h3><p>{esc(sentence(made))}.</p>'
        f'<p class="{tone}">{esc(fits[:1].upper() + fits[1:])}. <em>Estimate.</em></p>'
        f'<p class="lab-hint">Time: {esc(time)}.</p><ul>{items}</ul>'
        f'<p class="lab-hint" style="margin-top:8px">On the command line: <code>{esc(command(config, how))}</code></p></div>'
    )


def _seed(cell: Cell, how: dict[str, Any]) -> str:
    return f", seed {cell.seed}" if len(how["seeds"]) > 1 else ""


def _needed(cell: Any) -> str:
    if cell.plan is None:
        return ""
    return f" · {size(cell.plan.estimate.needed_bytes)}" + ("" if cell.fits else " <b>does not fit</b>")


def command(config: TrainConfig, how: dict[str, Any]) -> str:
    """The same from the shell; settings come from the form's own YAML."""
    vary = " ".join(
        f"--vary {name}={','.join(_written(value) for value in values)}" for name, values in how["vary"].items()
    )
    seeds = f" --seeds {','.join(map(str, how['seeds']))}" if how["seeds"] else ""
    floor = " --noise-floor" if how["noise_floor"] else ""
    return f"python -m qlora_core compare --config settings.yaml {vary}{seeds}{floor}"


def _written(value: Any) -> str:
    return ("+".join(value) or "none") if isinstance(value, (list, tuple)) else str(value)


# -- the list, and one of them


def table_html(found: Sequence[StudyStatus], chosen: str) -> str:
    if not found:
        return NO_STUDIES
    rows = "".join(_row(status, status.study_id == chosen) for status in found)
    heads = (
        "".join(f"<th>{name}</th>" for name in ("name", "state", "kind"))
        + '<th class="num">runs done</th><th>when</th>'
    )
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(status: StudyStatus, is_chosen: bool) -> str:
    mark = ' class="chosen" aria-current="true"' if is_chosen else ""
    return (
        f'<tr data-run="{esc(status.study_id)}"{mark}><td><button type="button">{esc(status.name)}</button></td>'
        f"<td>{state_chip(status.state)}</td><td>{esc(kind_words(status.kind))}</td>"
        f'<td class="num" data-label="runs done">{status.done} of {status.total}</td><td>{clock(status.created_at)}</td></tr>'
    )


def kind_words(kind: str) -> str:
    return KINDS[kind].title if kind in KINDS else "picked runs" if kind == PICKED else "grid of settings"


def head_html(status: StudyStatus) -> str:
    """Big state, one sentence, and how far the whole study is."""
    longest = max((run.total_steps or 0 for _, run in status.runs if run), default=0)
    made = sum(run.step for _, run in status.runs if run)
    share = made / (longest * status.total) if longest else 0
    left = f" · about {duration(status.eta_seconds)} left" if status.eta_seconds else ""
    bar = (
        f'<div class="lab-bar" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="steps of all runs" style="--hue:var(--finished)"><i style="width:{100 * min(share, 1):.1f}%"></i></div>'
    )
    return (
        f'<div class="lab-card lab-head" data-state="{esc(status.state)}" data-study="{esc(status.study_id)}">'
        f'<div class="top">{state_chip(status.state)}<h3>{esc(status.name)}</h3>'
        f'<span class="lab-hint">{esc(kind_words(status.kind))}{left}</span></div>'
        f'<p class="detail">{esc(status.detail[:1].upper() + status.detail[1:])}.</p>{bar}</div>'
    )


def runs_html(status: StudyStatus) -> str:
    """Each run with its state and figures; its name leads to the Runs tab."""
    heads = "".join(f'<th class="num">{name}</th>' for name in ("evaluation loss", "peak memory", "step time"))
    rows = "".join(_run_row(label, run) for label, run in (*status.runs, ("analysis", status.analysis)))
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr><th>run</th><th>state</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _run_row(label: str, run: Any) -> str:
    if run is None:
        told = "not made yet" if label == "analysis" else "gone"
        return f"<tr><td>{esc(label)}</td><td>{esc(told)}</td>" + '<td class="num">–</td>' * 3 + "</tr>"
    figures = (
        ("evaluation loss", loss(run.eval_loss)),
        ("peak memory", memory(run)),
        ("step time", seconds(run.step_seconds)),
    )
    cells = "".join(f'<td class="num" data-label="{name}">{esc(value)}</td>' for name, value in figures)
    doing = f' <span class="lab-hint">{esc(run.detail)}</span>' if run.state not in (FINISHED,) else ""
    return (
        f'<tr data-run="{esc(run.run_id)}"><td><button type="button">{esc(label)}</button> '
        f'<span class="lab-id">{esc(short(run.run_id))}</span></td><td>{state_chip(run.state)}{doing}</td>{cells}</tr>'
    )


# -- what it found


def verdicts_html(found: Sequence[Verdict]) -> str:
    """The practical one biggest; each with how sure it is and what it rests on."""
    items = "".join(
        f'<article class="lab-verdict {esc(verdict.holds)}{" first" if place == 0 else ""}"><h4>{esc(verdict.title)}'
        f'<span>{HOLDS.get(verdict.holds, "")}</span></h4><p class="told">{esc(verdict.sentence)}</p>'
        f'<p class="rests">Sureness {esc(verdict.sureness)}. Rests on {esc(verdict.rests_on)}</p></article>'
        for place, verdict in enumerate(found)
    )
    return f'<div class="lab-verdicts">{items}</div>' if items else ""


def gallery_json(found: dict[str, dict[str, go.Figure]]) -> str:
    """Part -> title -> figure, for plots.gallery."""
    parts = [
        {
            "part": part,
            "figures": [{"title": title, "figure": json.loads(figure.to_json())} for title, figure in some.items()],
        }
        for part, some in found.items()
    ]
    return json.dumps(parts)


def answers_html(results: StudyResults) -> str:
    """Held-out rows with the answer of each model beside the others."""
    behaviour = results.analysis.behaviour if results.analysis else None
    if not behaviour or not behaviour["rows"]:
        text = (
            "They come with the analysis." if results.analysis_state in ACTIVE else "The analysis has answered no rows."
        )
        return empty("No answers yet", text)
    sources = behaviour["sources"]
    rows = "".join(
        f'<section><h4>line {row["line"]}</h4><pre>{esc(row["prompt"])}</pre><div class="each">'
        + _answer("reference", row["reference"])
        + "".join(_answer(sources[source]["label"], text) for source, text in row["answers"].items())
        + "</div></section>"
        for row in behaviour["rows"][:SHOWN_ROWS]
    )
    more = len(behaviour["rows"]) - SHOWN_ROWS
    note = f'<p class="lab-hint">{more} more in the report.</p>' if more > 0 else ""
    return f'<div class="lab-answers">{rows}{note}</div>'


def _answer(label: str, text: str) -> str:
    return f"<div><h4>{esc(METHOD_NAMES.get(label, label))}</h4><pre>{esc(text) or '–'}</pre></div>"
