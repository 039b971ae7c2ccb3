"""Where a study stands, folded from where its runs stand. Changes nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_core.run_status import ACTIVE, CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, RunStatus
from qlora_core.study_results import GONE, NONE


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands. `runs` are those of its grid, None where a run is gone; `done` of them have finished."""

    study_id: str
    name: str
    kind: str
    state: str
    done: int
    total: int
    runs: tuple[tuple[str, RunStatus | None], ...]  # (label of the run, where it stands)
    analysis: RunStatus | None
    eta_seconds: float | None  # at the pace of what has been measured; None before
    created_at: float
    detail: str
    left_out: tuple[str, ...] = ()  # labels of runs that would not fit the memory, and are not made

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def state_of(runs: Sequence[RunStatus | None], analysis: RunStatus | None) -> str:
    """Of the whole: what goes on wins over what has ended, and what ended badly over what ended well."""
    if analysis is None and not any(runs):
        return NONE
    states = [status.state if status else GONE for status in (*runs, analysis)]
    return next((state for state in (RUNNING, QUEUED, CRASHED, FAILED, STOPPED, GONE) if state in states), FINISHED)


def detail_of(
    runs: Sequence[tuple[str, RunStatus | None]], analysis: RunStatus | None, done: int, left_out: Sequence[str] = ()
) -> str:
    """One sentence: how many runs are done, what trains, and what did not come to its end."""
    said = [f"{done} of {len(runs)} runs finished"]
    said += [f"{label} trains: {status.detail}" for label, status in runs if status and status.state == RUNNING]
    said += [
        f"{label} {status.state}" for label, status in runs if status and status.state in (STOPPED, FAILED, CRASHED)
    ]
    said += [f"{label} is gone" for label, status in runs if status is None]
    said += [f"{label} is left out, as it would not fit the memory" for label in left_out]
    if analysis and analysis.state != FINISHED and done == len(runs):
        said.append(f"analysis {analysis.state}: {analysis.detail}")
    return "; ".join(said)


def eta_seconds(runs: Sequence[RunStatus | None]) -> float | None:
    """Seconds until the last run has ended, at the step time of each method as measured so far; the analysis not counted."""
    known: dict[str, list[float]] = {}
    for status in runs:
        if status and status.step_seconds:
            known.setdefault(status.method, []).append(status.step_seconds)
    every = [seconds for found in known.values() for seconds in found]
    steps = max((status.total_steps or 0 for status in runs if status), default=0)
    if not every or not steps:
        return None
    total = 0.0
    for status in runs:
        if status is None or status.state not in ACTIVE:
            continue
        if status.state == RUNNING and status.eta_seconds is not None:
            total += status.eta_seconds
        else:
            seconds = known.get(status.method, every)
            total += sum(seconds) / len(seconds) * (steps - status.step)
    return total
