"""Rows as the model reads them -> lengths, what is learnt, what packing saves, marks of chat templates. Keeps no text."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qlora_core.data.rows import Example
from qlora_core.token_cache import TokenTable, make_table
from qlora_core.tokens import ALL_RESPONSES

SAMPLED_ROWS = 2000
UNCUT = 10**9
# What a row holds that somebody has put through a chat template already.
MARKS = {
    "Alpaca (### Instruction:)": re.compile(r"^### (?:Instruction|Response|Input):", re.MULTILINE),
    "ChatML (<|im_start|>)": re.compile(r"<\|im_(?:start|end)\|>"),
    "Llama 2 ([INST])": re.compile(r"\[/?INST\]"),
    "Llama 3 (<|start_header_id|>)": re.compile(r"<\|(?:start_header_id|eot_id)\|>"),
    "Gemma (<start_of_turn>)": re.compile(r"<(?:start|end)_of_turn>"),
    "Phi (<|assistant|>)": re.compile(r"<\|(?:user|assistant|system)\|>"),
    "Human:/Assistant:": re.compile(
        r"^(?:###? )?(?:Human|User|USER): .*?^(?:###? )?(?:Assistant|ASSISTANT):", re.M | re.S
    ),
}


@dataclass(frozen=True)
class RowFacts:
    """Of each row that was looked at its line, its tokens, the position of the first token that is learnt, and of its end
    token where that is learnt (None: there is none). `marks`: template -> lines that carry it. `refused`: problems of rows
    that the model's template refuses."""

    lines: tuple[int, ...]
    tokens: tuple[int, ...]
    first_supervised: tuple[int | None, ...]
    end_supervised: tuple[int | None, ...]
    marks: dict[str, tuple[int, ...]]
    refused: tuple[str, ...]

    @classmethod
    def of(cls, table: TokenTable, marks: dict[str, list[int]]) -> "RowFacts":
        return cls(
            tuple(table.lines.tolist()),
            tuple(table.lengths.tolist()),
            tuple(first if first >= 0 else None for first in table.first_supervised().tolist()),
            tuple(end if end >= 0 else None for end in table.end_positions.tolist()),
            {mark: tuple(lines) for mark, lines in marks.items()},
            tuple(row.problem for row in table.refused),
        )

    def cut(self, max_seq_length: int) -> int:
        return sum(length > max_seq_length for length in self.tokens)

    def cut_tokens(self, max_seq_length: int) -> int:
        """Tokens that the cut takes away, of all rows."""
        return sum(max(0, length - max_seq_length) for length in self.tokens)

    def without_response(self, max_seq_length: int) -> int:
        """Rows of which the cut leaves nothing to train on."""
        return len(self.bare_lines(max_seq_length))

    def bare_lines(self, max_seq_length: int) -> list[int]:
        """Lines of those rows."""
        pairs = zip(self.lines, self.first_supervised, strict=True)
        return [line for line, first in pairs if first is None or first >= max_seq_length]

    def endless_lines(self, max_seq_length: int) -> list[int]:
        """Lines of rows that are learnt from, but not where they end."""
        rows = zip(self.lines, self.first_supervised, self.end_supervised, strict=True)
        return [
            line
            for line, first, end in rows
            if first is not None and first < max_seq_length and (end is None or end >= max_seq_length)
        ]

    def length_at(self, share: float) -> int:
        """Tokens that hold this share of the rows whole; 0 without rows."""
        return int(np.quantile(self.tokens, share, method="inverted_cdf")) if self.tokens else 0

    def padding_share(self, max_seq_length: int, rows_per_step: int, seed: int) -> float:
        """Share of a forward pass that would be padding, were the rows of a step padded to their longest instead of packed."""
        return padding_share([min(length, max_seq_length) for length in self.tokens], rows_per_step, seed)


def padding_share(lengths: Sequence[int], rows_per_step: int, seed: int) -> float:
    """Padding tokens over all tokens of one epoch's passes, each holding a step's rows padded to the longest of them."""
    order = list(lengths)
    random.Random(seed).shuffle(order)
    padded = sum(
        len(step) * max(step) for i in range(0, len(order), rows_per_step) if (step := order[i : i + rows_per_step])
    )
    return 1 - sum(order) / padded if padded else 0.0


def sample(examples: Iterable[Example], tokenizer: Any, *, loss_on: str = ALL_RESPONSES) -> RowFacts:
    """Render the first SAMPLED_ROWS examples, uncut."""
    marks: dict[str, list[int]] = {}
    looked = list(islice(examples, SAMPLED_ROWS))
    for example in looked:
        for mark in marks_in(example):
            marks.setdefault(mark, []).append(example.line)
    return RowFacts.of(make_table(looked, tokenizer, loss_on=loss_on), marks)


def marks_in(example: Example) -> list[str]:
    """The templates whose marks the row's text carries."""
    text = example.text
    return [name for name, pattern in MARKS.items() if pattern.search(text)]
