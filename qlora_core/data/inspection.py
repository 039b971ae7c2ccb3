"""A file -> DatasetReport: format, counts, every bad row with its reason. Streams; memory grows only with what it lists."""

import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core.data.detection import Detection
from qlora_core.data.files import Watch, kind_of
from qlora_core.data.formats import read_rows
from qlora_core.data.limits import DEFAULT_LIMITS, Limits
from qlora_core.data.rows import BlankLine, Example, Problem, counted
from qlora_core.data.scripts import scripts_of
from qlora_core.errors import DatasetError

# Problems and duplicates that a report holds; and problems that `on_problem` gets, for a list on disk.
LISTED, MOST_PROBLEMS_LISTED = 1000, 200_000


@dataclass(frozen=True)
class DatasetReport:
    """What a file holds. `duplicates` are (line, line of the first equal row), `problems` the first LISTED, both in file
    order; `problem_lines` are all (of a report that was read back, as many as there are problems). `ignored_columns` counts
    the rows that have a column which training does not use, `empty_fields` the rows where a column is there and empty,
    `scripts` the rows with letters of a script."""

    file_name: str
    size_bytes: int
    kind: str
    unit: str
    detection: Detection
    rows: int
    turns: int
    characters: int
    bad_rows: int
    duplicate_rows: int
    problems: tuple[Problem, ...]
    problem_counts: dict[str, int]
    problem_lines: array
    blank_lines: int
    duplicates: tuple[tuple[int, int], ...]
    byte_order_mark: bool
    ignored_columns: dict[str, int]
    empty_fields: dict[str, int]
    scripts: dict[str, int]
    seconds: float
    eval_rows_also_here: int | None = None

    @property
    def form(self) -> str | None:
        return self.detection.form if self.rows else None

    @property
    def read(self) -> int:
        """Rows of the file, whatever they are; blank lines are none."""
        return self.rows + self.bad_rows

    @property
    def problems_listed(self) -> int:
        """How many problems `on_problem` got: the first of them, where there are very many."""
        return min(self.bad_rows, MOST_PROBLEMS_LISTED)

    def summary(self) -> str:
        """One line: "support_tickets.jsonl · 240 rows · Alpaca columns · 0 problems · 3 duplicates"."""
        parts = [self.file_name, counted(self.rows, "usable row"), self.form or "no known form"]
        parts.append(counted(self.bad_rows, "problem"))
        if self.problems_listed < self.bad_rows:
            parts.append(f"the first {self.problems_listed:,} of them are listed")
        parts.append(counted(self.duplicate_rows, "duplicate"))
        if self.blank_lines:
            parts.append(counted(self.blank_lines, "blank line"))
        if self.byte_order_mark:
            parts.append("byte-order mark skipped")
        if self.ignored_columns:
            parts.append(f"not used: {', '.join(list(self.ignored_columns)[:6])}")
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The whole report; of long lists the first LISTED, and how long they are."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "problem_lines"}
        return values | {
            "form": self.form,
            "problems_listed": self.problems_listed,
            "detection": asdict(self.detection),
            "problems": [{"line": p.line, "kind": p.kind, "message": p.message} for p in self.problems],
            "duplicates": [{"line": line, "first_line": first} for line, first in self.duplicates[:LISTED]],
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DatasetReport":
        """The same report but for what is longer than LISTED."""
        problems = tuple(Problem(**problem, unit=values["unit"]) for problem in values["problems"])
        pairs = tuple((pair["line"], pair["first_line"]) for pair in values["duplicates"])
        changed = {"detection": Detection.from_json(values["detection"]), "problems": problems, "duplicates": pairs}
        changed["problem_lines"] = array("q", (problem.line for problem in problems))
        return cls(**{name: (values | changed)[name] for name in cls.__dataclass_fields__})


def inspect(
    path: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    columns: str = "",
    eval_path: Path | None = None,
    on_row: Callable[[Example], None] | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    watch: Watch | None = None,
) -> DatasetReport:
    """Read the whole file once, and `eval_path`, whose rows are looked for in it, too.

    `on_row` gets every row as it is read, `on_problem` the first MOST_PROBLEMS_LISTED. Raises DatasetError where nothing of
    the file can be read.
    """
    begun = time.monotonic()
    kind = kind_of(path)
    detection, rows = read_rows(path, limits=limits, columns=columns, watch=watch)
    has_input = any(name in detection.seen for name in detection.columns.get("input", ()))
    lines, digests, problem_lines = array("q"), array("Q"), array("q")
    problems: list[Problem] = []
    kinds: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    turns = characters = blank = 0
    for row in rows:
        if isinstance(row, Example):
            text = row.text
            lines.append(row.line)
            digests.append(short_digest(row))
            turns += sum(message.role == "assistant" for message in row.messages)
            characters += len(text)
            if row.columns:
                ignored.update(row.columns.keys())
                empty.update(name for name, value in row.columns.items() if value is None or value == "")
            if has_input and not row.input:
                empty["input"] += 1
            scripts.update(scripts_of(text))
            if on_row:
                on_row(row)
        elif isinstance(row, BlankLine):
            blank += 1
        else:
            kinds[row.kind] += 1
            problem_lines.append(row.line)
            if len(problems) < LISTED:
                problems.append(row)
            if on_problem and len(problem_lines) <= MOST_PROBLEMS_LISTED:
                on_problem(row)
    shared = None
    if eval_path is not None:
        shared = _shared(digests, eval_path, limits=limits, columns=columns)
    duplicates = _duplicates(lines, digests)
    return DatasetReport(
        file_name=path.name,
        size_bytes=path.stat().st_size,
        kind=str(kind),
        unit=kind.unit,
        detection=detection,
        rows=len(lines),
        turns=turns,
        characters=characters,
        bad_rows=len(problem_lines),
        duplicate_rows=len(duplicates),
        problems=tuple(problems),
        problem_counts=dict(kinds.most_common()),
        problem_lines=problem_lines,
        blank_lines=blank,
        duplicates=duplicates,
        byte_order_mark=kind.byte_order_mark,
        ignored_columns=dict(ignored.most_common()),
        empty_fields=dict(empty.most_common()),
        scripts=dict(scripts.most_common()),
        seconds=time.monotonic() - begun,
        eval_rows_also_here=shared,
    )


def short_digest(example: Example) -> int:
    """Eight bytes of the digest: a false duplicate among a million rows has a chance of 3 in 10^8."""
    return int.from_bytes(example.digest()[:8])


def _duplicates(lines: array, digests: array) -> tuple[tuple[int, int], ...]:
    """(line, line of the first equal row), in file order. Sorting needs a tenth of the memory of a dictionary."""
    if not lines:
        return ()
    line, digest = np.frombuffer(lines, np.int64), np.frombuffer(digests, np.uint64)
    order = np.argsort(digest, kind="stable")
    ordered = digest[order]
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    first = np.repeat(order[begins], np.diff(np.r_[begins, len(order)]))
    again = order != first
    pairs = sorted(zip(line[order[again]].tolist(), line[first[again]].tolist(), strict=True))
    return tuple(pairs)


def _shared(digests: array, eval_path: Path, *, limits: Limits, columns: str) -> int:
    """How many of the other file's rows are rows of this one."""
    try:
        rows = read_rows(eval_path, limits=limits, columns=columns)[1]
    except DatasetError:
        # The evaluation file may lack the columns and be of a known form.
        detection, rows = read_rows(eval_path, limits=limits)
        if not detection.form:
            raise
    other = array("Q", (short_digest(row) for row in rows if isinstance(row, Example)))
    return int(np.isin(np.frombuffer(other, np.uint64), np.frombuffer(digests, np.uint64)).sum()) if other else 0
