"""Rows -> their tokens as flat arrays, kept on disk for the next run, preview or preparation with the same template.

What is kept is the whole row; max_seq_length cuts when it is read, so that every length shares one entry.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core import templates
from qlora_core.data.rows import Example
from qlora_core.settings import Settings
from qlora_core.tokens import ALL_RESPONSES, Refused, render_many

# Changes with what `tokens.render_many` makes of a row.
VERSION = 2
REPORT_EVERY = 500


@dataclass(frozen=True)
class TokenTable:
    """Tokens of many rows. `token_ids` and `supervised` [all tokens] are those of row i between `offsets[i]` and
    `offsets[i + 1]`; `lines` and `end_positions` [rows]; `refused` are rows that the template does not take."""

    token_ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    end_positions: np.ndarray
    refused: tuple[Refused, ...]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, number: int, max_seq_length: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(line, token ids, supervised) of row `number` from 0, cut."""
        begin = int(self.offsets[number])
        end = min(int(self.offsets[number + 1]), begin + max_seq_length)
        return int(self.lines[number]), self.token_ids[begin:end], self.supervised[begin:end]

    def first_supervised(self) -> np.ndarray:
        """[rows]: position of the first token that is learnt; -1 where none is. The first of a row is never predicted."""
        learnt = self.supervised.astype(bool, copy=True)
        learnt[self.offsets[:-1][self.lengths > 0]] = False
        positions = np.flatnonzero(learnt)
        place = np.searchsorted(positions, self.offsets[:-1])
        known = np.append(positions, len(learnt))[place]
        return np.where(known < self.offsets[1:], known - self.offsets[:-1], -1)


def make_table(
    examples: Iterable[Example],
    tokenizer: Any,
    *,
    loss_on: str = ALL_RESPONSES,
    report: Callable[[int], None] | None = None,
) -> TokenTable:
    """Render every example. `report(rows so far)` may raise to end it."""
    ids, learnt, lengths, lines, ends, refused = [], [], [0], [], [], []
    for number, row in enumerate(render_many(examples, tokenizer, loss_on=loss_on)):
        if report and number and number % REPORT_EVERY == 0:
            report(number)
        if isinstance(row, Refused):
            refused.append(row)
            continue
        ids.append(row.token_ids)
        learnt.append(row.supervised)
        lengths.append(len(row.token_ids))
        lines.append(row.line)
        ends.append(row.end_position)
    return TokenTable(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(learnt) if learnt else np.zeros(0, bool),
        np.cumsum(lengths, dtype=np.int64),
        np.array(lines, np.int64),
        np.array(ends, np.int32),
        tuple(refused),
    )


def table(
    rows_fingerprint: str,
    examples: Callable[[], Iterator[Example]],
    tokenizer: Any,
    settings: Settings,
    *,
    loss_on: str = ALL_RESPONSES,
    lines: str = "",
    report: Callable[[int], None] | None = None,
) -> TokenTable:
    """The table of rows with this fingerprint: from disk where it is there, else made from `examples()` and kept.

    `lines` stands for their line numbers, which a fingerprint does not tell; empty for 1, 2, 3 and so on.
    """
    key = key_of(rows_fingerprint + lines, tokenizer_fingerprint(tokenizer), loss_on)
    folder = settings.home / "tokens" / key
    found = _load(folder)
    if found is None:
        found = make_table(examples(), tokenizer, loss_on=loss_on, report=report)
        with suppress(OSError):  # a full disk costs the cache, not the run
            _keep(found, folder)
    return found


def key_of(rows_fingerprint: str, tokenizer: str, loss_on: str) -> str:
    return hashlib.sha256(f"{VERSION} {rows_fingerprint} {tokenizer} {loss_on}".encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that decides what tokens a row gets: vocabulary, rules, special tokens and template."""
    template = tokenizer.chat_template or templates.ALPACA
    # A template that writes today's date writes another one tomorrow.
    dated = time.strftime("%Y-%m-%d") if "strftime_now" in template else ""
    told = [tokenizer.backend_tokenizer.to_str(), template, dated]
    return hashlib.sha256(json.dumps([*told, tokenizer.special_tokens_map], default=str).encode()).hexdigest()


_ARRAYS = ("token_ids", "supervised", "offsets", "lines", "end_positions")


def _load(folder: Path) -> TokenTable | None:
    try:
        refused = json.loads((folder / "refused.json").read_text())
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None
    return TokenTable(*arrays, tuple(Refused(**row) for row in refused))


def _keep(table: TokenTable, folder: Path) -> None:
    """Written beside and renamed: a kill leaves no half of it, and two may write at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        for name in _ARRAYS:
            np.save(partial / f"{name}.npy", getattr(table, name))
        (partial / "refused.json").write_text(json.dumps([vars(row) for row in table.refused]))
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been read
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
