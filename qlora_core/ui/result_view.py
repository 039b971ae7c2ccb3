"""What came out of a run, measured, as a card. Reads result.json; measures nothing."""

from typing import Any

from qlora_core.data.rows import counted
from qlora_core.events import Started
from qlora_core.run_status import QUEUED, RUNNING, RunStatus
from qlora_core.runs import Run
from qlora_core.ui.words import empty, esc, facts, loss, seconds, share, size


def result_html(run: Run, status: RunStatus) -> str:
    """Measured figures of a run that has ended with an adapter; before that, what will stand here."""
    if run.analysis():
        return empty("Analysis of a study", "What it finds stands on the Compare tab.")
    result = run.result()
    if result is None and status.state not in (RUNNING, QUEUED):
        return empty("No result", "The run ended before it had an adapter. What happened tells why.")
    if result is None or status.state in (RUNNING, QUEUED):
        return empty("Result", "Measured memory, step time, loss and score stand here when the run has ended.")
    info, ran = result["train_info"], result["run_info"]
    pairs = [(f"peak memory, {kind}", size(info[field])) for kind, field in _memory_kinds(info)]
    pairs += _estimated(run, info)
    if info["step_seconds_median"] is not None:
        pairs += [
            ("step time, median", seconds(info["step_seconds_median"])),
            ("speed", f"{info['tokens_per_second']:,.0f} tokens/s"),
        ]
    pairs += [("adapter", size(info["adapter_bytes"])), ("trainable weights", f"{info['trainable_parameters']:,}")]
    if not run.combination():
        # Each of both is "word: why"; the log has the reasons.
        path = ", ".join(ran["path"][name].partition(":")[0] for name in ("layers", "packed", "compiled"))
        pairs += [("path", path), ("memory plan", ran["path"]["memory"]), ("optimizer", ran["config"]["optimizer"])]
    pairs += _loss_pairs(info)
    return (
        f'<div class="lab-card"><h3>Result</h3>{facts(pairs)}<p class="lab-hint" style="margin-top:10px">'
        f"{_kept_adapter(info)}Measured on {esc(ran['device'])}, {esc(ran['compute_dtype'])}; {_rows(info)}.</p></div>"
    )


def _estimated(run: Run, info: dict[str, Any]) -> list[tuple[str, str]]:
    """What the worker expected before the first step, beside what it was."""
    expected = [event.estimated_peak_bytes for event in run.history() if isinstance(event, Started)]
    measured = info["peak_allocated_bytes"] or info["peak_host_bytes"]
    if not expected or not measured:
        return []
    return [("estimated before the run", f"{size(expected[-1])} ({expected[-1] / measured - 1:+.0%})")]


def _loss_pairs(info: dict[str, Any]) -> list[tuple[str, str]]:
    pairs, losses, scores = [], info["eval_losses"], info["scores"]
    if losses:
        known = [losses[0]] if len(losses) == 1 else [losses[0], losses[-1]]
        title = "evaluation loss, " + " → ".join(f"step {entry['step']}" for entry in known)
        pairs.append((title if info["steps"] else "evaluation loss", " → ".join(loss(e["loss"]) for e in known)))
    for word, score in zip(("before", "after"), (scores[0], scores[-1]) if len(scores) > 1 else scores, strict=False):
        pairs.append((f"right answers {word}", share(score["correct"], score["total"])))
    return pairs


def _kept_adapter(info: dict[str, Any]) -> str:
    """A sentence where the adapter is not that of the last step."""
    step = info.get("adapter_step", info["steps"])
    if step == info["steps"]:
        return ""
    kept = next((entry["loss"] for entry in info["eval_losses"] if entry["step"] == step), None)
    lowest = f", the lowest evaluation loss ({loss(kept)})" if kept is not None else ""
    return f"<b>The adapter is that of step {step}</b>{lowest}. "


def _rows(info: dict[str, Any]) -> str:
    held_out = f"{counted(info['eval_rows'], 'row')} held out"
    return f"{counted(info['train_rows'], 'row')} trained on, {held_out}" if info["train_rows"] else held_out


def _memory_kinds(info: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = (
        ("GPU allocated", "peak_allocated_bytes"),
        ("GPU reserved", "peak_reserved_bytes"),
        ("host", "peak_host_bytes"),
    )
    return [(kind, field) for kind, field in kinds if info[field] is not None]
