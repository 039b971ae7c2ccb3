"""The first rows of a file as the model reads them -> lengths, what is learnt, marks of chat templates. Keeps no text."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qlora_core.data.rows import Example
from qlora_core.errors import DatasetError
from qlora_core.tokens import render

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
    """Of each sampled row its line, its tokens, the position of the first token that is learnt, and of its end token where
    that is learnt (None: there is none). `marks`: template -> lines that carry it. `refused`: problems of rows that the
    model's template refuses."""

    lines: tuple[int, ...]
    tokens: tuple[int, ...]
    first_supervised: tuple[int | None, ...]
    end_supervised: tuple[int | None, ...]
    marks: dict[str, tuple[int, ...]]
    refused: tuple[str, ...]

    def cut(self, max_seq_length: int) -> int:
        return sum(length > max_seq_length for length in self.tokens)

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
        ordered = sorted(self.tokens)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def sample(examples: Iterable[Example], tokenizer: Any) -> RowFacts:
    """Render the first SAMPLED_ROWS examples, uncut."""
    lines, tokens, first, ends, refused = [], [], [], [], []
    marks: dict[str, list[int]] = {}
    for example in islice(examples, SAMPLED_ROWS):
        for mark in marks_in(example):
            marks.setdefault(mark, []).append(example.line)
        try:
            rendered = render(example, tokenizer, max_seq_length=UNCUT)
        except DatasetError as error:
            refused.extend(error.problems)
            continue
        learnt = [i for i, on in enumerate(rendered.supervised) if on and i]
        lines.append(example.line)
        tokens.append(len(rendered.token_ids))
        first.append(learnt[0] if learnt else None)
        ends.append(learnt[-1] if learnt and rendered.end_supervised else None)
    found = {mark: tuple(lines) for mark, lines in marks.items()}
    return RowFacts(tuple(lines), tuple(tokens), tuple(first), tuple(ends), found, tuple(refused))


def marks_in(example: Example) -> list[str]:
    """The templates whose marks the row's text carries."""
    text = "\n".join([example.input, *(message.content for message in example.messages)])
    return [name for name, pattern in MARKS.items() if pattern.search(text)]
