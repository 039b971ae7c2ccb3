"""The minimum rank, and which matrices bear 4 bits worst: estimates with intervals over seeds. Draws and judges nothing."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.study_numbers import (
    LOSS_NEAR,
    ROUNDING,
    Arm,
    Spread,
    differences,
    floor_differences,
    is_16_bit,
    is_whole,
    losses,
    spread,
)
from qlora_core.study_results import StudyResults

BOOTSTRAPS, PERMUTATIONS, RANDOM_SEED = 2000, 5000, 0

# -- the minimum rank


@dataclass(frozen=True, kw_only=True)
class Knee:
    """The smallest rank whose loss is as good as the best, of one method (`label`).

    `losses`: rank -> mean over `seeds` seeds. `tolerance` in nats: what counts as equal, and `tolerance_from` why so much.
    `below`: by how much the next lower rank is worse than r*, None where r* is the lowest that was tried. `interval`: 95 % of
    the ranks that a bootstrap over seeds gives; None with one seed.
    """

    label: str
    losses: dict[int, float]
    seeds: int
    rank: int
    best: int
    tolerance: float
    tolerance_from: str
    below: float | None
    interval: tuple[int, int] | None

    @property
    def is_lowest(self) -> bool:
        return self.rank == min(self.losses)

    @property
    def is_highest(self) -> bool:
        return self.rank == max(self.losses)


def knees(results: StudyResults, found: Sequence[Arm]) -> list[Knee]:
    """One for each combination of the other settings under which at least two ranks were measured."""
    noise = max((value for values in floor_differences(results, found).values() for value in values), default=None)
    groups: dict[str, list[Arm]] = {}
    for arm in found:
        if "rank" in arm.varied and losses(arm):
            groups.setdefault(label_without_rank(arm), []).append(arm)
    return [
        knee(label, {arm.rank: losses(arm) for arm in group}, noise)
        for label, group in groups.items()
        if len(group) > 1
    ]


def label_without_rank(arm: Arm) -> str:
    return ", ".join(part for part in arm.label.split(", ") if part != f"rank {arm.varied.get('rank')}")


def knee(label: str, by_rank: dict[int, dict[int, float]], noise: float | None) -> Knee:
    """The one-standard-error rule (Breiman et al. 1984, Classification and Regression Trees, 3.4.3): the smallest model whose
    loss is within one standard error of the best's, here of their difference seed by seed, and at least LOSS_NEAR.

    With one seed the error cannot be had from the seeds: `noise`, the difference that chance alone made, stands in. The
    interval is a percentile bootstrap over seeds (Efron and Tibshirani 1993, chapter 13).
    """
    ranks = sorted(by_rank)
    seeds = sorted(set.intersection(*(set(by_rank[rank]) for rank in ranks)))
    if not seeds:  # every rank has lost another seed: means of what there is, without a pairing
        table = np.array([[statistics.fmean(by_rank[rank].values())] for rank in ranks])
    else:
        table = np.array([[by_rank[rank][seed] for seed in seeds] for rank in ranks])
    count = table.shape[1]
    best = int(table.mean(axis=1).argmin())
    tolerance, why = LOSS_NEAR, "too little to notice"
    if count > 1:
        errors = np.delete((table - table[best]).std(axis=1, ddof=1), best) / math.sqrt(count)
        error = float(np.sqrt((errors**2).mean()))
        if error > tolerance:
            tolerance, why = error, f"the standard error over {count} seeds"
    elif noise is not None and noise > tolerance:
        tolerance, why = noise, "what another seed or row order alone changed"
    place = _smallest_as_good(table.mean(axis=1), tolerance)
    interval = None
    if count > 1:
        drawn = np.random.default_rng(RANDOM_SEED).integers(count, size=(BOOTSTRAPS, count))
        places = [_smallest_as_good(table[:, draw].mean(axis=1), tolerance) for draw in drawn]
        low, high = np.quantile(places, (0.025, 0.975), method="inverted_cdf")
        interval = (ranks[int(low)], ranks[int(high)])
    means = dict(zip(ranks, table.mean(axis=1).tolist(), strict=True))
    return Knee(
        label=label,
        losses=means,
        seeds=count,
        rank=ranks[place],
        best=ranks[best],
        tolerance=tolerance,
        tolerance_from=why,
        below=means[ranks[place - 1]] - means[ranks[place]] if place else None,
        interval=interval,
    )


def _smallest_as_good(means: np.ndarray, tolerance: float) -> int:
    return int(np.argmax(means <= means.min() + tolerance + ROUNDING))


# -- what each group of matrices costs in 4 bits


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Groups of matrices by what quantising each alone adds to the evaluation loss, the most sensitive first.

    `reference`: the label of the arm whose base is all in 16 bits. `whole`: what quantising everything adds; None where that was
    not measured. `chance`: probability of so large differences between groups if they were all alike (a permutation test
    within seeds); None with one seed or one group.
    """

    reference: str
    costs: dict[str, Spread]
    whole: Spread | None
    chance: float | None


def sensitivity(found: Sequence[Arm]) -> Sensitivity | None:
    """From a study that varies which matrices are quantised; None from another, or where the arm in 16 bits is missing."""
    varied = [arm for arm in found if losses(arm) and "quantize_modules" in arm.varied]
    reference = next((arm for arm in found if is_16_bit(arm) and losses(arm)), None)
    if reference is None or not varied:
        return None
    costs = {arm.label: differences(losses(reference), losses(arm)) for arm in varied if not is_16_bit(arm)}
    costs = {label: values for label, values in costs.items() if values}
    whole = next((costs.pop(arm.label) for arm in varied if arm.label in costs and is_whole(arm)), [])
    if not costs:
        return None
    # A block of the test is a seed that every group has.
    seeds = set.intersection(*(set(losses(arm)) for arm in [reference, *(a for a in varied if a.label in costs)]))
    blocks = [[losses(arm)[s] - losses(reference)[s] for s in sorted(seeds)] for arm in varied if arm.label in costs]
    known = {label: one for label, values in costs.items() if (one := spread(values))}
    return Sensitivity(
        reference=reference.label,
        costs=dict(sorted(known.items(), key=lambda item: -item[1].mean)),
        whole=spread(whole),
        chance=_chance(np.array(blocks)),
    )


def _chance(table: np.ndarray) -> float | None:
    """Permutation test of a randomised block design (Fisher 1935): labels of groups are shuffled within each seed.

    `table` [groups, seeds]; the statistic is the variance of the groups' means.
    """
    groups, seeds = table.shape if table.ndim == 2 else (0, 0)
    if groups < 2 or seeds < 2:
        return None
    random = np.random.default_rng(RANDOM_SEED)
    shuffled = random.permuted(np.repeat(table[None], PERMUTATIONS, axis=0), axis=1)
    spread_of_means = shuffled.mean(axis=2).var(axis=1)
    # Equal up to rounding counts as equal, and the real order is one of the possible ones.
    as_large = int((spread_of_means >= table.mean(axis=1).var() * (1 - 1e-12)).sum())
    return (1 + as_large) / (1 + PERMUTATIONS)
