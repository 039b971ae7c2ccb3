"""A run's stored dataset -> the rows that its steps and evaluations read, or what is wrong with them. Loads no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_core import token_cache
from qlora_core.config import TrainConfig
from qlora_core.data.rows import Example
from qlora_core.data.stored import read_stored
from qlora_core.errors import DatasetError
from qlora_core.models import BaseModel
from qlora_core.runs import Run
from qlora_core.tokens import prompt_ids
from qlora_core.worker.batches import Row


@dataclass(frozen=True)
class Rows:
    """`cut` counts training rows; `left_out` are the lines of rows that hold nothing to learn. `scored` are the evaluation
    examples that are answered for the task score."""

    train: list[Row]
    evaluation: list[Row]
    scored: list[Example]
    cut: int
    left_out: tuple[int, ...]
    eval_left_out: tuple[int, ...]


@dataclass(frozen=True)
class _File:
    """`left_out`: the response is cut away whole, or, with skip_bad_rows, the template refuses the row. `longest` counts
    tokens before any cut."""

    rows: list[Row]
    cut: int
    left_out: tuple[int, ...]
    longest: int
    refused: frozenset[int]


def read_rows(run: Run, tokenizer: Any, *, check: Callable[[int], None] | None = None) -> Rows:
    """Every row as tokens; `check(rows so far)` may raise to end it.

    Raises DatasetError when nothing in the file would be learnt, or a row does not fit the model.
    """
    folder, config, dataset = run.path / "dataset", run.config(), run.dataset()
    train = _read(folder / "train.jsonl", dataset.train_fingerprint, dataset.train_lines, tokenizer, run, check)
    evaluation = _read(folder / "eval.jsonl", dataset.eval_fingerprint, dataset.eval_lines, tokenizer, run, check)
    _check_something_is_learnt(train, evaluation, config.max_seq_length)
    answerable = (example for example in read_stored(folder / "eval.jsonl") if example.line not in evaluation.refused)
    scored = list(islice(answerable, config.score_rows))
    _check_positions([*train.rows, *evaluation.rows], scored, tokenizer, config, run.base_model())
    return Rows(train.rows, evaluation.rows, scored, train.cut, train.left_out, evaluation.left_out)


def _read(
    path: Path, fingerprint: str, lines: str, tokenizer: Any, run: Run, check: Callable[[int], None] | None
) -> _File:
    config = run.config()
    table = token_cache.table(
        fingerprint,
        lambda: read_stored(path),
        tokenizer,
        run.settings,
        loss_on=config.loss_on,
        lines=lines,
        report=check,
    )
    if table.refused and not config.skip_bad_rows:
        raise DatasetError(
            f"{len(table.refused):,} rows cannot be written in the chat template; mend them, choose another template, or "
            "leave them out with skip_bad_rows",
            *(row.problem for row in table.refused[:20]),
        )
    rows: list[Row] = []
    left_out = [row.line for row in table.refused]
    for row in Row.all_of(table, config.max_seq_length):
        if row.supervised_tokens:
            rows.append(row)
        else:
            left_out.append(row.line)
    lengths = table.lengths
    cut = int((lengths > config.max_seq_length).sum())
    refused = frozenset(row.line for row in table.refused)
    return _File(rows, cut, tuple(sorted(left_out)), int(lengths.max(initial=0)), refused)


def _check_something_is_learnt(train: _File, evaluation: _File, max_seq_length: int) -> None:
    limit = f"max_seq_length is {max_seq_length}"
    for what, file in (("training", train), ("evaluation", evaluation)):
        if not file.rows:
            raise DatasetError(
                f"no {what} row has a token to learn: every row is cut before its response begins ({limit}; lines "
                f"{', '.join(map(str, file.left_out[:20]))}); raise max_seq_length"
            )
    if train.cut == len(train.rows) + len(train.left_out):
        raise DatasetError(
            f"every row is cut before its end ({limit}), so no response would end; raise max_seq_length to {train.longest} "
            "(the longest row), or shorten the rows"
        )


def _check_positions(
    rows: list[Row], scored: list[Example], tokenizer: Any, config: TrainConfig, base: BaseModel
) -> None:
    """Raises DatasetError where a row, or a prompt with its answer, is longer than the model has positions for."""
    positions = base.positions()
    if not positions:
        return
    length, line = max((len(row.token_ids), row.line) for row in rows)
    if length > positions:
        raise DatasetError(
            f"line {line} has {length:,} tokens, but {base.name} has positions for {positions:,}; "
            f"set max_seq_length to {positions} or less"
        )
    if config.score == "none":
        return
    for example in scored:
        length = len(prompt_ids(example, tokenizer))
        if length > positions - config.score_max_new_tokens:
            raise DatasetError(
                f"line {example.line} of the evaluation rows: its prompt of {length:,} tokens and an answer of "
                f"{config.score_max_new_tokens} do not fit into the {positions:,} positions of {base.name}; "
                "shorten it, lower score_max_new_tokens, or set score to none"
            )
