"""H1 adapters nearly equal, H2 matrices differ in sensitivity, H3 a minimum rank, and whether the answers are alike."""

import statistics
from collections.abc import Sequence
from typing import Any

from qlora_core.data.rows import counted
from qlora_core.study_hypotheses import Knee, knees, sensitivity
from qlora_core.study_numbers import FLOORS, LOSS_NEAR, NEARLY_EQUAL, Arm, Likeness, likenesses, mean_error
from qlora_core.study_results import StudyResults
from qlora_core.verdicts.verdict import NO, UNCLEAR, YES, Verdict, between, capital, listed, signed, sureness

# Below this probability chance is no explanation.
RARE = 0.05
H1 = "H1: LoRA and QLoRA learn nearly the same adapter"
H2 = "H2: some matrices bear 4 bits worse than others"
H3 = "H3: there is a minimum rank r*, below which quality falls sharply"


def adapters_equal(results: StudyResults) -> list[Verdict]:
    """H1, by the cosine of the whole updates and by what chance alone leaves of it."""
    if results.analysis is None:
        return []
    found = likenesses(results)
    if not found:
        reasons = dict.fromkeys(one["reason"] for one in results.analysis.refused)
        if not reasons:
            return []
        return [
            Verdict(
                title=H1, sentence=f"Not compared: {'; '.join(reasons)}.", holds=UNCLEAR, sureness="low: nothing was compared",
                rests_on="the settings of the adapters",
            )
        ]  # fmt: skip
    by_holds: dict[str, list[Likeness]] = {}
    for one in found:
        by_holds.setdefault(_nearly_equal(one), []).append(one)
    holds = next(iter(by_holds)) if len(by_holds) == 1 else UNCLEAR
    sentence = " ".join(_told(some) for some in by_holds.values())
    if holds == YES:
        sentence += " By its adapter QLoRA is preferable wherever it saves memory."
    return [
        Verdict(
            title=H1,
            sentence=sentence,
            holds=holds,
            sureness=_how_sure(results, found),
            numbers={
                one.label: {
                    "cosine": one.cosines,
                    "relative_difference": [pair["overall"]["relative"] for pair in one.pairs],
                }
                | {f"cosine, {kind}": floor["overall"]["cosine"] for kind, floor in one.floors.items()}
                | {"lowest": min(one.pairs[0]["modules"], key=lambda module: module["cosine"], default=None)}
                for one in found
            },
            rests_on=f"the learnt updates (scaling x B·A) of {counted(sum(len(one.pairs) for one in found), 'pair')} of runs, all "
            "matrices together",
        )
    ]


def _how_sure(results: StudyResults, found: Sequence[Likeness]) -> str:
    seeds, has_floor = min(len(one.pairs) for one in found), any(one.floors for one in found)
    of_seeds = "one seed" if seeds == 1 else f"{seeds} seeds"
    if results.differences:
        return "low: the runs are not quite comparable"
    if not has_floor:
        return f"low: {of_seeds} and no noise floor; how alike two LoRA runs are is not known"
    return f"moderate: {of_seeds}, judged by a noise floor"


def _nearly_equal(one: Likeness) -> str:
    mean, floor = statistics.fmean(one.cosines), _floor(one)
    if mean > NEARLY_EQUAL:
        return YES
    return UNCLEAR if floor is not None and mean >= floor[1] else NO


def _told(some: Sequence[Likeness]) -> str:
    """A sentence on pairs of which the same holds, with the range of their cosines."""
    cosines = [cosine for one in some for cosine in one.cosines]
    side = "above" if min(cosines) > NEARLY_EQUAL else "not above" if max(cosines) <= NEARLY_EQUAL else "around"
    said = (
        f"{some[0].label if len(some) == 1 else f'{len(some)} pairs'}: cosine {_range(cosines)}, {side} {NEARLY_EQUAL}"
    )
    by_kind = {kind: [one.floors[kind]["overall"]["cosine"] for one in some if kind in one.floors] for kind in FLOORS}
    reached = [f"{_range(values)} with an{kind}" for kind, values in by_kind.items() if values]
    if not reached:
        return f"{said}; how alike two LoRA runs are was not measured."
    judged = [
        (kind, statistics.fmean(one.cosines) >= cosine) for one in some if _floor(one) for kind, cosine in [_floor(one)]
    ]
    within, chance = [inside for _, inside in judged], f"an{judged[0][0]}"
    so = "no more than" if all(within) else "more than" if not any(within) else "in part more than"
    return f"{said}; two LoRA runs reach {listed(reached)}, so 4 bits changed {so} {chance} does."


