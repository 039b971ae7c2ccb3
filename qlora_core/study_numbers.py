"""StudyResults -> the figures that charts, verdicts and tables rest on: arms, pairs, intervals. Draws and judges nothing."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core import events
from qlora_core.run_status import FINISHED
from qlora_core.study_results import StudyResults, StudyRun
from qlora_core.wording import METHOD_NAMES

# Settings that say how a QLoRA run holds its base; a LoRA run ignores them, so a pair may differ in them.
OF_QLORA = ("method", "quant_type", "double_quant", "quantize_modules", "int8_modules")
# The only part of an estimate whose run did not tell the parts.
WHOLE = "estimate, parts not recorded"
# A difference in evaluation loss that nobody would notice: 1 % of perplexity.
LOSS_NEAR = 0.01
# Above this cosine two updates count as nearly equal (issue 6).
NEARLY_EQUAL = 0.95
# Differences of losses are rounded before they meet a threshold.
ROUNDING = 1e-9
# What chance alone changes: roles of the runs of a noise floor, and kinds of their comparisons.
FLOORS = ("other row order", "other seed")
# Student's t, two-sided 95 %, for 1 to 20 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting of a study with its runs, one a seed, in whatever state they are."""

    label: str
    varied: dict[str, Any]
    runs: tuple[StudyRun, ...]

    @property
    def finished(self) -> tuple[StudyRun, ...]:
        """Runs whose figures count. One that was stopped has seen fewer rows than the others."""
        return tuple(run for run in self.runs if run.state == FINISHED and run.result is not None)

    @property
    def method(self) -> str | None:
        """ "lora" or "qlora"; None where every run of the arm was deleted and the study varied something else."""
        found = next((run.config.method for run in self.runs if run.config), None)
        return found or self.varied.get("method")

    @property
    def rank(self) -> int | None:
        found = next((run.config.rank for run in self.runs if run.config), None)
        return found or self.varied.get("rank")

    def values(self, of: Callable[[StudyRun], float | None]) -> dict[int, float]:
        """seed -> what `of` gives, of the finished runs that have it."""
        return {run.seed: value for run in self.finished if (value := of(run)) is not None}

    def mean(self, of: Callable[[StudyRun], float | None]) -> float | None:
        values = self.values(of).values()
        return statistics.fmean(values) if values else None

    @property
    def gap(self) -> str | None:
        """Why no figure of the arm can be shown, in a word or two; None where one can."""
        if self.finished:
            return None
        return " and ".join(dict.fromkeys(run.state for run in self.runs)) or "not run"


def arms(results: StudyResults) -> list[Arm]:
    """In the order of the grid."""
    return [Arm(label=runs[0].label or "as set", varied=runs[0].varied, runs=runs) for runs in results.arms() if runs]


def losses(arm: Arm) -> dict[int, float]:
    """seed -> evaluation loss of the adapter that was kept, nats a token."""
    return arm.values(lambda run: run.eval_loss)


def measured(name: str) -> Callable[[StudyRun], float | None]:
    """A field of result.json's train_info, for `Arm.values`."""
    return lambda run: (run.result or {}).get("train_info", {}).get(name)


def memory_kinds(found: Iterable[Arm]) -> list[str]:
    """The kinds of memory that were measured, "GPU" first; figures of two kinds are never compared."""
    kinds = {run.memory_kind for arm in found for run in arm.finished if run.memory_kind}
    return sorted(kinds)


def memory_kind(arm: Arm) -> str | None:
    return next((run.memory_kind for run in arm.finished if run.memory_kind), None)


def estimated_parts(arm: Arm) -> dict[str, int]:
    """Bytes by part of the plan that the arm's first finished run began with; only the sum where it did not tell the parts."""
    begun = next((run.started for run in arm.finished if run.started), None)
    if begun is None:
        return {}
    return begun.estimated_parts or {WHOLE: begun.estimated_peak_bytes}


def is_16_bit(arm: Arm) -> bool:
    """Whether nothing of the arm's base is quantised."""
    return arm.method == "lora" or (_names(arm, "quantize_modules") == [] and _names(arm, "int8_modules") == [])


def is_whole(arm: Arm) -> bool:
    """Whether all of the arm's base is in 4 bits that can be."""
    return _names(arm, "quantize_modules") in (["all"], ["all-linear"]) and _names(arm, "int8_modules") == []


def _names(arm: Arm, field: str) -> list[str]:
    config = next((run.config for run in arm.runs if run.config), None)
    given = arm.varied.get(field, getattr(config, field, None))
    given = ("all" if field == "quantize_modules" else []) if given is None else given
    return [] if given == "none" else [given] if isinstance(given, str) else list(given)


# -- pairs of methods


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A LoRA and a QLoRA arm that differ in nothing else that counts."""

    lora: Arm
    qlora: Arm

    @property
    def label(self) -> str:
        """What both have in common, such as "rank 8"; empty where the method is all that varies."""
        return self.qlora.label.removeprefix(METHOD_NAMES["qlora"]).lstrip(", ")


def pairs(found: Sequence[Arm]) -> list[Pair]:
    """Each QLoRA arm with the LoRA arm of equal other settings."""
    common = {id(arm): {k: v for k, v in arm.varied.items() if k not in OF_QLORA} for arm in found}
    return [
        Pair(lora=lora, qlora=qlora)
        for qlora in found
        if qlora.method == "qlora"
        for lora in [next((a for a in found if a.method == "lora" and common[id(a)] == common[id(qlora)]), None)]
        if lora is not None
    ]


def differences(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """second - first of each seed that both have: a seed's rows and start are then no part of the difference."""
    return [second[seed] - first[seed] for seed in first if seed in second]


