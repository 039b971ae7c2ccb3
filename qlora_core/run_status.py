"""Where a run stands, folded from its events, its lock and the queue. Changes nothing."""

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.events import Event

if TYPE_CHECKING:
    from qlora_core.runs import Run

QUEUED, RUNNING, FINISHED, STOPPED, FAILED, CRASHED = "queued", "running", "finished", "stopped", "failed", "crashed"
ACTIVE = (QUEUED, RUNNING)


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands, folded from its events. `detail` is one plain sentence; losses and times are the newest."""

    run_id: str
    name: str
    state: str
    method: str
    rank: int
    base_model: str
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    step_seconds: float | None
    eta_seconds: float | None
    peak_allocated_bytes: int | None
    peak_host_bytes: int | None
    queue_place: int | None
    checkpoint_step: int | None
    phase: str | None
    phase_done: int
    phase_total: int
    detail: str
    created_at: float
    updated_at: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _newest(history: list[Event], kind: type[Event]) -> Any:
    return next((event for event in reversed(history) if isinstance(event, kind)), None)


def fold(run: "Run") -> RunStatus:
    """Read the run's events, lock and place in the queue once. Raises RunError for a run whose files cannot be read."""
    config, history = run.config(), run.history()
    step, evaluation = _newest(history, events.Step), _newest(history, events.Evaluation)
    started, checkpoint = _newest(history, events.Started), _newest(history, events.Checkpoint)
    launched = max((i for i, e in enumerate(history) if isinstance(e, events.Launched)), default=-1)
    this_attempt = history[launched + 1 :]
    terminal = _newest(this_attempt, events.TERMINAL)
    place = run.queue_place()
    if run.is_locked() and terminal is None:
        state = RUNNING
    elif place is not None:
        state = QUEUED
    elif terminal is not None:
        state = {events.Finished: FINISHED, events.Stopped: STOPPED, events.Failed: FAILED}[type(terminal)]
    else:
        state = CRASHED
    phase = this_attempt[-1] if this_attempt and isinstance(this_attempt[-1], events.Phase) else None
    last_step = step.step if step else 0
    total = started.total_steps if started else None
    seconds = [event.step_seconds for event in events.timed_steps(history)]
    eta = _eta_seconds(config, this_attempt, last_step, total) if state == RUNNING and total else None
    status = RunStatus(
        run_id=run.run_id,
        name=config.run_name(),
        state=state,
        method=config.method,
        rank=config.rank,
        base_model=run.base_model().name,
        step=last_step,
        total_steps=total,
        loss=step.loss if step else None,
        eval_loss=evaluation.loss if evaluation else None,
        step_seconds=statistics.median(seconds) if seconds else None,
        eta_seconds=eta,
        peak_allocated_bytes=events.peak(history, "peak_allocated_bytes"),
        peak_host_bytes=events.peak(history, "peak_host_bytes"),
        queue_place=place if state == QUEUED else None,
        checkpoint_step=checkpoint.step if checkpoint else None,
        phase=phase.name if phase and state == RUNNING else None,
        phase_done=phase.done if phase else 0,
        phase_total=phase.total if phase else 0,
        detail="",
        created_at=(run.path / "model.json").stat().st_mtime,
        updated_at=history[-1].time if history else (run.path / "model.json").stat().st_mtime,
    )
    return replace(status, detail=_detail(run, status, this_attempt))


def _eta_seconds(config: TrainConfig, attempt: list[Event], step: int, total: int) -> float | None:
    """Seconds to the end at the pace of this attempt, its evaluations and checkpoints included, and the last scoring."""
    steps = [event for event in attempt if isinstance(event, events.Step)]
    if not steps:
        return None
    begin = steps[0].time - steps[0].step_seconds
    remaining = (steps[-1].time - begin) / len(steps) * (total - step)
    scores = [event.seconds for event in attempt if isinstance(event, events.Score) and event.step < total]
    if config.score != "none" and scores:
        remaining += scores[-1]
    return max(0.0, remaining - (time.time() - steps[-1].time))


def _detail(run: "Run", status: RunStatus, attempt: list[Event]) -> str:
    """The sentence for the rest of the status."""
    step, saved = status.step, status.checkpoint_step
    of_total = f"step {step} of {status.total_steps}" if status.total_steps else "starting"
    if status.state == QUEUED:
        return f"waits for the device, place {status.queue_place} in the queue"
    if status.state == RUNNING:
        if (run.path / "stop").exists():
            return f"saving and stopping, {of_total}"
        if status.phase:
            return status.phase + (f" {status.phase_done} of {status.phase_total}" if status.phase_total else "")
        has_started = _newest(attempt, events.Started) is not None
        return of_total if has_started else "starting again" if step else "starting"
    if status.state == FINISHED:
        return _newest(attempt, events.Finished).reason or f"finished after {step} steps"
    if status.state == STOPPED:
        first = "the first step" if run.trains else "the adapters were combined" if run.combination() else "its end"
        return f"saved at step {step}" if saved is not None else f"stopped before {first}"
    if status.state == FAILED:
        return _newest(attempt, events.Failed).reason
    goes_on = f"can be resumed from step {saved}" if saved is not None else "no checkpoint yet, resuming starts again"
    return f"the worker ended without a word at step {step}; {goes_on}"
