"""Studies as HTML: the list, and one of them with its runs. Reads what has changed only, judges nothing."""

from collections.abc import Sequence
from functools import lru_cache

from qlora_core.errors import LabError
from qlora_core.run_status import ACTIVE, CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, RunStatus
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study import PICKED, Study
from qlora_core.study_grid import KINDS
from qlora_core.study_results import GONE, NONE
from qlora_core.study_status import StudyStatus
from qlora_core.ui import run_view
from qlora_core.ui.words import (
    STATE_SIGNS,
    clock,
    duration,
    empty,
    esc,
    loss,
    memory,
    problems_panel,
    seconds,
    short,
    state_chip,
)

NO_STUDIES = empty("No studies yet", "LoRA vs QLoRA makes one: both methods, what chance alone changes, and a verdict.")
# What a study's state is called, where a run has no such state: (word, class and sign of another).
OTHER_STATES = {GONE: ("incomplete", STOPPED), NONE: ("not started", QUEUED)}
STATE_MEANING = {
    QUEUED: "Nothing to do: it starts when the device is free.",
    STOPPED: "Resume goes on with what is missing.",
    FAILED: "What finished is compared, what is missing is named. Resume tries the failed runs again.",
    CRASHED: "Resume goes on from the newest saves.",
    GONE: "Resume makes the missing runs anew.",
    NONE: "Resume starts it.",
}
ANALYSIS = "analysis"
STRIP_CSS = """
.strip { display: flex; flex-wrap: wrap; gap: 7px; max-height: 170px; overflow: auto; padding: 2px; }
.strip button { display: inline-flex; align-items: center; gap: 7px; padding: 3px 11px; border-radius: 999px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); color: var(--body-text-color);
  font-size: .86rem; font-weight: 500; text-align: left; }
.strip button:hover { border-color: var(--muted); } .strip button[disabled] { cursor: default; opacity: .75; }
.strip .lab-chip { font-size: .86rem; }
"""
_LEFT_OUT = '<span class="lab-hint">left out, would not fit</span>'
_NO_FIGURES = '<td class="num">–</td>' * 3
PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-run]');
  if (button) trigger('select', { run: button.dataset.run });
});
"""


# -- reading


def statuses(settings: Settings) -> list[StudyStatus]:
    """Of all studies, newest first; one is folded again only when it or one of its runs has changed."""
    known = {status.run_id: status for status in run_view.statuses(settings)}
    found = []
    for study in StudyStore(settings).list():
        try:
            written = (study.path / "study.json").stat().st_mtime_ns
            of_runs = tuple(known.get(run_id) for run_id in _run_ids(study, written))
            found.append(_status(study, written, study.is_starting(), of_runs))
        except (OSError, LabError):  # deleted meanwhile, or unreadable: `unreadable` says why
            continue
    return found


@lru_cache(maxsize=256)
def _run_ids(study: Study, _written: int) -> tuple[str | None, ...]:
    told = study.told()
    return (*(entry["run_id"] for entry in told["runs"]), told["analysis"])


@lru_cache(maxsize=256)
def _status(study: Study, _written: int, _starting: bool, known: tuple[RunStatus | None, ...]) -> StudyStatus:
    return study.status({status.run_id: status for status in known if status})


def unreadable(settings: Settings) -> list[str]:
    """A sentence for each study whose file cannot be read."""
    problems = []
    for study in StudyStore(settings).list():
        try:
            _run_ids(study, (study.path / "study.json").stat().st_mtime_ns)
        except LabError as error:
            problems += error.problems
        except OSError:  # deleted meanwhile
            continue
    return problems


def results_marker(status: StudyStatus) -> str:
    """Changes when figures and verdicts do: a run was evaluated or has ended, the analysis has begun or ended, also again."""
    runs = [run for _, run in status.runs]
    told = [(run.run_id, run.state, run.eval_loss, _ended_at(run)) if run else None for run in (*runs, status.analysis)]
    return f"{status.study_id} {told}"


def _ended_at(run: RunStatus) -> float | None:
    return None if run.state in ACTIVE else run.updated_at


def curves_marker(status: StudyStatus) -> str:
    """Changes also while runs train, about fifty times in a study: each redraw reads every step."""
    total = sum(run.total_steps or 0 for _, run in status.runs if run)
    made = sum(run.step for _, run in status.runs if run)
    return f"{results_marker(status)} {50 * made // total if total else 0}"


# -- the list


def chip(state: str) -> str:
    if state in STATE_SIGNS:
        return state_chip(state)
    word, like = OTHER_STATES[state]
    return f'<span class="lab-chip lab-{like}"><i aria-hidden="true">{STATE_SIGNS[like]}</i>{word}</span>'


def table_html(found: Sequence[StudyStatus], chosen: str, problems: Sequence[str] = ()) -> str:
    told = problems_panel(problems, title="Studies that cannot be read")
    if not found:
        return told + NO_STUDIES
    rows = "".join(_row(status, status.study_id == chosen, _id_chip(status, found)) for status in found)
    heads = "".join(f"<th>{name}</th>" for name in ("study", "state", "what is compared"))
    return (
        f'{told}<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr>{heads}'
        f'<th class="num">runs done</th><th>when</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _id_chip(status: StudyStatus, known: Sequence[StudyStatus]) -> str:
    """The part of its id that no other study has, where another has the same name."""
    if not any(other.name == status.name and other.study_id != status.study_id for other in known):
        return ""
    return f' <span class="lab-id">{esc(short(status.study_id))}</span>'


def _row(status: StudyStatus, is_chosen: bool, id_chip: str) -> str:
    mark = ' class="chosen" aria-current="true"' if is_chosen else ""
    return (
        f'<tr data-run="{esc(status.study_id)}"{mark}><td><button type="button">{esc(status.name)}</button>{id_chip}</td>'
        f"<td>{chip(status.state)}</td><td>{esc(kind_words(status.kind))}</td>"
        f'<td class="num" data-label="runs done">{status.done} of {status.total}</td><td>{clock(status.created_at)}</td></tr>'
    )


def kind_words(kind: str) -> str:
    return KINDS[kind].title if kind in KINDS else "picked runs" if kind == PICKED else "settings of your own"


# -- one study


def head_html(status: StudyStatus) -> str:
    """Big state, one sentence, and how far the whole study is."""
    meaning = STATE_MEANING.get(status.state, "")
    kind = "" if status.name.startswith(kind_words(status.kind)) else kind_words(status.kind)
    if status.state == GONE and status.kind == PICKED:
        meaning = "What is left is compared."
    return (
        f'<div class="lab-card lab-head" data-state="{esc(status.state)}" data-study="{esc(status.study_id)}">'
        f'<div class="top">{chip(status.state)}<h3>{esc(status.name)}</h3><span class="lab-hint">{esc(kind)}</span></div>'
        f'<p class="detail">{esc(_detail(status))}<br><span class="lab-hint">{esc(meaning) or "&nbsp;"}</span></p>'
        f"{_bar(status)}</div>"
    )


def _detail(status: StudyStatus) -> str:
    """The study's own sentence, without the count that stands at the bar; what the analysis does or what it failed of."""
    _, _, rest = status.detail.partition("; ")
    analysis = status.analysis
    if analysis and analysis.state not in (QUEUED, FINISHED) and "analysis" not in rest:
        rest = "; ".join(filter(None, (rest, f"analysis {analysis.state}: {analysis.detail}")))
    if not rest:
        rest = "all runs finished and analysed" if status.done == status.total else "waits for its turn"
    return f"{rest[:1].upper()}{rest[1:]}"


