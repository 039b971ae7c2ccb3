"""What is known of a run before it starts, and the rules of thumb that findings and recommendation share. Plain values only."""

import math
from dataclasses import dataclass

from qlora_core import targets
from qlora_core.config import TrainConfig
from qlora_core.data.sample import RowFacts
from qlora_core.footprint import targeted_layers
from qlora_core.targets import Architecture

# Rank for up to so many training rows.
RANKS = ((5_000, 8), (50_000, 16), (200_000, 32), (math.inf, 64))
# Of a memory: the rest is the driver's and other processes'.
USABLE = 0.95


@dataclass(frozen=True)
class Device:
    """What the run would train on; memory is the whole card's, or of a CPU what the host has free. `host_bytes`: free beside a
    GPU, None where it is not known."""

    name: str
    memory_bytes: int
    is_gpu: bool
    has_bf16: bool
    host_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run before it starts; None where it is not known (yet)."""

    config: TrainConfig
    device: Device
    train_rows: int
    eval_rows: int
    free_disk_bytes: int
    eval_rows_also_trained: int = 0
    rows: RowFacts | None = None
    architecture: Architecture | None = None
    positions: int | None = None

    @property
    def targeted(self) -> list[targets.Layer]:
        """Layers with an adapter; empty where they are unknown or cannot be."""
        return targeted_layers(self.architecture, self.config) if self.architecture else []

    @property
    def trainable(self) -> int:
        return targets.trainable_parameters(self.targeted, self.config)

    @property
    def epochs(self) -> float:
        if self.config.max_steps is None:
            return self.config.num_epochs
        return self.config.max_steps * self.config.rows_per_step / max(1, self.train_rows)

    @property
    def of_rows(self) -> str:
        """How a sentence on a sample begins."""
        whole = self.rows is None or len(self.rows.lines) + len(self.rows.refused) >= self.train_rows
        return "" if whole else f"Of the first {len(self.rows.lines):,} rows looked at: "


def held_out_rows(rows: int, config: TrainConfig) -> int:
    """How many of the rows are evaluated on, where no others are named for that."""
    return min(rows, max(1, round(rows * config.eval_fraction)))


def rank_for(rows: int) -> int:
    return next(rank for most, rank in RANKS if rows < most)


def learning_rate_for(architecture: Architecture | None) -> tuple[float, str]:
    """(peak learning rate, why). Large models: table 9 of the QLoRA paper (https://arxiv.org/abs/2305.14314)."""
    billions = architecture.parameters / 1e9 if architecture else 7
    if billions >= 30:
        return 1e-4, "what the QLoRA paper used at 33B and 65B"
    if billions >= 1:
        return 2e-4, "what the QLoRA paper used up to 13B"
    return 1e-3, "a model below 1B bears more; measured on the bundled one"


def length_for(rows: RowFacts, positions: int | None) -> int:
    """Row length that holds the longest row, or 99 % of them where the longest is far longer; a multiple of 64."""
    longest, most = max(rows.tokens), rows.length_at(0.99)
    wanted = longest if longest <= 1.5 * most else most
    return min(max(64, -(-wanted // 64) * 64), positions or 131_072, 131_072)
