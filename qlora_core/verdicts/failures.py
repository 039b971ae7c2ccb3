"""What went wrong, by its name: a rank too low, a sensitive layer, data that do not match, runs that are missing."""

import statistics
from collections.abc import Sequence

from qlora_core.data.rows import counted
from qlora_core.run_status import ACTIVE, FINISHED
from qlora_core.study_hypotheses import Knee, knees, sensitivity
from qlora_core.study_numbers import LOSS_NEAR, Arm, likenesses
from qlora_core.study_results import StudyResults, StudyRun
from qlora_core.verdicts.verdict import NO, UNCLEAR, YES, Verdict, listed, signed, sureness

# How far an evaluation loss rises again before that is more than its wavering.
RISEN = 2 * LOSS_NEAR
# Of the steps, what begins and ends a run.
END = 0.1
# A layer stands out whose adapters 4 bits drew apart by so much more than chance did, and by several times what is usual.
APART, TIMES_USUAL = 0.1, 3


def failure_modes(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    """A verdict for each mode that is seen; one that says so where none is, with what could not be looked for."""
    seen = [*_rank_too_low(results, found), *_sensitive_layer(results, found), *_data_mismatch(results, found)]
    if seen or not any(arm.finished for arm in found):
        return seen
    looked, not_looked = [], []
    for name, possible in (
        ("rank too low", bool(knees(results, found))),
        (
            "sensitive layer",
            sensitivity(found) is not None or bool(likenesses(results)),
        ),
        ("data mismatch", any(len(run.evaluations) > 1 for arm in found for run in arm.finished)),
    ):
        (looked if possible else not_looked).append(name)
    sentence = f"Not seen: {listed(looked)}." if looked else ""
    sentence += f" Not looked for, as this study did not measure it: {listed(not_looked)}." if not_looked else ""
    return [
        Verdict(
            title="A known failure is seen",
            sentence=sentence.strip(),
            holds=NO if looked else UNCLEAR,
            sureness=sureness(results, found),
            rests_on="losses of the finished runs, and the analysis of their adapters",
        )
    ]


def _rank_too_low(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    low = [knee for knee in knees(results, found) if not knee.is_lowest]
    if not low:
        return []
    return [
        Verdict(
            title="Failure: rank too low",
            sentence=" ".join(map(_too_low, low)),
            holds=YES,
            sureness=sureness(results, [arm for arm in found if "rank" in arm.varied]),
            numbers={knee.label or "all": {"rank": knee.rank, "loss": knee.losses} for knee in low},
            rests_on="evaluation loss by rank",
        )
    ]


def _too_low(knee: Knee) -> str:
    best = knee.losses[knee.best]
    worse = [f"rank {rank} by {signed(loss - best)}" for rank, loss in knee.losses.items() if rank < knee.rank]
    said = f"{knee.label + ': ' if knee.label else ''}too low is {listed(worse)} above the best"
    return said + (f"; rank {knee.rank} may be too, higher ones were not tried." if knee.is_highest else ".")


def _sensitive_layer(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    measured = sensitivity(found)
    if measured:
        label, cost = next(iter(measured.costs.items()))
        if cost.mean > LOSS_NEAR and (cost.low is None or cost.low > 0):
            return [
                Verdict(
                    title="Failure: sensitive layer",
                    sentence=f"{label} costs {signed(cost.mean)} evaluation loss, more than any other group: keep it in int8 or 16 "
                    "bits (int8_modules, quantize_modules).",
                    holds=YES,
                    sureness=sureness(results, found, has_floor=False),
                    numbers={label: cost.to_json()},
                    rests_on="evaluation loss with this group alone in 4 bits",
                )
            ]
    apart = _layers_apart(results)
    if not apart:
        return []
    shown = listed(f"layer {layer} (cosine {own:.2f}, by chance {floor:.2f})" for layer, (own, floor) in apart.items())
    return [
        Verdict(
            title="Failure: sensitive layer",
            sentence=f"4 bits drew the adapters apart most in {shown}. A study of quantize_modules "
            "measures what that costs.",
            holds=UNCLEAR,
            sureness="low: one seed, and no loss was measured",
            numbers={str(layer): {"cosine": own, "floor": floor} for layer, (own, floor) in apart.items()},
            rests_on="cosine similarity by layer, against that of LoRA with another row order",
        )
    ]


def _layers_apart(results: StudyResults) -> dict[int, tuple[float, float]]:
    """layer -> (cosine of LoRA and QLoRA, cosine that another row order leaves), where they lie far apart; at most three."""
    gaps: dict[int, tuple[float, float]] = {}
    for one in likenesses(results):
        pair, floor = one.pairs[0], one.floors.get("other row order")
        if floor is None:
            continue
        own, chance = ({layer: [] for layer in {m["layer"] for m in entry["modules"]}} for entry in (pair, floor))
        for entry, into in ((pair, own), (floor, chance)):
            for module in entry["modules"]:
                into[module["layer"]].append(module["cosine"])
        means = {
            layer: (statistics.fmean(own[layer]), statistics.fmean(chance[layer]))
            for layer in own
            if layer is not None and layer in chance
        }
        usual = statistics.median(floor - own for own, floor in means.values()) if means else 0.0
        for layer, (mine, theirs) in means.items():
            gap = theirs - mine
            if gap > max(APART, TIMES_USUAL * usual) and gap > (
                gaps[layer][1] - gaps[layer][0] if layer in gaps else 0
            ):
                gaps[layer] = mine, theirs
    return dict(sorted(gaps.items(), key=lambda item: item[1][0] - item[1][1])[:3])


def _data_mismatch(results: StudyResults, found: Sequence[Arm]) -> list[Verdict]:
    seen = {arm.label: said for arm in found for run in arm.finished[:1] if (said := mismatch(run))}
    if not seen:
        return []
    shown = dict(list(seen.items())[:3])
    more = f" So are {counted(len(seen) - 3, 'other arm')}." if len(seen) > 3 else ""
    return [
        Verdict(
            title="Failure: data mismatch",
            sentence=" ".join(f"{label}: {said}." for label, said in shown.items()) + more,
            holds=YES,
            sureness=sureness(results, found),
            numbers={"arms": list(seen)},
            rests_on="training and evaluation losses of the first finished run of each arm",
        )
    ]


def mismatch(run: StudyRun) -> str | None:
    """What does not match in the losses of a run, and the remedy; None where nothing does."""
    if len(run.evaluations) < 2 or not run.steps:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    lowest = min(run.evaluations, key=lambda one: one.loss)
    falls = fell([step.loss for step in run.steps]) > LOSS_NEAR
    kept = run.eval_loss if run.eval_loss is not None else last.loss
    if first.step == 0 and kept >= first.loss:
        said = f"the base was better: evaluation loss {first.loss:.3f} before, {kept:.3f} after"
        return said + (
            "; training rows and evaluation rows differ in kind, or the learning rate is too high" if falls else ""
        )
    if falls and last.loss - lowest.loss > RISEN:
        return (
            f"evaluation loss rises from {lowest.loss:.3f} at step {lowest.step} to {last.loss:.3f} while training loss falls: "
            "rows are "
            "learnt by heart, or evaluation rows differ in kind; train fewer steps (final_adapter best), or on more rows"
        )
    return None


def fell(values: Sequence[float]) -> float:
    """By how much the mean of the last tenth lies below that of the first."""
    some = max(1, int(len(values) * END))
    return statistics.fmean(values[:some]) - statistics.fmean(values[-some:])


def missing(results: StudyResults) -> list[Verdict]:
    """Runs that others are compared without; none where all have finished."""
    gone = [run for run in results.runs if run.state != FINISHED]
    if not gone:
        return []
    waited = [run for run in gone if run.state in ACTIVE]
    sentences = [
        f"{run.label}, seed {run.seed}{'' if run.role == 'arm' else f' ({run.role})'}, {_ended(run)}"
        for run in gone
        if run.state not in ACTIVE
    ]
    sentences += [f"{counted(len(waited), 'run')} still to come"] if waited else []
    return [
        Verdict(
            title="The study is complete",
            sentence=". ".join(sentences)
            + "."
            + (" The rest is compared without." if len(gone) < len(results.runs) else ""),
            holds=UNCLEAR if len(waited) == len(gone) else NO,
            sureness="high: the state of the runs",
            numbers={run.run_id: run.state for run in gone},
            rests_on=f"{len(results.runs) - len(gone)} of {counted(len(results.runs), 'run')} finished",
        )
    ]


def _ended(run: StudyRun) -> str:
    words = {"gone": "was deleted", "crashed": "crashed", "failed": "failed", "stopped": "was stopped"}
    detail = run.detail.strip().rstrip(".")
    return words.get(run.state, f"is {run.state}") + (f": {detail}" if detail and run.state != "gone" else "")
