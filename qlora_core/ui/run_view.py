"""One run and the table of runs as HTML, and cheap reading of both: what has not changed is not read again."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from qlora_core import events
from qlora_core.errors import RunError
from qlora_core.events import Event
from qlora_core.run_status import ACTIVE, CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, RunStatus
from qlora_core.runs import Run, RunStore, queue_entries
from qlora_core.settings import Settings
from qlora_core.ui.words import (
    METHOD_NAMES,
    clock,
    duration,
    empty,
    esc,
    event_lines,
    loss,
    memory,
    method_chip,
    seconds,
    short,
    short_id,
    state_chip,
    variant_chips,
)

NO_RUNS = empty("No runs yet", "Go to Data, take the example, choose Use this dataset, then Start.")
STATE_MEANING = {
    QUEUED: "Nothing to do: it starts when the device is free.",
    FAILED: "Copy the settings, change what the reason names, and start again. Resume goes on from the last save, or begins again.",
    CRASHED: "Resume goes on from the newest save",
    STOPPED: "Resume goes on where it was saved.",
    FINISHED: "",
    RUNNING: "",
}
LOG_BELOW = "The end of the worker's log stands below."


def statuses(settings: Settings) -> list[RunStatus]:
    """Of all runs, newest first; a run is folded again only when something of it changed."""
    queued = tuple(entry.name for entry in queue_entries(settings))
    found = []
    for run in RunStore(settings).list():
        try:
            found.append(_status(run, _signature(run), queued))
        except (FileNotFoundError, RunError):  # deleted meanwhile, or unreadable: `runs list` says why
            continue
    return found


def _signature(run: Run) -> tuple[Any, ...]:
    try:
        stat = run.events_path.stat()
        written = (stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        written = (0, 0)
    return (*written, run.is_locked(), (run.path / "stop").exists())


@lru_cache(maxsize=1024)
def _status(run: Run, _signature: tuple[Any, ...], _queued: tuple[str, ...]) -> RunStatus:
    return run.status()


def has_adapter(run: Run) -> bool:
    return (run.adapter / "adapter_model.safetensors").exists()


def with_adapter(found: Sequence[RunStatus], settings: Settings) -> list[tuple[str, str]]:
    """(label, id) of the runs whose adapter can be taken away, combined or merged, newest first."""
    return [
        (f"{s.name} · {METHOD_NAMES[s.method]} r{s.rank} · {s.state} · {short(s.run_id)}", s.run_id)
        for s in found
        if s.state not in ACTIVE and has_adapter(Run(settings.runs / s.run_id, settings))
    ]


@lru_cache(maxsize=1024)
def kind_chips(run: Run) -> str:
    """What of a run's kind the table shows beside its method; a run's kind never changes."""
    if not run.trains:
        return f'<span class="lab-variant">{"combined" if run.combination() else "analysis"}</span>'
    return variant_chips(run.config())


def table_html(found: Sequence[RunStatus], chosen: str, settings: Settings) -> str:
    if not found:
        return NO_RUNS
    rows = "".join(
        _row(s, s.run_id == chosen, short_id(s, found), kind_chips(Run(settings.runs / s.run_id, settings)))
        for s in found
    )
    heads = "".join(f"<th>{name}</th>" for name in ("name", "state", "method")) + "".join(
        f'<th class="num">{name}</th>' for name in ("rank", "evaluation loss", "peak memory", "step time")
    )
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr>{heads}<th>when</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(status: RunStatus, is_chosen: bool, id_chip: str, chips: str) -> str:
    mark = ' class="chosen" aria-current="true"' if is_chosen else ""
    figures = (
        ("rank", str(status.rank)),
        ("evaluation loss", loss(status.eval_loss)),
        ("peak memory", memory(status)),
        ("step time", seconds(status.step_seconds)),
    )
    cells = "".join(f'<td class="num" data-label="{name}">{esc(value)}</td>' for name, value in figures)
    place = f" (place {status.queue_place})" if status.queue_place else ""
    return (
        f'<tr data-run="{esc(status.run_id)}"{mark}><td><button type="button">{esc(status.name)}</button>{id_chip}</td>'
        f"<td>{state_chip(status.state)}{place}</td><td>{method_chip(status.method)}{chips}</td>{cells}"
        f"<td>{clock(status.created_at)}</td></tr>"
    )


def head_html(status: RunStatus, run: Run, known: Sequence[RunStatus] = ()) -> str:
    """Big state, one sentence, and how far the run is."""
    combination = run.combination()
    # A failed run's detail is the worker's reason and may be long.
    told = "training" if status.detail == f"step {status.step} of {status.total_steps}" else status.detail
    meaning = _what_next(status) or ("&nbsp;" if run.trains else "")
    hint = f'<br><span class="lab-hint">{meaning}</span>' if meaning else ""
    kind = f"{METHOD_NAMES[status.method]} · rank {status.rank} · {esc(status.base_model)} {kind_chips(run)}"
    return (
        f'<div class="lab-card lab-head lab-method-{esc(status.method)}" data-state="{esc(status.state)}" '
        f'data-run="{esc(status.run_id)}"><div class="top">{state_chip(status.state)}'
        f'<h3>{esc(status.name)}{short_id(status, known)}</h3><span class="lab-hint">{kind}</span></div>'
        f'<p class="detail">{esc(told[:1].upper() + told[1:])}{hint}</p>'
        f"{parts_html(combination) if combination else _bar(status) if run.trains else ''}</div>"
    )


def _what_next(status: RunStatus) -> str:
    again = status.checkpoint_step is None
    if status.state == CRASHED:
        return f"{'Start again begins anew' if again else STATE_MEANING[CRASHED]}. {LOG_BELOW}"
    if status.state == FAILED and again:
        return "Copy the settings, change what the reason names, and start that. Start again tries the same once more."
    if status.state == STOPPED and again:
        return "Start again puts it in the queue."
    return STATE_MEANING[status.state]


def parts_html(combination: dict[str, Any]) -> str:
    """What was added up, and the loss that each part had alone where it was measured on the same rows."""
    parts = []
    for part in combination["parts"]:
        alone = part.get("same_eval_rows") and part.get("eval_loss") is not None
        told = f", evaluation loss alone {loss(part['eval_loss'])}" if alone else ""
        parts.append(f"<li>{part['weight']:g} × <b>{esc(part['name'])}</b>{told}</li>")
    density = combination.get("density")
    how = esc(combination["method"]) + (f", density {density:g}" if density is not None else "")
    return f'<div class="lab-parts"><span class="lab-hint">Sum by {how} of</span><ul>{"".join(parts)}</ul></div>'


def _bar(status: RunStatus) -> str:
    total = status.total_steps
    done = status.step / total if total else 0
    left = ""
    if status.state == RUNNING:
        left = f"{duration(status.eta_seconds)} left" if status.eta_seconds else ""
    words = f"step {status.step:,} of {total:,}" if total else "not started"
    return (
        f'<div class="lab-bar" role="progressbar" aria-label="progress of the run" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{done * 100:.0f}"><i style="width:{done * 100:.1f}%"></i></div>'
        f'<div class="lab-bar-words"><span>{words}</span><span>{left}</span></div>'
    )


def log_html(history: Sequence[Event]) -> str:
    """What happened in plain words, newest first."""
    lines = [
        f"<div><time>{clock(stamp)}</time><span>{esc(text)}</span></div>" for stamp, text in event_lines(history)[::-1]
    ]
    return f'<div class="lab-log" tabindex="0" aria-label="log">{"".join(lines) or "Waits for its worker."}</div>'


def answers_html(run: Run, history: Sequence[Event], most: int = 12) -> str:
    """Generated answers before and after training beside the reference; what changed first."""
    steps = sorted({event.step for event in history if isinstance(event, events.Score)})
    files = [(step, run.path / f"answers-{step}.json") for step in steps]
    found = [(step, json.loads(path.read_text())) for step, path in files if path.exists()]
    if not found:
        return empty("No answers yet", "With a score (Advanced, Evaluation) the model answers held-out rows here.")
    first, last = found[0], found[-1]
    pairs = sorted(zip(first[1], last[1], strict=False), key=lambda pair: pair[0]["correct"] == pair[1]["correct"])
    two = last[0] != first[0]
    names = ["prompt", "reference", "before training"] + [f"after step {last[0]}"] * two
    rows = "".join(_answers_row(before, after, names) for before, after in pairs[:most])
    heads = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<p class="lab-hint">{min(most, len(pairs))} of {len(pairs)} held-out rows, those that changed first.</p>'
        f'<div class="lab-scroll" style="max-height:460px"><table class="lab-table lab-answers"><thead><tr>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _answers_row(before: dict[str, Any], after: dict[str, Any], names: list[str]) -> str:
    cells = [f"<pre>{esc(before['prompt'])}</pre>", f"<pre>{esc(before['reference'])}</pre>"]
    for answer in (before, after)[: len(names) - 2]:
        sign = "lab-right" if answer["correct"] else "lab-wrong"
        cells.append(f'<span class="{sign}"></span><pre>{esc(answer["answer"])}</pre>')
    # A narrow page stacks the cells, each below its name.
    named = zip(names, cells, strict=True)
    return "<tr>" + "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in named) + "</tr>"


def raw_log_html(run: Run) -> str:
    return f'<pre class="lab-raw">{esc(run.log_tail(60)) or "The worker printed nothing."}</pre>'
