"""The rows that benchmarks train on, written so that each is exactly as many tokens as it should be.

They need a model folder of random_models.py: its tokenizer makes one token of each word. Imports no torch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.data.rows import Example, Message
from qlora_core.tokens import load_tokenizer, render

WORDS = 1020
# Lengths like those of Stanford Alpaca: half of the rows below the median, 16 of them about 2,300 tokens together.
MEDIAN_TOKENS, SPREAD = 110, 0.78
PROMPT_SHARE = 0.4
IGNORED = -100


@dataclass(frozen=True)
class Workload:
    """`alpaca_like`: lengths are drawn; else every row has `max_seq_length` tokens, all of them learnt."""

    about: str
    rows_per_step: int
    max_seq_length: int
    alpaca_like: bool = False

    @property
    def loss_on(self) -> str:
        return "all_responses" if self.alpaca_like else "everything"


WORKLOADS = {
    "W1": Workload("full rows, 4 x 2,048 tokens a step", 4, 2048),
    "W2": Workload("Alpaca-like rows, 16 a step, about 2,300 tokens", 16, 512, alpaca_like=True),
    **{f"T{512 * n}": Workload(f"full rows, {n} x 512 tokens a step", n, 512) for n in (1, 2, 4, 8, 16)},
}
RATIO_WORKLOADS = tuple(name for name in WORKLOADS if name.startswith("T"))


def make_rows(workload: Workload, count: int, *, model_folder: Path, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)
    around = tokens_around_the_words(model_folder)
    rows = []
    for _ in range(count):
        words = row_length(workload, chance, least=around + 2) - around
        prompt = max(1, round(PROMPT_SHARE * words))
        text = [f"w{chance.randrange(WORDS)}" for _ in range(words)]
        rows.append({"prompt": " ".join(text[:prompt]), "completion": " ".join(text[prompt:])})
    return rows


def row_length(workload: Workload, chance: random.Random, *, least: int) -> int:
    """Tokens of the next row. None is longer than max_seq_length: rows that are all cut are refused."""
    if not workload.alpaca_like:
        return workload.max_seq_length
    drawn = round(MEDIAN_TOKENS * chance.lognormvariate(0, SPREAD))
    return max(least, min(workload.max_seq_length, drawn))


def tokens_around_the_words(model_folder: Path) -> int:
    """What the chat template adds to a prompt and a response."""
    return len(as_tokens([{"prompt": "w0", "completion": "w1"}], "everything", model_folder)[0]["input_ids"]) - 2


def as_tokens(rows: Sequence[dict[str, str]], loss_on: str, model_folder: Path) -> list[dict[str, Any]]:
    """The same rows as other trainers take them: {"input_ids", "labels"}, as this project renders them."""
    tokenizer = load_tokenizer(model_folder)
    found = []
    for line, row in enumerate(rows, 1):
        example = Example(line, (Message("user", row["prompt"]), Message("assistant", row["completion"])))
        rendered = render(example, tokenizer, loss_on=loss_on)
        ids = rendered.token_ids.tolist()
        labels = [token if learnt else IGNORED for token, learnt in zip(ids, rendered.supervised, strict=True)]
        found.append({"input_ids": ids, "labels": labels})
    return found
