"""Lists for a person as CSV files whose cells no spreadsheet takes for formulas."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# What makes a spreadsheet calculate (https://owasp.org/www-community/attacks/CSV_Injection).
_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")


class Listing:
    """A CSV file that is written row by row; `with` closes it."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(header)

    def add(self, *cells: Any) -> None:
        self._writer.writerow([safe_cell(cell) for cell in cells])

    def __enter__(self) -> "Listing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def safe_cell(value: Any) -> Any:
    """Text that would start a formula gets a leading apostrophe; numbers stay numbers."""
    if isinstance(value, str) and value.lstrip(" ").startswith(_STARTS):
        return f"'{value}"
    return value


def write_listing(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with Listing(path, header) as listing:
        for row in rows:
            listing.add(*row)
