"""The verdict that a person came for: whether QLoRA paid here, or which arm to take. Every amount is measured."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from qlora_core.data.rows import counted
from qlora_core.run_status import FAILED
from qlora_core.study_numbers import (
    LOSS_NEAR,
    ROUNDING,
    WHOLE,
    Arm,
    Pair,
    differences,
    estimated_parts,
    floor_differences,
    is_whole,
    losses,
    memory_kind,
    pairs,
    spread,
)
from qlora_core.study_results import LEFT_OUT, StudyResults
from qlora_core.verdicts.verdict import NO, UNCLEAR, YES, Verdict, between, listed, percent, signed, sureness
from qlora_core.wording import loss as loss_words
from qlora_core.wording import seconds, size

# Less memory saved is not worth a second look; more time than this is worth a word.
WORTH_SAVING, LONG_WAIT = 0.10, 0.25
SMALL_WEIGHTS_BYTES = 2 * 1024**3
TITLE = "Does QLoRA pay here?"
# Parts of an estimate that 4 bits leave as they are.
UNCHANGED = ("libraries", "activations", "working", "logits")


def practical(results: StudyResults, found: Sequence[Arm]) -> Verdict:
    """The first of: LoRA did not fit, QLoRA against LoRA, one arm against the others, nothing to compare."""
    found_pairs = pairs(found)
    if fits := _only_qlora_fits(results, found_pairs):
        return fits
    measured = [pair for pair in found_pairs if _costs(pair)]
    # A study of single groups in 4 bits is judged by all of them together.
    measured = [pair for pair in measured if is_whole(pair.qlora)] or measured
    if measured:
        return _of_pairs(results, found, measured)
    return _choice(results, found)


def _only_qlora_fits(results: StudyResults, found: Sequence[Pair]) -> Verdict | None:
    unfit = [pair for pair in found if pair.qlora.finished and not pair.lora.finished and _has_no_room(pair.lora)]
    if not unfit or any(pair.lora.finished for pair in found):
        return None
    peaks = [size(pair.qlora.mean(lambda run: run.peak_bytes)) for pair in unfit]
    kind = memory_kind(unfit[0].qlora)
    tried = any(run.state == FAILED for pair in unfit for run in pair.lora.runs)
    where = "LoRA ran out of memory" if tried else "LoRA would not have fitted, by the estimate"
    return Verdict(
        title=TITLE,
        sentence=f"QLoRA fits where {where}: its peak was {between(peaks)} of {kind} memory. Use it here.",
        holds=YES,
        sureness="high: one of the two did not run" if tried else "moderate: LoRA was estimated, and not tried",
        numbers={"qlora_peak_bytes": {pair.qlora.label: pair.qlora.mean(lambda run: run.peak_bytes) for pair in unfit}},
        rests_on="; ".join(f"{run.label} {run.state}: {run.detail}" for run in unfit[0].lora.runs if run.detail),
    )


def _has_no_room(arm: Arm) -> bool:
    return any(
        run.state == LEFT_OUT
        or (run.state == FAILED and ("out of memory" in run.detail or "does not fit" in run.detail))
        for run in arm.runs
    )


def _costs(pair: Pair) -> dict[str, Any] | None:
    """What QLoRA saved and cost of LoRA's; None where one of both has not finished, or their memory is of two kinds."""
    if not (pair.lora.finished and pair.qlora.finished) or memory_kind(pair.lora) != memory_kind(pair.qlora):
        return None
    peaks = [arm.mean(lambda run: run.peak_bytes) for arm in (pair.lora, pair.qlora)]
    times = [arm.mean(lambda run: run.step_seconds) for arm in (pair.lora, pair.qlora)]
    worse = differences(losses(pair.lora), losses(pair.qlora))
    if None in peaks:
        return None
    return {
        "memory_saved": 1 - peaks[1] / peaks[0],
        "peak_bytes": peaks,
        "time_added": times[1] / times[0] - 1 if all(times) else None,
        "step_seconds": times,
        "loss_added": statistics.fmean(worse) if worse else None,
        "loss_added_by_seed": worse,
    }


def _of_pairs(results: StudyResults, found: Sequence[Arm], measured: Sequence[Pair]) -> Verdict:
    costs = {pair.label or "QLoRA": _costs(pair) for pair in measured}
    kind = memory_kind(measured[0].lora)
    saved = sorted(one["memory_saved"] for one in costs.values())
    times = sorted(one["time_added"] for one in costs.values() if one["time_added"] is not None)
    worse = sorted(one["loss_added"] for one in costs.values() if one["loss_added"] is not None)
    noise = max((value for values in floor_differences(results, found).values() for value in values), default=0.0)
    tolerance = max(LOSS_NEAR, noise)
    typical = statistics.median(saved)
    holds, advice = _advice(typical, times, worse, tolerance)
    clauses = [_memory_clause(saved, kind), *_time_clause(times), *_loss_clause(worse)]
    if typical < WORTH_SAVING:
        advice += f": {_why_not(measured[0].lora, kind)}"
    interval = spread([value for one in costs.values() for value in one["loss_added_by_seed"]])
    several = f" Over {listed(costs)}." if len(costs) > 1 else f" At {next(iter(costs))}." if measured[0].label else ""
    return Verdict(
        title=TITLE,
        sentence=f"QLoRA {listed(clauses)}: {advice}.{several}",
        holds=holds,
        sureness=sureness(results, [arm for pair in measured for arm in (pair.lora, pair.qlora)], has_floor=noise > 0),
        numbers={
            "memory": kind,
            "by_setting": costs,
            "loss_added": interval.to_json() if interval else None,
            "perplexity_factor": math.exp(interval.mean) if interval else None,
            "loss_tolerance": tolerance,
        },
        rests_on=f"peak {kind} memory, median step time and evaluation loss of {counted(_runs(measured), 'finished run')}; "
        f"a difference up to {tolerance:.3f} nats counts as none"
        + (", as chance alone changes so much" if noise > LOSS_NEAR else ""),
    )