def _floor(one: Likeness) -> tuple[str, float] | None:
    """The fairest there is: another row order leaves the adapter's start as it was, as 4 bits do; another seed does not."""
    return next(((kind, one.floors[kind]["overall"]["cosine"]) for kind in FLOORS if kind in one.floors), None)


def _range(values: Sequence[float]) -> str:
    return between([f"{min(values):.3f}", f"{max(values):.3f}"])


def matrices_differ(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    """H2, by the evaluation loss where the study varied what is quantised; else by rounding errors, and labelled so."""
    measured = sensitivity(found)
    if measured is None:
        return _by_rounding(results)
    ranked = [
        f"{label} {signed(cost.mean)}"
        + (f" ({signed(cost.low)} to {signed(cost.high)})" if cost.low is not None else "")
        for label, cost in measured.costs.items()
    ]
    costs = [cost.mean for cost in measured.costs.values()]
    spread_of_costs = max(costs) - min(costs)
    if measured.chance is None:
        holds = UNCLEAR if len(costs) < 2 or spread_of_costs > LOSS_NEAR else NO
        why = "With one seed the order may be chance." if len(costs) > 1 else "One group alone has no order."
    elif measured.chance < RARE:
        holds, why = YES, f"Chance would do so with a probability of {measured.chance:.2g}."
    else:
        holds = NO if spread_of_costs <= LOSS_NEAR else UNCLEAR
        why = f"Chance would do so with a probability of {measured.chance:.2g}, which is not rare."
    whole = f" All of them in 4 bits: {signed(measured.whole.mean)}." if measured.whole else ""
    return [
        Verdict(
            title=H2,
            sentence=f"Evaluation loss above that of {measured.reference}, most sensitive first: {listed(ranked)}. {why}{whole}",
            holds=holds,
            sureness=sureness(results, found, has_floor=False),
            numbers={
                "reference": measured.reference,
                "loss_added": {label: cost.to_json() for label, cost in measured.costs.items()},
                "all": measured.whole.to_json() if measured.whole else None,
                "chance": measured.chance,
            },
            rests_on=f"evaluation loss of {counted(len(costs), 'group')}, each quantised alone; 95 % intervals over seeds "
            "(Student), a permutation test within seeds",
        )
    ]


def _by_rounding(results: StudyResults) -> list[Verdict]:
    entries = results.analysis.quantisation if results.analysis else ()
    if not entries:
        return []
    kind = next(
        (name for name in ("nf4", "fp4", "int8") if any(entry["type"] == name for entry in entries)), entries[0]["type"]
    )
    names = dict.fromkeys(entry["module"] for entry in entries if entry["type"] == kind)
    errors = {name: mean_error(e for e in entries if e["module"] == name and e["type"] == kind) for name in names}
    ranked = sorted(errors, key=lambda name: -errors[name])
    shown = listed(f"{name} {100 * errors[name]:.1f} %" for name in ranked)
    return [
        Verdict(
            title=H2,
            sentence=f"Not measured by loss. By the rounding error of the weights in {kind} alone: {shown} of their norm. A larger "
            "error need not cost loss; a study of quantize_modules measures that.",
            holds=UNCLEAR,
            sureness="low: rounding errors say nothing of loss",
            numbers={"type": kind, "relative_error": {name: errors[name] for name in ranked}},
            rests_on=f"the {sum(e['type'] == kind for e in entries)} matrices of the base that are quantised, rounded and compared",
        )
    ]


def minimum_rank(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    """H3, for each method whose ranks were varied."""
    known = knees(results, found)
    if not known:
        return []
    judged = {knee.label: _judged(knee) for knee in known}
    kinds = {holds for holds, _ in judged.values()}
    return [
        Verdict(
            title=H3,
            sentence=" ".join(sentence for _, sentence in judged.values()),
            holds=kinds.pop() if len(kinds) == 1 else UNCLEAR,
            sureness=sureness(results, [arm for arm in found if "rank" in arm.varied]),
            numbers={
                knee.label or "all": {
                    "rank": knee.rank, "interval_95": knee.interval, "loss": knee.losses, "best": knee.best,
                    "next_lower_rank_is_worse_by": knee.below, "tolerance": knee.tolerance, "seeds": knee.seeds,
                }
                for knee in known
            },
            rests_on="the smallest rank whose evaluation loss is within one standard error of the best's, seed by seed (Breiman "
            f"et al. 1984), and at least {LOSS_NEAR:g} nats; its interval by a bootstrap over seeds (Efron and Tibshirani 1993)",
        )
    ]  # fmt: skip


def _judged(knee: Knee) -> tuple[str, str]:
    name = f"{knee.label}: " if knee.label else ""
    ranks = f"ranks {listed(map(str, knee.losses))}"
    if knee.interval is None:
        within = "one seed gives no interval"
    elif knee.interval[0] == knee.interval[1]:
        within = f"95 % interval {knee.interval[0]} alone, of {counted(knee.seeds, 'seed')}"
    else:
        within = f"95 % interval {knee.interval[0]} to {knee.interval[1]}, of {counted(knee.seeds, 'seed')}"
    equal = f"{knee.tolerance:.3f} nats ({knee.tolerance_from})"
    if knee.is_lowest:
        said = f"{name}no such rank among {ranks}: {knee.rank} is as good as the best within {equal}; {within}."
        return (NO if knee.interval is None or knee.interval[1] == knee.rank else UNCLEAR), said
    below = f"the next lower rank is worse by {knee.below:.3f}"
    if len(knee.losses) < 3:
        return UNCLEAR, f"{name}of {ranks}, {below}; two ranks show no bend."
    if knee.is_highest:
        return (
            UNCLEAR,
            f"{name}still falling at rank {knee.rank}, the highest of {ranks}: {below}, so r* may be higher; {within}.",
        )
    sure = knee.interval is None or knee.interval[0] > min(knee.losses)
    said = f"{name}r* is {knee.rank} of {ranks} ({within}): {below}, and no higher rank gains more than {equal}."
    return (YES if sure else UNCLEAR), said


def answers_alike(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    """Whether LoRA's and QLoRA's answers are the same, with intervals, and how far each is from the base."""
    behaviour = results.analysis.behaviour if results.analysis else None
    if not behaviour or not behaviour["pairs"]:
        return []
    methods = {run.run_id: arm.method for arm in found for run in arm.runs}
    both = [p for p in behaviour["pairs"] if {methods.get(p["first"]), methods.get(p["second"])} == {"lora", "qlora"}]
    if not both:
        return []
    labels = {source: one.get("label") or source for source, one in behaviour["sources"].items()}
    cosines = [pair for pair in both if pair.get("embedding_cosine") is not None]
    if cosines and all(pair["embedding_cosine_95"][0] > NEARLY_EQUAL for pair in cosines):
        holds = YES
    elif cosines and all(pair["embedding_cosine_95"][1] < NEARLY_EQUAL for pair in cosines):
        holds = NO
    else:
        holds = UNCLEAR
    sentences = [f"{labels[pair['first']]} and {labels[pair['second']]}: {_agreement(pair)}." for pair in both]
    bases = [p for p in behaviour["pairs"] if "base" in (p["first"], p["second"]) and p not in both]
    against = [
        f"{labels[p['first'] if p['second'] == 'base' else p['second']]} {100 * p['token_match']:.0f} %" for p in bases
    ]
    if against:
        sentences.append(f"Tokens equal to those of the untuned base: {listed(against)}.")
    return [
        Verdict(
            title="LoRA and QLoRA answer alike",
            sentence=capital(" ".join(sentences)),
            holds=holds,
            sureness=f"moderate: one seed, {counted(both[0]['rows'], 'row')}"
            if both[0]["rows"] >= 30
            else "low: few rows",
            numbers={"pairs": behaviour["pairs"], "sources": behaviour["sources"]},
            rests_on=f"greedy answers to {counted(both[0]['rows'], 'held-out row')}; alike: an embedding cosine whose interval "
            f"lies above {NEARLY_EQUAL}",
        )
    ]


def _agreement(pair: dict[str, Any]) -> str:
    low, high = pair["token_match_95"]
    said = (
        f"{100 * pair['token_match']:.0f} % of tokens are equal (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    )
    if pair.get("embedding_cosine") is None:
        return said
    low, high = pair["embedding_cosine_95"]
    return said + f", embedding cosine {pair['embedding_cosine']:.3f} ({low:.3f} to {high:.3f})"
