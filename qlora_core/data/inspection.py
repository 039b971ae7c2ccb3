"""A file -> DatasetReport: form, counts, every bad line with its reason. Streams; memory grows only with what it lists."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.data.rows import BlankLine, Problem, read_rows


@dataclass(frozen=True)
class DatasetReport:
    """What a file holds. `duplicates` are (line, line of the first equal row); `problems` are in file order.
    `ignored_columns` counts the rows that have a column which training does not use."""

    file_name: str
    size_bytes: int
    form: str | None
    rows: int
    turns: int
    problems: tuple[Problem, ...]
    blank_lines: int
    duplicates: tuple[tuple[int, int], ...]
    byte_order_mark: bool
    ignored_columns: dict[str, int]

    @property
    def problem_counts(self) -> dict[str, int]:
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def summary(self) -> str:
        """One line: "support_tickets.jsonl · 240 rows · Alpaca columns · 0 problems · 3 duplicates"."""
        parts = [self.file_name, _counted(self.rows, "usable row"), self.form or "no known form"]
        parts.append(_counted(len(self.problems), "problem"))
        parts.append(_counted(len(self.duplicates), "duplicate"))
        if self.blank_lines:
            parts.append(_counted(self.blank_lines, "blank line"))
        if self.byte_order_mark:
            parts.append("byte-order mark skipped")
        if self.ignored_columns:
            parts.append(f"not used: {', '.join(list(self.ignored_columns)[:6])}")
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "file_name": self.file_name,
            "size_bytes": self.size_bytes,
            "form": self.form,
            "rows": self.rows,
            "turns": self.turns,
            "problem_counts": self.problem_counts,
            "problems": [{"line": p.line, "kind": p.kind, "message": p.message} for p in self.problems],
            "blank_lines": self.blank_lines,
            "duplicates": [{"line": line, "first_line": first} for line, first in self.duplicates],
            "byte_order_mark": self.byte_order_mark,
            "ignored_columns": self.ignored_columns,
        }


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def inspect(path: Path, *, max_row_bytes: int) -> DatasetReport:
    """Read the whole file once. Raises DatasetError where it cannot be read as lines of text at all."""
    rows = turns = blank = 0
    problems: list[Problem] = []
    duplicates: list[tuple[int, int]] = []
    first_line: dict[bytes, int] = {}
    form = None
    ignored: Counter[str] = Counter()
    for row in read_rows(path, max_row_bytes=max_row_bytes):
        if isinstance(row, Problem):
            problems.append(row)
        elif isinstance(row, BlankLine):
            blank += 1
        else:
            rows += 1
            turns += sum(message.role == "assistant" for message in row.messages)
            form = row.form
            ignored.update(row.ignored)
            # Eight bytes of the digest: a false duplicate among a million rows has a chance of 3 in 10^8.
            key = row.digest()[:8]
            if key in first_line:
                duplicates.append((row.line, first_line[key]))
            else:
                first_line[key] = row.line
    with path.open("rb") as file:
        marked = file.read(3) == b"\xef\xbb\xbf"
    return DatasetReport(
        path.name,
        path.stat().st_size,
        form,
        rows,
        turns,
        tuple(problems),
        blank,
        tuple(duplicates),
        marked,
        dict(ignored.most_common()),
    )
