"""The rows of a table -> its records, one at a time: CSV, TSV, Parquet. Knows no form of conversations, and opens no file."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from qlora_core.data.limits import Limits, file_too_large, rest_of_line, too_large
from qlora_core.data.rows import ROW, BlankLine, Problem, Record, Records
from qlora_core.errors import DatasetError

PARQUET_BATCH = 256


def delimiter_of(text: bytes) -> str:
    """The one that parts the header: commas, or what spreadsheets write where a comma is a decimal point."""
    header = re.sub(r'"[^"]*"', "", text.splitlines()[0].decode(errors="replace")) if text else ""
    return max(",;\t|", key=lambda mark: (header.count(mark), mark == ","))


class _TableLines:
    """Lines as csv wants them; what the csv reader cannot tell of them is kept until its row is made."""

    def __init__(self, file: BinaryIO, row_bytes: int) -> None:
        self._file, self._row_bytes = file, row_bytes
        self.number, self.bytes, self.problem = 0, 0, ""

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(self._row_bytes + 2):
            self.number += 1
            self.bytes += len(raw)
            if len(raw) > self._row_bytes + 1:
                self.bytes += rest_of_line(self._file, raw) - len(raw)
                yield "\n"
                continue
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                self.problem = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
                yield raw.decode(errors="replace")

    def of_row(self) -> tuple[int, str]:
        """(bytes, problem) since the last row."""
        found = self.bytes, self.problem
        self.bytes, self.problem = 0, ""
        return found


def table_records(file: BinaryIO, name: str, delimiter: str, limits: Limits) -> Records:
    lines = _TableLines(file, limits.row_bytes)
    csv.field_size_limit(limits.row_bytes)
    # Strict, or a quote that is not closed would swallow the rows after it without a word.
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(row for row in reader if any(cell.strip() for cell in row))]
    except (csv.Error, StopIteration) as error:
        raise DatasetError(f"{name}: its header cannot be read ({error or 'there is none'})") from None
    if problem := lines.of_row()[1]:
        raise DatasetError(f"{name}: its header cannot be read: {problem}")
    header = [cell or f"column {number}" for number, cell in enumerate(header, 1)]
    if twice := [cell for cell, count in Counter(header).items() if count > 1]:
        raise DatasetError(f"{name}: the header names {', '.join(map(repr, twice[:6]))} more than once; rename one")
    while True:
        line = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.of_row()
            reached = f", up to line {lines.number:,}," if lines.number > line else ""
            told = f"cannot be read{reached} as {len(header)} cells: {error}; is a quote unclosed, or not doubled?"
            yield Problem(line, "not a table row", told)
            continue
        size, problem = lines.of_row()
        if size > limits.row_bytes + 2:
            yield Problem(line, "row too large", too_large(size, limits.row_bytes))
        elif problem:
            yield Problem(line, "invalid UTF-8", problem)
        elif not any(cells):
            yield BlankLine(line)
        elif len(cells) != len(header):
            yield Problem(
                line,
                "wrong number of cells",
                f"has {len(cells)} cells, the header has {len(header)}; quote cells that hold {delimiter!r} or a line break",
            )
        else:
            yield Record(line, dict(zip(header, cells, strict=True)), size)


def parquet_records(file: BinaryIO, name: str, limits: Limits) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{name}: cannot be read as Parquet: {_one_line(error)}") from None
    claimed = sum(group.total_byte_size for group in groups)
    too_much = file_too_large(name, limits.file_bytes)
    if claimed > limits.file_bytes:
        raise too_much
    row = unpacked = 0
    try:
        # A row may repeat a large value at next to no cost in the file, so what is unpacked is counted too.
        for batch in table.iter_batches(batch_size=PARQUET_BATCH, use_threads=False):
            unpacked += batch.nbytes
            for values in batch.to_pylist():
                row += 1
                size = _size(values)
                unpacked += size
                if unpacked > 2 * limits.file_bytes:  # each row was counted in its batch, too
                    raise too_much
                if size > limits.row_bytes:
                    yield Problem(row, "row too large", too_large(size, limits.row_bytes), ROW)
                else:
                    yield Record(row, {name: _plain(value) for name, value in values.items()}, size)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield Problem(row + 1, "damaged file", f"the file cannot be read from here on: {_one_line(error)}", ROW)


def _size(value: Any) -> int:
    """About how many bytes of text the value holds."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _plain(value: Any) -> Any:
    """The value without what JSON has no word for: bytes become text where they are some, else how many there are."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return f"({len(value):,} bytes)"
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
