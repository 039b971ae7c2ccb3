"""Figures and events -> the words and small pieces of HTML of the page. Every text from outside is escaped here."""

import html
import time
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.data.rows import counted
from qlora_core.run_status import CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, RunStatus
from qlora_core.scores import wilson_interval
from qlora_core.wording import METHOD_NAMES as METHOD_NAMES

# Words that the pure modules share, re-exported for the page's.
from qlora_core.wording import duration as duration
from qlora_core.wording import loss as loss
from qlora_core.wording import seconds as seconds
from qlora_core.wording import size as size

VARIANTS = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "gaussian": "Gaussian start",
    "orthogonal": "orthogonal start",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
}
# A sign beside the word, so that colour alone never carries a state.
STATE_SIGNS = {QUEUED: "◷", RUNNING: "▶", FINISHED: "✓", STOPPED: "■", FAILED: "✕", CRASHED: "!"}


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def clock(stamp: float) -> str:
    """Time of day; with the date when it was not today."""
    then, now = time.localtime(stamp), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%d %b %H:%M", then)


def memory(status: RunStatus) -> str:
    """The measured peak with its kind: GPU and host memory are never compared."""
    if status.peak_allocated_bytes is not None:
        return f"{size(status.peak_allocated_bytes)} GPU"
    return f"{size(status.peak_host_bytes)} host" if status.peak_host_bytes is not None else "–"


def state_chip(state: str) -> str:
    return f'<span class="lab-chip lab-{esc(state)}"><i aria-hidden="true">{STATE_SIGNS[state]}</i>{esc(state)}</span>'


def method_chip(method: str) -> str:
    return f'<span class="lab-method lab-method-{esc(method)}">{METHOD_NAMES[method]}</span>'


def variant_chips(config: TrainConfig) -> str:
    """What makes the adapter other than a plain LoRA, each as a small chip; empty for a plain one."""
    names = [VARIANTS["use_dora"]] * config.use_dora + [VARIANTS["use_rslora"]] * config.use_rslora
    names += [VARIANTS[config.init_lora_weights]] if config.init_lora_weights in VARIANTS else []
    names += [f"LoRA+ {config.loraplus_lr_ratio:g}"] if config.loraplus_lr_ratio else []
    return "".join(f'<span class="lab-variant">{esc(name)}</span>' for name in names)


def short_id(status: RunStatus, known: Iterable[RunStatus]) -> str:
    """The part of its id that no other run has, as a chip, where another of the known runs has the same name."""
    if not any(other.name == status.name and other.run_id != status.run_id for other in known):
        return ""
    return f' <span class="lab-id">{esc(short(status.run_id))}</span>'


def short(run_id: str) -> str:
    """The random part of "20261124-140608-e67c-name"."""
    parts = run_id.split("-")
    return parts[2] if len(parts) > 2 else run_id


def problems_panel(problems: Iterable[str], *, title: str = "This cannot run yet") -> str:
    """All problems in one place that stays until they are mended; empty without any."""
    items = "".join(f"<li>{esc(problem)}</li>" for problem in problems)
    return f'<div class="lab-problems" role="alert"><b>{esc(title)}</b><ul>{items}</ul></div>' if items else ""


def empty(title: str, what_next: str) -> str:
    return f'<div class="lab-empty"><b>{esc(title)}</b><p>{esc(what_next)}</p></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Named figures beside each other."""
    cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="lab-facts">{cells}</dl>'


def share(correct: int, total: int) -> str:
    low, high = wilson_interval(correct, total)
    return f"{correct} of {total} ({correct / total:.0%}; 95 % interval {low:.0%} to {high:.0%})"


def event_lines(history: Sequence[events.Event]) -> list[tuple[float, str]]:
    """(time, sentence) of everything worth telling; of a phase's progress only the newest."""
    lines: list[tuple[float, str]] = []
    phase = None
    for event in history:
        for number, text in enumerate(_sentences(event)):
            if isinstance(event, events.Phase) and phase == event.name and number == 0:
                lines.pop()
            lines.append((event.time, text))
        phase = event.name if isinstance(event, events.Phase) else None
    return lines


def _sentences(event: events.Event) -> list[str]:
    match event:
        case events.Launched():
            return ["worker started" if event.attempt == 1 else f"worker started again, attempt {event.attempt}"]
        case events.Note():
            return [event.text]
        case events.Phase():
            return [event.name + (f": {event.done} of {event.total}" if event.total else "")]
        case events.Started():
            return _started(event)
        case events.Resumed():
            return [f"goes on after step {event.from_step}", *event.skipped]
        case events.Evaluation():
            return [f"step {event.step}: evaluation loss {event.loss:.4f} ({seconds(event.seconds)})"]
        case events.Score():
            return [f"step {event.step}: right answers {share(event.correct, event.total)}"]
        case events.Checkpoint():
            return [f"step {event.step}: saved"]
        case events.Finished():
            return [event.reason or f"finished after {counted(event.step, 'step')}"]
        case events.Stopped():
            return [f"stopped at step {event.step}"]
        case events.Failed():
            return [f"failed at step {event.step}: {event.reason}"]
    return []


def _started(event: events.Started) -> list[str]:
    lines = [
        f"{counted(event.total_steps, 'step')} on {counted(event.train_rows, 'row')}, "
        f"evaluation on {counted(event.eval_rows, 'row')}; {event.device}, {event.compute_dtype}, {event.template}",
        f"{event.trainable_parameters:,} weights of the adapter learn",
        *event.path,
    ]
    if event.rows_cut:
        lines.append(f"{counted(event.rows_cut, 'row')} cut at max_seq_length")
    for what, left_out in (("left out", event.rows_left_out), ("left out of the evaluation", event.eval_rows_left_out)):
        if left_out:
            listed = ", ".join(map(str, left_out[:20])) + (" …" if len(left_out) > 20 else "")
            lines.append(f"{what}: {counted(len(left_out), 'row')} (lines {listed})")
    return lines


def hint(text: str) -> str:
    """A line of less importance; as high when it is empty."""
    return f'<p class="lab-hint">{esc(text) or "&nbsp;"}</p>'


def waiting(text: str) -> str:
    """Stands where something will be."""
    return f'<div class="lab-empty"><p>{esc(text)}</p></div>'