def step_ratios(pair: Pair) -> list[tuple[int, float]]:
    """[(tokens of the step, seconds of QLoRA / seconds of LoRA)], of steps in which both learnt from as many tokens.

    Runs of one seed see the same rows in the same step. The first steps, which warm up, are left out.
    """
    found = []
    for seed in pair.lora.values(lambda run: run.step_seconds):
        first, second = (
            {
                step.step: step
                for run in arm.finished
                if run.seed == seed
                for step in events.timed_steps(list(run.steps))
            }
            for arm in (pair.lora, pair.qlora)
        )
        found += [
            (step.tokens, second[number].step_seconds / step.step_seconds)
            for number, step in first.items()
            if number in second and second[number].tokens == step.tokens and step.step_seconds > 0
        ]
    return sorted(found)


# -- how sure


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean of `count` values with its 95 % interval; of one value there is none."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def excludes(self, value: float) -> bool:
        return self.low is not None and not self.low <= value <= self.high

    def to_json(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def spread(values: Sequence[float]) -> Spread | None:
    """95 % interval of the mean by Student's t (Student 1908); None without a value."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Spread(mean=mean, low=None, high=None, count=1)
    half = t_95(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Spread(mean=mean, low=mean - half, high=mean + half, count=count)


def t_95(freedom: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table by the first term of its expansion about the normal one."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom)


def same_evaluation_rows(runs: Iterable[StudyRun]) -> bool:
    """Whether all were evaluated on the same rows: without an evaluation file another seed holds out others."""
    found = {
        run.result["run_info"].get("dataset", {}).get("eval_fingerprint") for run in runs if run.result is not None
    }
    return len(found) <= 1


def floor_differences(results: StudyResults, found: Sequence[Arm]) -> dict[str, list[float]]:
    """role -> |difference in evaluation loss| between a LoRA arm's first seed and its runs that only chance makes other."""
    noise: dict[str, list[float]] = {}
    for run in results.runs:
        if run.role == "arm" or run.state != FINISHED or run.eval_loss is None:
            continue
        arm = next((arm for arm in found if arm.varied == run.varied), None)
        first = next((one for one in arm.finished if one.seed == results.seeds[0]), None) if arm else None
        if first and first.eval_loss is not None and same_evaluation_rows((first, run)):
            noise.setdefault(run.role, []).append(abs(run.eval_loss - first.eval_loss))
    return noise


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike LoRA's and QLoRA's updates are, of one pair of arms. `pairs`: Analysis.similarity's entries, one a seed, the first
    seed's first; `floors`: what chance alone leaves, "other row order" and "other seed" -> the entry."""

    label: str
    pairs: tuple[dict[str, Any], ...]
    floors: dict[str, dict[str, Any]]

    @property
    def cosines(self) -> list[float]:
        """Of all matrices together, one a seed."""
        return [pair["overall"]["cosine"] for pair in self.pairs]


def likenesses(results: StudyResults) -> list[Likeness]:
    """LoRA against QLoRA, by what both have in common; empty before the analysis."""
    if results.analysis is None:
        return []
    runs = {run.run_id: run for run in results.runs}
    groups: dict[str, list[dict[str, Any]]] = {}
    for pair in results.analysis.similarity:
        if pair["kind"] == "lora-qlora":
            known = [run for run in (runs.get(pair["first"]), runs.get(pair["second"])) if run]
            qlora = next((run.label for run in known if run.config and run.config.method == "qlora"), pair["label"])
            groups.setdefault(f"{METHOD_NAMES['lora']} – {qlora}", []).append(pair)
    found = []
    for label, pairs_of in groups.items():
        of_pairs = {run_id for pair in pairs_of for run_id in (pair["first"], pair["second"])}
        floors = [one for one in results.analysis.similarity if one["kind"] in FLOORS]
        own = {one["kind"]: one for one in floors if {one["first"], one["second"]} & of_pairs}
        found.append(
            Likeness(label=label, pairs=tuple(pairs_of), floors={kind: own[kind] for kind in FLOORS if kind in own})
        )
    return found


def mean_error(entries: Iterable[Mapping[str, Any]]) -> float:
    """Mean relative error of matrices, each weighed by its parameters."""
    entries = list(entries)
    return sum(e["relative_error"] * e["parameters"] for e in entries) / sum(e["parameters"] for e in entries)


# -- what no other arm beats


def undominated(found: Sequence[Arm]) -> set[str]:
    """Labels of arms that no other one beats in memory, time and loss at once (Pareto), of arms that have all three."""
    points = {}
    for arm in found:
        values = tuple(arm.mean(of) for of in (lambda r: r.peak_bytes, lambda r: r.step_seconds, lambda r: r.eval_loss))
        if None not in values:
            points[arm.label] = values

    def beats(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
        return first != second and all(a <= b for a, b in zip(first, second, strict=True))

    return {label for label, point in points.items() if not any(beats(other, point) for other in points.values())}