def _bar(status: StudyStatus) -> str:
    longest = max((run.total_steps or 0 for _, run in status.runs if run), default=0)
    total, made = longest * status.total, sum(run.step for _, run in status.runs if run)
    share = min(1.0, made / total) if total else 0.0
    left = f"{duration(status.eta_seconds)} left" if status.eta_seconds else ""
    if status.analysis and status.analysis.state == RUNNING and status.analysis.phase_total:
        left = f"analysis: {status.analysis.phase_done} of {status.analysis.phase_total}"
    steps = f"{status.done} of {status.total} runs done" + (f", {made:,} of {total:,} steps" if total else "")
    return (
        f'<div class="lab-bar" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="steps of all runs" style="--hue:var(--body-text-color)"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<div class="lab-bar-words"><span>{steps}</span><span>{esc(left)}</span></div>'
    )


def strip_html(status: StudyStatus) -> str:
    """Each run as a button with its state, which leads to it. Changes when a state does, so that a focus stays."""
    items = "".join(_pill(label, run) for label, run in (*status.runs, (ANALYSIS, status.analysis)))
    items += "".join(f"<button type='button' disabled>{esc(label)} {_LEFT_OUT}</button>" for label in status.left_out)
    return f'<div class="strip" role="group" aria-label="Runs of the study">{items}</div>'


def _pill(label: str, run: RunStatus | None) -> str:
    if run is None:
        word = "at the end" if label == ANALYSIS else "gone"
        return f"<button type='button' disabled>{esc(label)} <span class='lab-hint'>{word}</span></button>"
    return f'<button type="button" data-run="{esc(run.run_id)}">{state_chip(run.state)} {esc(label)}</button>'


def runs_html(status: StudyStatus) -> str:
    """Each run with its state and figures; its name leads to it."""
    heads = "".join(f'<th class="num">{name}</th>' for name in ("evaluation loss", "peak memory", "step time"))
    rows = "".join(_run_row(label, run) for label, run in (*status.runs, (ANALYSIS, status.analysis)))
    rows += "".join(f"<tr><td>{esc(label)}</td><td>{_LEFT_OUT}</td>{_NO_FIGURES}</tr>" for label in status.left_out)
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr><th>run</th><th>state</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _run_row(label: str, run: RunStatus | None) -> str:
    if run is None:
        told = "made at the end" if label == ANALYSIS else "gone"
        return f"<tr><td>{esc(label)}</td><td>{told}</td>{_NO_FIGURES}</tr>"
    figures = (
        ("evaluation loss", loss(run.eval_loss)),
        ("peak memory", memory(run)),
        ("step time", seconds(run.step_seconds)),
    )
    cells = "".join(f'<td class="num" data-label="{name}">{esc(value)}</td>' for name, value in figures)
    doing = (
        ""
        if run.state == FINISHED
        else f'<br><span class="lab-hint" style="white-space:normal">{esc(run.detail)}</span>'
    )
    return (
        f'<tr data-run="{esc(run.run_id)}"><td><button type="button">{esc(label)}</button> '
        f'<span class="lab-id">{esc(short(run.run_id))}</span></td><td>{state_chip(run.state)}{doing}</td>{cells}</tr>'
    )


def can_resume(status: StudyStatus) -> bool:
    """Whether runs are missing that could still be made."""
    return status.state not in ACTIVE and status.done < status.total and status.kind != PICKED
