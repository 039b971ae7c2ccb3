"""A study before it starts: what is asked for -> its runs, what they need, how long they take; and its start. The same for the
page, its endpoints and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.options import converted
from qlora_core.planner.facts import Facts
from qlora_core.planner.studying import Pace, StudyEstimate, estimate_study
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study import GRID, Study
from qlora_core.study_grid import KINDS, Cell, cells, fill_notes, filled

LORA_VS_QLORA = "lora-vs-qlora"


@dataclass(frozen=True)
class Wanted:
    """A study that is asked for: `vary` holds all that varies, `noise_floor` None leaves it to the kind."""

    kind: str
    vary: dict[str, list[Any]]
    seeds: list[int] = field(default_factory=list)
    noise_floor: bool | None = None
    name: str = ""


@dataclass(frozen=True)
class StudyPlan:
    """What a start will make."""

    config: TrainConfig
    kind: str
    vary: dict[str, list[Any]]
    seeds: list[int]
    noise_floor: bool
    name: str
    cells: list[Cell]
    estimate: StudyEstimate
    # What of `vary` the kind does not say by itself.
    said: dict[str, list[Any]] = field(default_factory=dict)
    # What this model's layers leave out of it.
    notes: list[str] = field(default_factory=list)

    def check_fits(self, *, skip: bool, way_out: str) -> None:
        """Raises ConfigError where a run would not fit, unless the others are to be trained and some fit. `way_out`: how to ask
        for that."""
        problems = self.estimate.problems()
        if not self.estimate.fitting:
            raise ConfigError(*problems, "no run of the study fits the memory; lower what it needs")
        if problems and not skip:
            raise ConfigError(*problems, f"lower what they need, or go on without {way_out}")

    def create(self, settings: Settings, *, token: str | None = None) -> Study:
        """The study of what fits, not started yet; while such a one is under way, that one. Raises LabError."""
        return StudyStore(settings).create(
            self.config,
            self.vary,
            seeds=self.seeds,
            noise_floor=self.noise_floor,
            kind=self.kind,
            name=self.name,
            only=self.estimate.fitting,
            token=token,
        )


def plan(wanted: Wanted, config: TrainConfig, facts: Facts, paces: Sequence[Pace]) -> StudyPlan:
    """`config` and `facts` as of a single run. Raises ConfigError with all that is wrong."""
    kind, shape = KINDS.get(wanted.kind), facts.architecture
    said = {name: values for name, values in wanted.vary.items() if kind is None or kind.vary.get(name) != values}
    notes = fill_notes(wanted.vary, shape) if shape else []
    vary = filled(wanted.vary, shape) if shape else wanted.vary
    floor = wanted.noise_floor if wanted.noise_floor is not None else bool(kind and kind.noise_floor)
    name = wanted.name.strip() or config.run_name()
    made = cells(config, vary, seeds=wanted.seeds, noise_floor=floor, name=name)
    estimate = estimate_study(facts, made, paces)
    named = wanted.kind if kind else GRID
    return StudyPlan(config, named, vary, wanted.seeds, floor, name, made, estimate, said, notes)


# -- values of a setting as text


def values_of(name: str, text: str) -> list[Any]:
    """ "4, 8" -> [4, 8]; of a list of names, one value is written with + between them. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [converted(TrainConfig, name, part.split("+") if "+" in part else part) for part in parts]


def vary_option(name: str, values: Sequence[Any]) -> str:
    """As --vary takes it: "rank=4,8"."""
    return f"{name}={','.join(map(_word, values))}"


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) or "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
