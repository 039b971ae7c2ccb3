"""What is known of how far a merge is from the model that was trained, for whoever is about to publish it. Measures nothing."""

from pathlib import Path

from qlora_core.drift import basis, read_drift, table
from qlora_core.hub.releases import WORSE_SHARE
from qlora_core.runs import Run

LEAST_SAME_TOKENS = 0.9  # share of tokens of which the merge must hold the same most likely
NO_ROWS = "how far this merge is from the model that was trained cannot be measured: the run has no held-out rows"


def told_of_merge(run: Run, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what was measured of the merge in the folder and of the other way, what speaks against publishing it)"""
    chosen, found = folder.name.removeprefix("merged-"), read_drift(run)
    way = found["ways"].get(chosen) if found else None
    if found is None or way is None:
        measurable = run.dataset().eval_rows > 0
        return ((), (_not_measured(run),)) if measurable else ((NO_ROWS,), ())
    rows = zip(found["ways"], table(found)[1:], strict=True)
    notes = [
        f"{name}{', as this one' if one == chosen else ''}: loss {loss}, {difference} against the model that was trained; KL {kl} "
        f"nats a token; same most likely token {top1}"
        for one, (name, loss, difference, kl, top1) in rows
        if not one.endswith("-nf4")
    ]
    trained = found["trained"]["loss"]
    is_far = way["loss_difference"] > WORSE_SHARE * trained or way["top1"] < LEAST_SAME_TOKENS
    doubt = (
        f"This merge is far from the model that was trained: its loss is {way['loss']:.4f} instead of {trained:.4f}, and "
        f"{way['top1']:.1%} of its most likely tokens are the same. Merge onto another base, or publish the adapter."
    )
    return (*notes, basis(found)), (doubt,) if is_far else ()


def _not_measured(run: Run) -> str:
    return (
        "How far this merge is from the model that was trained was not measured. "
        f"`python -m qlora_core drift {run.run_id}` measures it; on the page, “How the merged model is made”."
    )
