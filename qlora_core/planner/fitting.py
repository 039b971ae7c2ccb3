"""How a run fits its device: the plan of its passes, the highest rank for the memory, and what others would need. Pure."""

from dataclasses import dataclass, replace

from qlora_core import config as settings
from qlora_core import memory
from qlora_core.config import TrainConfig
from qlora_core.footprint import targeted_layers
from qlora_core.memory import GIB, Planned
from qlora_core.planner.facts import USABLE, Device, Facts, rank_for
from qlora_core.precision import has_int8
from qlora_core.targets import Architecture

RANK_STEPS = (4, 8, 16, 32, 64, 128, 256)
# Share of the tokens that are learnt where no rows are known.
UNKNOWN_SHARE = 0.5
# fp16 or bf16 weights and gradients, and Adam's two moments in fp32: how the QLoRA paper (https://arxiv.org/abs/2305.14314)
# gets from 65B to 780 GB.
FULL_BYTES_A_WEIGHT = 12
# Of the rule of thumb.
BYTES_A_WEIGHT = {"lora": 2, "qlora": 0.52}


def usable_bytes(facts: Facts) -> int:
    """What the run may fill: the budget that a person set, at most most of the memory."""
    most = round(USABLE * facts.device.memory_bytes)
    budget = facts.config.memory_budget_gib
    return most if budget is None else min(most, round(budget * GIB))


def dtype_bytes(config: TrainConfig, device: Device) -> int:
    """Of a number that products are made with: 16 bits where the device has them."""
    if config.compute_dtype == "auto":
        return 2 if device.is_gpu or device.has_bf16 else 4
    return 4 if config.compute_dtype == "fp32" else 2


def row_lengths(facts: Facts) -> tuple[int, ...]:
    """Tokens of the rows that are known, cut; a step of the greatest length where none is."""
    most = facts.config.max_seq_length
    if facts.rows and facts.rows.tokens:
        return tuple(min(length, most) for length in facts.rows.tokens)
    return (most,) * facts.config.rows_per_step


def supervised_share(facts: Facts) -> float:
    """Of the tokens of the rows, those from the first that is learnt on."""
    if not (facts.rows and facts.rows.tokens):
        return UNKNOWN_SHARE
    firsts = zip(row_lengths(facts), facts.rows.first_supervised, strict=True)
    learnt = sum(max(0, length - first) for length, first in firsts if first is not None)
    return learnt / sum(row_lengths(facts))


def can_fuse(facts: Facts) -> bool:
    """Whether the worker will use decoder layers of its own, as far as can be known before it has tried them."""
    config, device = facts.config, facts.device
    in_bf16 = device.has_bf16 and config.compute_dtype in ("auto", "bf16")
    known = facts.architecture.fusable and not config.use_dora and not has_int8(config)
    return known and in_bf16 and config.packing == "auto"


def planned(facts: Facts) -> Planned | None:
    """The fastest plan that fits; None where the model's sizes are unknown or nothing gets an adapter."""
    shape, config = facts.architecture, facts.config
    if shape is None or not facts.targeted:
        return None
    return memory.choose_plan(
        shape,
        config,
        row_lengths=row_lengths(facts),
        supervised_share=supervised_share(facts),
        is_gpu=facts.device.is_gpu,
        dtype_bytes=dtype_bytes(config, facts.device),
        usable_bytes=usable_bytes(facts),
        can_fuse=can_fuse(facts),
        host_bytes=facts.device.host_bytes,
    )


def with_settings(facts: Facts, **changed: object) -> Facts:
    return replace(facts, config=settings.replace(facts.config, **changed))


@dataclass(frozen=True)
class RankChoice:
    """`largest` fits the memory, None where not even the lowest does; `for_rows` is enough for the rows."""

    largest: int | None
    for_rows: int

    @property
    def rank(self) -> int | None:
        """What to choose: more than the rows need learns them by heart."""
        return None if self.largest is None else min(self.largest, self.for_rows)


def rank_for_memory(facts: Facts) -> RankChoice:
    """The highest of the usual ranks with which the run fits, without recomputing more than it must."""
    found = None
    for rank in RANK_STEPS:
        plan = planned(with_settings(facts, rank=rank, lora_alpha=None))
        if plan is None or not plan.fits:
            break
        found = rank
    return RankChoice(found, rank_for(facts.train_rows) if facts.train_rows else max(RANK_STEPS))


def full_fine_tuning_bytes(shape: Architecture) -> int:
    """Weights, gradients and states of the optimizer, all weights learnt; without activations."""
    return FULL_BYTES_A_WEIGHT * shape.parameters


def rule_of_thumb(method: str) -> str:
    return f"{BYTES_A_WEIGHT[method]}p + 24krd"


def rule_of_thumb_bytes(shape: Architecture, config: TrainConfig) -> int:
    """ "2p + 24krd" for LoRA, "0.52p + 24krd" for QLoRA: p weights, k modules of width d, rank r. Weights and optimizer states
    alone, as if every matrix were square; no activations, no logits."""
    modules = len(targeted_layers(shape, config))
    return round(BYTES_A_WEIGHT[config.method] * shape.parameters + 24 * modules * config.rank * shape.hidden_size)
