"""Which runs of a study are compared with which, and what they say of themselves. Loads nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_core import precision
from qlora_core.study_results import ARM, OTHER_ORDER, OTHER_SEED, StudyRun
from qlora_core.worker.training import BEGIN_AT_ZERO

# What a LoRA run ignores: its pair may differ in them.
OF_QLORA = ("method", "quant_type", "double_quant", "quantize_modules", "int8_modules")
IN_16_BITS = "16 bits"

Pair = tuple[StudyRun, StudyRun, str, str]  # first, second, kind, label
How = tuple[str, str]  # which weights of a base are in how many bits, number type of the rest


def first_seed(runs: Sequence[StudyRun], seeds: Sequence[int]) -> int:
    """The first of the study's seeds of which one of these runs is an arm."""
    known = {run.seed for run in runs if run.role == ARM}
    return next((seed for seed in seeds if seed in known), seeds[0])


def method_pairs(runs: Sequence[StudyRun]) -> Iterator[Pair]:
    """LoRA and QLoRA runs of equal other settings and seed."""
    arms = [run for run in runs if run.role == ARM]
    common = {id(run): {k: v for k, v in run.varied.items() if k not in OF_QLORA} for run in arms}
    for qlora in (run for run in arms if run.config.method == "qlora"):
        for lora in arms:
            if lora.config.method == "lora" and lora.seed == qlora.seed and common[id(lora)] == common[id(qlora)]:
                yield lora, qlora, "lora-qlora", qlora.label
                break


def weight_pairs(runs: Sequence[StudyRun], seed: int) -> Iterator[Pair]:
    """LoRA with QLoRA; each run of the noise floor with the arm of that seed which it repeats; neighbours in the grid of one
    method."""
    yield from method_pairs(runs)
    arms = [run for run in runs if run.role == ARM and run.seed == seed]
    for run in runs:
        arm = next((arm for arm in arms if arm.varied == run.varied), None)
        # Where the arm that it repeats is missing, another seed's would differ in both.
        if arm and (run.role == OTHER_SEED or (run.role == OTHER_ORDER and arm.seed == run.seed)):
            yield arm, run, run.role, run.label
    for method in ("lora", "qlora"):
        ladder = [run for run in arms if run.config.method == method]
        for first, second in zip(ladder, ladder[1:], strict=False):
            yield first, second, "other arm", f"{first.label} – {second.label}"


def how_held(run: StudyRun) -> How:
    """Runs in which these are equal share a base."""
    words = precision.words(run.config) if run.config.method == "qlora" else IN_16_BITS
    return words, run.result["run_info"]["compute_dtype"]


def names_of_bases(ways: Sequence[How], usual_dtype: str) -> dict[How, str]:
    """ "base" for the one in 16 bits, "base nf4" for the usual one in 4; in full where two would have one name."""
    short = {how: how[0].replace(", double quantisation", "") for how in ways}
    names = {}
    for how in ways:
        alike = {other[0] for other in ways if short[other] == short[how]}
        told = how[0] if len(alike) > 1 else short[how]
        parts = ["base", "" if told == IN_16_BITS else told, "" if how[1] == usual_dtype else how[1]]
        names[how] = " ".join(filter(None, parts))
    return names


def scored(run: StudyRun) -> dict[str, Any] | None:
    """The score that the run counted at its end; None where it counted none."""
    found = [score for score in run.result["train_info"]["scores"] if score["step"] > 0]
    return found[-1] if found else None


def scored_base(runs: Sequence[StudyRun]) -> dict[str, Any] | None:
    """What the first of the runs that did so counted before its first step, when its adapter added nothing yet."""
    starts = (run for run in runs if run.config.init_lora_weights in BEGIN_AT_ZERO)
    scores = (score for run in starts for score in run.result["train_info"]["scores"])
    return next((score for score in scores if score["step"] == 0), None)