def _runs(measured: Sequence[Pair]) -> int:
    return len({run.run_id for pair in measured for arm in (pair.lora, pair.qlora) for run in arm.finished})


def _advice(saved: float, times: Sequence[float], worse: Sequence[float], tolerance: float) -> tuple[str, str]:
    slow = bool(times) and statistics.median(times) > LONG_WAIT
    if saved < WORTH_SAVING:
        return NO, "it does not pay here"
    if not worse:
        return UNCLEAR, "what it does to quality was not measured"
    if statistics.median(worse) > tolerance + ROUNDING:
        return UNCLEAR, "use it where 16 bits do not fit; where they do, LoRA is better"
    return YES, "use it here where memory is short, as it takes its time" if slow else "use it here"


def _memory_clause(saved: Sequence[float], kind: str | None) -> str:
    if saved[0] < 0 < saved[-1]:
        return f"changed {kind} memory by {100 * -saved[-1]:+.1f} % to {100 * -saved[0]:+.1f} %"
    if saved[-1] <= 0:
        return f"took {between([percent(saved[-1]), percent(saved[0])])} more {kind} memory"
    return f"saved {between([percent(saved[0]), percent(saved[-1])])} of {kind} memory"


def _time_clause(times: Sequence[float]) -> list[str]:
    if not times:
        return []
    if times[-1] < 0:
        return [f"was {between([percent(times[-1]), percent(times[0])])} faster a step"]
    if times[0] < 0:
        return [f"changed the time of a step by {100 * times[0]:+.1f} % to {100 * times[-1]:+.1f} %"]
    return [f"cost {between([percent(times[0]), percent(times[-1])])} of time a step"]


def _loss_clause(worse: Sequence[float]) -> list[str]:
    return [f"{between([signed(worse[0]), signed(worse[-1])])} evaluation loss"] if worse else []


def _why_not(lora: Arm, kind: str | None) -> str:
    """From the estimate's parts where the run told them; nothing is guessed."""
    parts = estimated_parts(lora)
    if not parts or WHOLE in parts:
        return f"why the {kind} memory did not fall, the runs have not recorded"
    whole, weights = sum(parts.values()), parts.get("weights", 0)
    unchanged = {name: parts[name] / whole for name in UNCHANGED if parts.get(name, 0) > 0.05 * whole}
    largest = sorted(unchanged, key=lambda name: -unchanged[name])[:2]
    reason = (
        f"weights, which are all that 4 bits make smaller, are only {percent(weights / whole)} of LoRA's estimated peak"
    )
    if weights < SMALL_WEIGHTS_BYTES:
        reason = f"the model is small ({size(weights)} of 16-bit weights), and " + reason
    if largest:
        reason += f"; {listed(f'{name} {percent(unchanged[name])}' for name in largest)}"
    return reason + ("; host memory is that of the whole process" if kind == "host" else "")


# -- without a pair


def _choice(results: StudyResults, found: Sequence[Arm]) -> Verdict:
    """The arm of least memory among those as good as the best."""
    done = [arm for arm in found if losses(arm)]
    title = "Which setting to take?"
    kinds = {memory_kind(arm) for arm in done}
    if len(done) < 2 or len(kinds) > 1:
        reason = (
            "Nothing has finished yet."
            if not done
            else f"Only {done[0].label} has an evaluation loss: there is nothing to compare it with."
            if len(done) == 1
            else "Memory was measured on a GPU and on a CPU: the arms cannot be weighed against each other."
        )
        return Verdict(
            title=title, sentence=reason, holds=UNCLEAR, sureness="low: too few runs", rests_on=counted(len(done), "finished arm")
        )  # fmt: skip
    noise = max((value for values in floor_differences(results, found).values() for value in values), default=0.0)
    tolerance = max(LOSS_NEAR, noise)
    best = min(done, key=lambda arm: statistics.fmean(losses(arm).values()))
    lowest = statistics.fmean(losses(best).values())
    good = [arm for arm in done if statistics.fmean(losses(arm).values()) <= lowest + tolerance + ROUNDING]
    chosen = min(
        good,
        key=lambda arm: (arm.mean(lambda r: r.peak_bytes) or math.inf, arm.mean(lambda r: r.step_seconds) or math.inf),
    )
    own = statistics.fmean(losses(chosen).values())
    has = f"evaluation loss {loss_words(own)}, {size(chosen.mean(lambda r: r.peak_bytes))} of {memory_kind(chosen)} memory, "
    has += f"{seconds(chosen.mean(lambda r: r.step_seconds))} a step"
    other = (
        "" if chosen is best else f" {best.label} has the lowest loss, by {signed(own - lowest)}, which counts as none."
    )
    return Verdict(
        title=title,
        sentence=f"Take {chosen.label}: {has}. Of the arms as good as the best it needs the least memory.{other}",
        holds=YES,
        sureness=sureness(results, done, has_floor=noise > 0),
        numbers={
            "loss": {arm.label: statistics.fmean(losses(arm).values()) for arm in done},
            "loss_tolerance": tolerance,
        },
        rests_on=f"evaluation loss, peak memory and step time of {counted(len(done), 'arm')}; "
        f"a difference up to {tolerance:.3f} nats counts as none",
    )
