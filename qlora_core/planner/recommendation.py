"""What we would choose for these rows on this device, each setting with its reason. Facts in, a Recommendation out."""

import math
from dataclasses import dataclass
from typing import Any

from qlora_core.data.rows import counted
from qlora_core.footprint import nf4_bytes
from qlora_core.memory import GIB, Planned
from qlora_core.planner.facts import Facts, learning_rate_for, length_for, rank_for
from qlora_core.planner.fitting import planned, rank_for_memory, usable_bytes, with_settings

MANY_ROWS = 500_000


@dataclass(frozen=True)
class Change:
    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """`method` is None where neither fits; `remarks` say what no setting can."""

    method: str | None
    changes: tuple[Change, ...]
    remarks: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        return {change.field: change.value for change in self.changes}


def recommend(facts: Facts) -> Recommendation:
    """Settings for these rows on this device, each with its reason; fields that are not named stay as they are."""
    changes = [*_for_rows(facts), *_for_lengths(facts)]
    rate, why = learning_rate_for(facts.architecture)
    changes += [
        Change("learning_rate", rate, why),
        Change("target_modules", "all-linear", "adapting every linear layer comes closest to full fine-tuning (QLoRA paper)"),
        Change("lora_dropout", 0.0, "an adapter is small already, and passes are fastest without it"),
        Change("init_lora_weights", "default", "the plain start serves both methods"),
        Change("compute_dtype", "auto", "bf16 where the device has it"),
    ]  # fmt: skip
    remarks = []
    if facts.train_rows >= MANY_ROWS:
        remarks.append(
            f"With {facts.train_rows:,} rows full fine-tuning may learn more than any adapter "
            "(https://arxiv.org/abs/2405.09673); it needs about 12 bytes a weight, and another tool."
        )
    if facts.architecture is None:
        return Recommendation(
            facts.config.method, tuple(changes), (*remarks, "The model's size is unknown, so the method stays.")
        )
    return _with_method(facts, changes, remarks)


def _for_rows(facts: Facts) -> list[Change]:
    rows = facts.train_rows
    rank = rank_for(rows)
    epochs = 3.0 if rows < 5_000 else 2.0 if rows < 50_000 else 1.0
    per_step = 4 if rows < 100 else 8 if rows < 5_000 else 16 if rows < 50_000 else 32
    rank_why = (
        f"enough for {rows:,} rows; more would learn them by heart" if rank < 64 else f"{rows:,} rows can fill it"
    )
    passes = "1 pass" if epochs == 1 else f"{epochs:g} passes"
    return [
        Change("rank", rank, rank_why),
        Change("lora_alpha", None, "automatic: twice the rank, so that the learning rate means the same at every rank"),
        Change("use_rslora", False, "it pays at high ranks only"),
        Change("num_epochs", epochs, f"{counted(rows, 'row')} bear {passes} before they are learnt by heart"),
        Change("max_steps", None, "the epochs decide"),
        Change("rows_per_step", per_step, f"{counted(math.ceil(rows / per_step), 'step')} an epoch"),
    ]


def _for_lengths(facts: Facts) -> list[Change]:
    if facts.rows is None or not facts.rows.tokens:
        return []
    length = length_for(facts.rows, facts.positions)
    cut = facts.rows.cut(length)
    sampled = facts.of_rows.rstrip(": ").lower()
    why = (
        f"no row is cut; the longest has {max(facts.rows.tokens):,} tokens"
        if not cut
        else f"cuts {counted(cut, 'row')} only"
    )
    return [Change("max_seq_length", length, f"{why}{f' ({sampled})' if sampled else ''}")]


def _with_method(facts: Facts, changes: list[Change], remarks: list[str]) -> Recommendation:
    """The first of LoRA, QLoRA that fits the memory, with a rank that fits too."""
    changes = [
        *changes,
        Change("token_budget", None, "automatic: as many tokens a pass as are fast and fit"),
        Change("activation_checkpointing", "auto", "automatic: recomputed in as few layers as fit"),
    ]
    chosen = with_settings(facts, **{change.field: change.value for change in changes})
    for method in ("lora", "qlora"):
        tried = with_settings(chosen, method=method)
        if (rank := rank_for_memory(tried).rank) is None:
            continue
        if rank < tried.config.rank:
            why = f"the highest that fits the memory; the rows would bear {tried.config.rank}"
            changes = [Change("rank", rank, why) if change.field == "rank" else change for change in changes]
            tried = with_settings(tried, rank=rank)
        first = Change("method", method, _why(tried, planned(tried)))
        return Recommendation(method, (first, *changes), tuple(remarks))
    return Recommendation(None, tuple(changes), (*remarks, _too_large(with_settings(chosen, method="qlora", rank=4))))


def _why(facts: Facts, plan: Planned) -> str:
    size = f"about {plan.estimate.needed_bytes / GIB:.1f} GiB of {usable_bytes(facts) / GIB:.1f} on {facts.device.name}"
    fits = {
        "lora": f"the 16-bit base fits ({size}): nothing is lost to 4 bits, and steps are faster",
        "qlora": f"the base fits in 4 bits only ({size})",
    }[facts.config.method]
    return f"{fits}; {plan.reason}" if plan.plan.checkpointed_layers else fits


def _too_large(facts: Facts) -> str:
    shape, needed = facts.architecture, planned(facts).estimate.needed_bytes
    a_weight = nf4_bytes(shape.quantised_parameters) / max(1, shape.quantised_parameters)
    most = max(0, usable_bytes(facts) - (needed - nf4_bytes(shape.quantised_parameters))) / a_weight if a_weight else 0
    return (
        f"Neither LoRA nor QLoRA fits: {shape.parameters / 1e9:.1f}B weights on {facts.device.name} with "
        f"{usable_bytes(facts) / GIB:.1f} GiB to use. In 4 bits at most about {most / 1e9:.2g}B would fit; choose a smaller "
        "model, shorter rows, or a larger card."
    )
