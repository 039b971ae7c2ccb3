"""A run's own copy of its dataset: canonical rows split into train and evaluation, with fingerprint and what was left out."""

import hashlib
import os
import random
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from qlora_core.config import TrainConfig
from qlora_core.data.formats import read_rows
from qlora_core.data.inspection import DatasetReport, inspect
from qlora_core.data.limits import Limits
from qlora_core.data.locate import Located
from qlora_core.data.rows import Example
from qlora_core.errors import DatasetError

LISTED = 20  # problems named in an error; `inspect` lists all


@dataclass(frozen=True)
class StoredDataset:
    """What the run trains and evaluates on. Fingerprints are SHA-256 over the canonical rows in order; `train_lines` and
    `eval_lines` over their line numbers, empty where those are 1, 2, 3 and so on."""

    file_name: str
    form: str
    train_rows: int
    eval_rows: int
    left_out_lines: tuple[int, ...]
    eval_left_out_lines: tuple[int, ...]
    duplicates: int
    eval_rows_also_trained: int
    train_fingerprint: str
    eval_fingerprint: str
    eval_source: str
    origin: dict[str, Any] = field(default_factory=dict)
    train_lines: str = ""
    eval_lines: str = ""

    @classmethod
    def load(cls, folder: Path) -> "StoredDataset":
        values = orjson.loads((folder / "dataset.json").read_bytes())
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def remarks(self) -> list[str]:
        """What a person should know of the rows, each a sentence; empty when there is nothing."""
        found = []
        for what, lines in (("training", self.left_out_lines), ("evaluation", self.eval_left_out_lines)):
            if lines:
                shown = ", ".join(map(str, lines[:LISTED])) + (" …" if len(lines) > LISTED else "")
                found.append(f"{len(lines):,} bad lines of the {what} file are left out: {shown}")
        if self.eval_rows_also_trained:
            found.append(
                f"{self.eval_rows_also_trained:,} of {self.eval_rows:,} evaluation rows are also training rows: the "
                "evaluation loss and the score flatter the model"
            )
        return found


def read_stored(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for line in file:
            yield Example.from_json(orjson.loads(line))


def store(located: Located, folder: Path, *, limits: Limits, max_rows: int) -> StoredDataset:
    """Write `train.jsonl`, `eval.jsonl` and `dataset.json` into the folder.

    Raises DatasetError when rows have problems and `skip_bad_rows` is off, and when nothing is left to train or
    evaluate on.
    """
    config, data = located.config, located.data
    source = _Source(data, limits, config.columns)
    report = source.usable(config)
    if report.rows > max_rows:
        raise DatasetError(f"{data.name}: has {report.rows:,} rows, the limit is {max_rows:,} (QLORA_LAB_MAX_ROWS)")
    folder.mkdir(parents=True, exist_ok=True)
    if located.eval_data:
        evaluation = _Source(located.eval_data, limits, config.columns)
        eval_left_out = tuple(evaluation.usable(config).problem_lines)
        train = _write(folder / "train.jsonl", source.examples())
        held_out = _write(folder / "eval.jsonl", evaluation.examples())
        eval_source = located.eval_data.name
    else:
        eval_left_out = ()
        held = _held_out(source, report, config)
        train = _write(folder / "train.jsonl", (e for e in source.examples() if e.line not in held))
        held_out = _write(folder / "eval.jsonl", (e for e in source.examples() if e.line in held))
        eval_source = f"{config.eval_fraction:.0%} held out of {data.name}, seed {config.seed}"
    stored = StoredDataset(
        file_name=data.name,
        form=report.form or "",
        train_rows=train.rows,
        eval_rows=held_out.rows,
        left_out_lines=tuple(report.problem_lines),
        eval_left_out_lines=eval_left_out,
        duplicates=report.duplicate_rows,
        eval_rows_also_trained=sum(digest in train.digests for digest in held_out.each),
        train_fingerprint=train.fingerprint,
        eval_fingerprint=held_out.fingerprint,
        eval_source=eval_source,
        origin=located.origin,
        train_lines=train.lines,
        eval_lines=held_out.lines,
    )
    (folder / "dataset.json").write_bytes(orjson.dumps(asdict(stored), option=orjson.OPT_INDENT_2))
    return stored


@dataclass(frozen=True)
class _Source:
    path: Path
    limits: Limits
    columns: str

    def examples(self) -> Iterator[Example]:
        rows = read_rows(self.path, limits=self.limits, columns=self.columns)[1]
        return (row for row in rows if isinstance(row, Example))

    def usable(self, config: TrainConfig) -> DatasetReport:
        """The report, where it lets a run begin. Raises DatasetError naming rows that do not."""
        name, report = self.path.name, inspect(self.path, limits=self.limits, columns=self.columns)
        listed = [f"{name} {problem}" for problem in report.problems[:LISTED]]
        if report.bad_rows > LISTED:
            listed.append(f"… and {report.bad_rows - LISTED:,} more; `python -m qlora_core inspect` lists all")
        if not report.rows:
            raise DatasetError(f"{name}: no row can be used: {report.detection.reason}", *listed)
        if report.bad_rows and not config.skip_bad_rows:
            raise DatasetError(
                f"{name}: {report.bad_rows:,} of {report.read:,} rows have problems; mend them, or leave them out with "
                "skip_bad_rows",
                *listed,
            )
        return report


def _held_out(source: _Source, report: DatasetReport, config: TrainConfig) -> set[int]:
    """Lines of the rows that are held out: at least one, at most all but one. Equal rows go to the same side, or the
    evaluation would ask for what was trained on. Raises DatasetError when there are fewer than two different rows."""
    first_line = dict(report.duplicates)
    different = report.rows - len(first_line)
    if different < 2:
        what = "one usable row" if report.rows == 1 else f"{report.rows:,} rows that are all equal"
        raise DatasetError(
            f"{source.path.name}: has {what}; evaluation needs one of its own, so nothing is left to train on. "
            "Add rows, or name an evaluation file (eval_data)"
        )
    wanted = min(different - 1, max(1, round(different * config.eval_fraction)))
    chosen = set(random.Random(config.seed).sample(range(different), wanted))
    firsts = (example.line for example in source.examples() if example.line not in first_line)
    held = {line for place, line in enumerate(firsts) if place in chosen}
    return held | {line for line, first in first_line.items() if first in held}


@dataclass(frozen=True)
class _Written:
    fingerprint: str
    each: tuple[bytes, ...]
    lines: str

    @property
    def rows(self) -> int:
        return len(self.each)

    @cached_property
    def digests(self) -> frozenset[bytes]:
        return frozenset(self.each)


def _write(path: Path, examples: Iterator[Example]) -> _Written:
    """Write the rows; returns their fingerprint and eight bytes of the digest of each."""
    fingerprint, each, lines = hashlib.sha256(), [], array("q")
    with path.open("wb") as file:
        for example in examples:
            digest = example.digest()
            fingerprint.update(digest)
            each.append(digest[:8])
            lines.append(example.line)
            file.write(orjson.dumps(example.to_json(), option=orjson.OPT_APPEND_NEWLINE))
        file.flush()
        os.fsync(file.fileno())
    counted_up = lines == array("q", range(1, len(lines) + 1))
    return _Written(fingerprint.hexdigest(), tuple(each), "" if counted_up else hashlib.sha256(lines).hexdigest())
