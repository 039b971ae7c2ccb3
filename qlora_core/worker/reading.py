"""A run's stored dataset -> the rows that its steps and evaluations read, or what is wrong with them. Loads no weights."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.data.rows import Example
from qlora_core.data.stored import read_stored
from qlora_core.errors import DatasetError
from qlora_core.models import BaseModel
from qlora_core.runs import Run
from qlora_core.tokens import prompt_ids, render
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


def read_rows(run: Run, tokenizer: Any) -> Rows:
    """Render every row once. Raises DatasetError when nothing in the file would be learnt, or a row does not fit the model."""
    folder, config = run.path / "dataset", run.config()
    train = _rendered(folder / "train.jsonl", tokenizer, config)
    evaluation = _rendered(folder / "eval.jsonl", tokenizer, config)
    _check_something_is_learnt(train, evaluation, config.max_seq_length)
    scored = list(islice(read_stored(folder / "eval.jsonl"), config.score_rows))
    _check_positions([*train.rows, *evaluation.rows], scored, tokenizer, config, run.base_model())
    return Rows(train.rows, evaluation.rows, scored, train.cut, train.left_out, evaluation.left_out)


def _rendered(path: Path, tokenizer: Any, config: TrainConfig) -> _File:
    rows, cut, left_out, longest, refused = [], 0, [], 0, []
    for example in read_stored(path):
        try:
            rendered = render(example, tokenizer, max_seq_length=config.max_seq_length)
        except DatasetError as error:
            refused.extend(error.problems)
            left_out.append(example.line)
            continue
        cut += rendered.is_cut
        longest = max(longest, len(rendered.token_ids))
        if rendered.supervised_tokens:
            rows.append(Row.of(rendered))
        else:
            left_out.append(example.line)
    if refused and not config.skip_bad_rows:
        raise DatasetError(
            f"{len(refused):,} rows cannot be written in the model's chat template; mend them, or leave them out with "
            "skip_bad_rows",
            *refused[:20],
        )
    return _File(rows, cut, tuple(left_out), longest)


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
