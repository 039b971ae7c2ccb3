"""Which rows each optimizer step learns from. The same for the worker and for the estimate of its largest pass; no torch."""

import math
import random
from functools import lru_cache

# A look at the passes to come draws this many steps, in whole epochs; later ones are drawn alike.
DRAWN_STEPS = 1000


def step_rows(rows: int, rows_per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the rows that optimizer step `step` (from 0) learns from: each epoch a new order made from the seed,
    its last step smaller where the rows do not divide."""
    epoch, place = divmod(step, steps_per_epoch(rows, rows_per_step))
    return _epoch_order(rows, epoch, seed)[place * rows_per_step : (place + 1) * rows_per_step]


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    return math.ceil(rows / rows_per_step)


@lru_cache(maxsize=2)
def _epoch_order(rows: int, epoch: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    return order
