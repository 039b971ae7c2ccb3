"""A study before it starts: which of its runs fit, what the largest needs, and how long all take at a pace that was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qlora_core import precision
from qlora_core.data.rows import counted
from qlora_core.errors import ConfigError
from qlora_core.memory import GIB, Planned
from qlora_core.planner.facts import Facts
from qlora_core.planner.fitting import planned, row_lengths, usable_bytes
from qlora_core.row_order import steps_per_epoch
from qlora_core.study_grid import Cell


@dataclass(frozen=True)
class Pace:
    """Of a run that has finished: what it trained as, how fast, and what it took around its steps."""

    base_model: str
    device: str
    method: str
    tokens_per_second: float
    seconds_around: float


@dataclass(frozen=True)
class PlannedCell:
    """`plan` is None where the model's sizes are not known."""

    cell: Cell
    plan: Planned | None

    @property
    def fits(self) -> bool:
        return self.plan is None or self.plan.fits


@dataclass(frozen=True)
class StudyEstimate:
    """`seconds` is None where no run of that base and method has been measured on this device; the analysis is not counted."""

    cells: tuple[PlannedCell, ...]
    usable_bytes: int
    seconds: float | None

    @property
    def largest(self) -> PlannedCell | None:
        known = [cell for cell in self.cells if cell.plan]
        return max(known, key=lambda cell: cell.plan.estimate.needed_bytes, default=None)

    @property
    def fitting(self) -> list[Cell]:
        return [cell.cell for cell in self.cells if cell.fits]

    def problems(self) -> list[str]:
        """A sentence for each run that would not fit."""
        return [
            f"{cell.cell.label}: needs {cell.plan.estimate.needed_bytes / GIB:.2f} GiB at the least, "
            f"{self.usable_bytes / GIB:.2f} may be used"
            for cell in self.cells
            if not cell.fits
        ]


def estimate_study(facts: Facts, made: Sequence[Cell], paces: Iterable[Pace]) -> StudyEstimate:
    """`facts` as of a single run; each cell brings its own settings. Raises ConfigError with all that the model has against
    them."""
    _check_layers(facts, made)
    of_cells = [replace(facts, config=cell.config) for cell in made]
    cells = [PlannedCell(cell, planned(of_cell)) for cell, of_cell in zip(made, of_cells, strict=True)]
    paces = list(paces)
    seconds = [_seconds(of_cell, paces) for of_cell in of_cells]
    known = [value for value in seconds if value is not None]
    return StudyEstimate(tuple(cells), usable_bytes(facts), sum(known) if len(known) == len(seconds) else None)


def _check_layers(facts: Facts, made: Sequence[Cell]) -> None:
    """A layer that the model has not would show only when the worker looks for it."""
    problems: dict[str, None] = {}
    for cell in made if facts.architecture else ():
        try:
            precision.check(facts.architecture.layers, cell.config)
        except ConfigError as error:
            problems |= dict.fromkeys(f"{cell.label}: {problem}" for problem in error.problems)
    if problems:
        raise ConfigError(*problems)


def _seconds(facts: Facts, paces: Sequence[Pace]) -> float | None:
    """The newest run of this base and method on this device says how long this one takes; rank and layers change that little."""
    config = facts.config
    pace = next(
        (
            pace
            for pace in paces
            if (pace.base_model, pace.method) == (config.base_model, config.method) and _same(pace.device, facts)
        ),
        None,
    )
    if pace is None:
        return None
    lengths = row_lengths(facts)
    steps = config.max_steps or max(
        1, round(steps_per_epoch(facts.train_rows, config.rows_per_step) * config.num_epochs)
    )
    tokens = steps * config.rows_per_step * sum(lengths) / len(lengths)
    return pace.seconds_around + tokens / pace.tokens_per_second


def _same(device: str, facts: Facts) -> bool:
    return facts.device.name in device if facts.device.is_gpu else device.startswith("CPU")


def fit_sentence(found: StudyEstimate) -> str:
    """What the largest run needs, or how many do not fit."""
    if unfitting := found.problems():
        return f"{counted(len(unfitting), 'run')} would not fit: " + "; ".join(unfitting)
    if found.largest is None:
        return "the model's sizes are not known, so its memory is not either"
    needed = found.largest.plan.estimate.needed_bytes
    return (
        f"every run fits: the largest, {found.largest.cell.label}, needs about {needed / GIB:.2f} GiB of the "
        f"{found.usable_bytes / GIB:.2f} that may be used"
    )
