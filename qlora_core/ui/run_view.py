"""One run and the table of runs as HTML, and cheap reading of both: what has not changed is not read again."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from qlora_core import events
from qlora_core.errors import RunError
from qlora_core.events import Event
from qlora_core.runs import CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, Run, RunStatus, RunStore, queue_entries
from qlora_core.settings import Settings
from qlora_core.ui.words import (
    METHOD_NAMES,
    clock,
    counted,
    duration,
    empty,
    esc,
    event_lines,
    facts,
    loss,
    memory,
    method_chip,
    seconds,
    share,
    size,
    state_chip,
)

NO_RUNS = empty("No runs yet", "Go to Data, take the example, choose Use this dataset, then Start.")
STATE_MEANING = {
    QUEUED: "Nothing to do: it starts when the device is free.",
    FAILED: "Copy the settings, change what the reason names, and start again. Resume goes on from the last save, or begins again.",
    CRASHED: "Resume goes on from the newest save. The end of the worker's log stands below.",
    STOPPED: "Resume goes on where it was saved.",
    FINISHED: "",
    RUNNING: "",
}


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


def table_html(found: Sequence[RunStatus], chosen: str) -> str:
    if not found:
        return NO_RUNS
    rows = "".join(_row(status, status.run_id == chosen) for status in found)
    heads = "".join(f"<th>{name}</th>" for name in ("name", "state", "method")) + "".join(
        f'<th class="num">{name}</th>' for name in ("rank", "evaluation loss", "peak memory", "step time")
    )
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-runs"><thead><tr>{heads}<th>when</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(status: RunStatus, is_chosen: bool) -> str:
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
        f'<tr data-run="{esc(status.run_id)}"{mark}><td><button type="button">{esc(status.name)}</button></td>'
        f"<td>{state_chip(status.state)}{place}</td><td>{method_chip(status.method)}</td>{cells}"
        f"<td>{clock(status.created_at)}</td></tr>"
    )


def head_html(status: RunStatus) -> str:
    """Big state, one sentence, and how far the run is."""
    more = STATE_MEANING[status.state] or "&nbsp;"
    if status.state == CRASHED and status.checkpoint_step is None:
        more = "Resume starts it again. The end of the worker's log stands below."
    # A failed run's detail is the worker's reason and may be long.
    told = "training" if status.detail == f"step {status.step} of {status.total_steps}" else status.detail
    detail = f'{esc(told[:1].upper() + told[1:])}<br><span class="lab-hint">{more}</span>'
    return (
        f'<div class="lab-card lab-head lab-method-{esc(status.method)}" data-state="{esc(status.state)}" '
        f'data-run="{esc(status.run_id)}"><div class="top">{state_chip(status.state)}<h3>{esc(status.name)}</h3>'
        f'<span class="lab-hint">{METHOD_NAMES[status.method]} · rank {status.rank} · {esc(status.base_model)}</span></div>'
        f'<p class="detail">{detail}</p>{_bar(status)}</div>'
    )


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


def result_html(run: Run, status: RunStatus) -> str:
    """Measured figures of a run that has ended with an adapter; before that, what will stand here."""
    result = run.result()
    if result is None and status.state not in (RUNNING, QUEUED):
        return empty("No result", "The run ended before it had an adapter. What happened tells why.")
    if result is None or status.state in (RUNNING, QUEUED):
        return empty("Result", "Measured memory, step time, loss and score stand here when the run has ended.")
    info = result["train_info"]
    pairs = [(f"peak memory, {kind}", size(info[field])) for kind, field in _memory_kinds(info)]
    pairs += [
        ("step time, median", seconds(info["step_seconds_median"])),
        ("speed", f"{info['tokens_per_second']:,.0f} tokens/s" if info["tokens_per_second"] else "–"),
        ("adapter", f"{size(info['adapter_bytes'])}, {info['trainable_parameters'] / 1e6:.2f} M weights"),
    ]
    losses, scores = info["eval_losses"], info["scores"]
    if losses:
        known = [losses[0]] if len(losses) == 1 else [losses[0], losses[-1]]
        title = "evaluation loss, " + " → ".join(f"step {entry['step']}" for entry in known)
        pairs.append((title, " → ".join(loss(entry["loss"]) for entry in known)))
    for word, score in zip(("before", "after"), (scores[0], scores[-1]) if len(scores) > 1 else scores, strict=False):
        pairs.append((f"right answers {word}", share(score["correct"], score["total"])))
    return (
        f'<div class="lab-card"><h3>Result</h3>{facts(pairs)}<p class="lab-hint" style="margin-top:10px">'
        f"Measured on {esc(result['run_info']['device'])}, {esc(result['run_info']['compute_dtype'])}; "
        f"{counted(info['train_rows'], 'row')} trained on, {counted(info['eval_rows'], 'row')} held out.</p></div>"
    )


def _memory_kinds(info: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = (
        ("GPU allocated", "peak_allocated_bytes"),
        ("GPU reserved", "peak_reserved_bytes"),
        ("host", "peak_host_bytes"),
    )
    return [(kind, field) for kind, field in kinds if info[field] is not None]


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
    rows = "".join(_answers_row(before, after, two) for before, after in pairs[:most])
    heads = "<th>prompt</th><th>reference</th><th>before training</th>"
    heads += f"<th>after step {last[0]}</th>" if two else ""
    return (
        f'<p class="lab-hint">{min(most, len(pairs))} of {len(pairs)} held-out rows, those that changed first.</p>'
        f'<div class="lab-scroll" style="max-height:460px"><table class="lab-table lab-answers"><thead><tr>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _answers_row(before: dict[str, Any], after: dict[str, Any], two: bool) -> str:
    cells = [f"<pre>{esc(before['prompt'])}</pre>", f"<pre>{esc(before['reference'])}</pre>"]
    for answer in (before, after) if two else (before,):
        sign = "lab-right" if answer["correct"] else "lab-wrong"
        cells.append(f'<span class="{sign}"></span><pre>{esc(answer["answer"])}</pre>')
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def raw_log_html(run: Run) -> str:
    return f'<pre class="lab-raw">{esc(run.log_tail(60)) or "The worker printed nothing."}</pre>'
