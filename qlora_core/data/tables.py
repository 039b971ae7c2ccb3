"""The rows of a table -> its records, one at a time: CSV, TSV, Parquet. Knows no form of conversations, and opens no file."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from qlora_core.data.limits import Limits, file_too_large, rest_of_line, too_large
from qlora_core.data.rows import ROW, BlankLine, Problem, Record, Records
from qlora_core.errors import DatasetError

# Rows of a Parquet file that are read at once, and what they may unpack to; values of one column of lists in a row group,
# all of which may be one row's; and what of them is made into Python values at once.
PARQUET_BATCH, PARQUET_BYTES, PARQUET_GROUP_BYTES = 256, 64_000_000, 2_000_000_000
SLICE_BYTES = 4_000_000


def delimiter_of(text: bytes) -> str:
    """The one that parts the header: commas, or what spreadsheets write where a comma is a decimal point."""
    header = re.sub(r'"[^"]*"', "", text.splitlines()[0].decode(errors="replace")) if text else ""
    return max(",;\t|", key=lambda mark: (header.count(mark), mark == ","))


class _Unending(Exception):
    """A row goes on and on: its quote is not closed, or it is too large."""


class _TableLines:
    """Lines as csv wants them; what the csv reader cannot tell of them is kept until its row is made. `__next__` raises
    _Unending where a row has more bytes than are allowed and wants another line, so no more than two rows' are held."""

    def __init__(self, file: BinaryIO, row_bytes: int) -> None:
        self._file, self._row_bytes = file, row_bytes
        self.number, self.bytes, self.problem = 0, 0, ""

    def __iter__(self) -> "_TableLines":
        return self

    def __next__(self) -> str:
        if self.bytes > self._row_bytes + 2:
            raise _Unending
        if not (raw := self._file.readline(self._row_bytes + 2)):
            raise StopIteration
        self.number += 1
        self.bytes += len(raw)
        if len(raw) > self._row_bytes + 1:
            self.bytes += rest_of_line(self._file, raw) - len(raw)
            return "\n"
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.problem = (
                f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 (from Excel?); save it as UTF-8"
            )
            return raw.decode(errors="replace")

    def of_row(self) -> tuple[int, str]:
        """(bytes, problem) since the last row."""
        found = self.bytes, self.problem
        self.bytes, self.problem = 0, ""
        return found


def table_records(file: BinaryIO, name: str, delimiter: str, limits: Limits) -> Records:
    lines = _TableLines(file, limits.row_bytes)
    csv.field_size_limit(2 * limits.row_bytes + 4)  # never reached, see _TableLines
    # Strict, or a quote that is not closed would swallow the rows after it without a word.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        while not any(header := [cell.strip() for cell in next(reader)]):
            lines.of_row()
    except (csv.Error, StopIteration, _Unending) as error:
        why = "a quote is not closed" if isinstance(error, _Unending) else error or "there is none"
        raise DatasetError(f"{name}: its header cannot be read ({why})") from None
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
        except (csv.Error, _Unending) as error:
            lines.of_row()
            reached = f", up to line {lines.number:,}," if lines.number > line else ""
            if isinstance(error, _Unending):
                kind, why = "row too large", f"it has more than {limits.row_bytes:,} bytes"
            else:
                kind, why = "not a table row", str(error)
            told = f"cannot be read{reached} as {len(header)} cells: {why}; is a quote unclosed, or not doubled?"
            yield Problem(line, kind, told)
            # Each may have been a row.
            for inside in range(line + 1, lines.number + 1):
                yield Problem(inside, kind, f"cannot be read: a quote in line {line:,} goes on in this line")
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
    """A value may be repeated at next to no cost in the file. So no more is read at once than a known number of bytes, and
    a row becomes Python values only once its size is known to be allowed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = unpacked = 0
    try:
        table = pq.ParquetFile(file, buffer_size=1 << 20)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        columns, schema = _column_names(table.schema_arrow.names, name), table.schema
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{name}: cannot be read as Parquet: {_one_line(error)}") from None
    too_much = file_too_large(name, limits.file_bytes)
    if sum(group.total_byte_size for group in groups) > limits.file_bytes:
        raise too_much
    try:
        for number, group in enumerate(groups):
            table, rows_at_once = _bounded(file, group, number, schema, name)
            for batch in table.iter_batches(rows_at_once, [number], use_threads=False):
                sizes = sum(map(_sizes, batch.columns), np.zeros(batch.num_rows, np.int64))
                for begin, end in _slices(sizes, limits.row_bytes):
                    unpacked += int(sizes[begin:end].sum())
                    if unpacked > limits.file_bytes:
                        raise too_much
                    if (size := int(sizes[begin])) > limits.row_bytes:
                        row += 1
                        yield Problem(row, "row too large", too_large(size, limits.row_bytes), ROW)
                        continue
                    for size, *values in zip(sizes[begin:end].tolist(), *_values(batch, begin, end), strict=True):
                        row += 1
                        yield Record(row, dict(zip(columns, map(_plain, values), strict=True)), size)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield Problem(row + 1, "damaged file", f"the file cannot be read from here on: {_one_line(error)}", ROW)


def _column_names(names: list[str], file_name: str) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DatasetError(f"{file_name}: has more than one column {', '.join(map(repr, twice[:6]))}; rename one")
    return names


class _Closed(io.RawIOBase):
    """A file that can be read until it is closed to readers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.is_closed_to_readers = file, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if self.is_closed_to_readers:
            raise OSError(_CLOSED)
        return self._file.read(size)


_CLOSED = "closed to readers"


def _check_columns(file: BinaryIO, group: int) -> None:
    """Raises what reading the group would, where what the file tells of its columns is damaged: asked for it directly,
    pyarrow ends the process. It is found before the first byte of the columns is read."""
    import pyarrow.parquet as pq

    closed = _Closed(file)
    table = pq.ParquetFile(closed, buffer_size=1 << 20)
    closed.is_closed_to_readers = True
    try:
        next(table.iter_batches(1, [group], use_threads=False), None)
    except OSError as error:
        if _CLOSED not in str(error):
            raise


def _bounded(file: BinaryIO, group: Any, number: int, schema: Any, name: str) -> tuple[Any, int]:
    """(the file, opened to read this group so that no text of a list is unpacked twice; rows to read at once)."""
    import pyarrow.parquet as pq

    _check_columns(file, number)
    # Bytes of one row: of what has a fixed width, and with texts as long as the whole dictionary.
    fixed, most, by_reference, texts = 1, 1, False, []
    for place in range(group.num_columns):
        column, leaf = group.column(place), schema.column(place)
        width = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "FIXED_LEN_BYTE_ARRAY": leaf.length}.get(leaf.physical_type, 8)
        is_text = leaf.physical_type == "BYTE_ARRAY"
        longest = _dictionary_bytes(file, column) if is_text and column.has_dictionary_page else 0
        texts += [column.path_in_schema] if is_text else []
        if leaf.max_repetition_level:  # one row may hold all values of the group
            if column.num_values * width > PARQUET_GROUP_BYTES:
                told = f"{name}: column {column.path_in_schema!r} has {column.num_values:,} values in one row group"
                raise DatasetError(f"{told}; write it in smaller row groups")
            by_reference |= column.num_values * longest > PARQUET_BYTES
        else:
            fixed, most = fixed + width, most + width + longest
    if not by_reference:
        return pq.ParquetFile(file, buffer_size=1 << 20), max(1, min(PARQUET_BATCH, PARQUET_BYTES // most))
    # Each batch comes with all texts that the group had so far, so there are few.
    at_once = min(max(PARQUET_BATCH, group.num_rows // 6), PARQUET_BYTES // fixed)
    return pq.ParquetFile(file, buffer_size=1 << 20, read_dictionary=texts), max(1, at_once)


def _dictionary_bytes(file: BinaryIO, column: Any) -> int:
    """How large the dictionary of a column is once it is unpacked: the second number of its page header, as Thrift has it:
    a byte that announces a whole number, then seven bits a byte, the sign last."""
    file.seek(column.dictionary_page_offset)
    found = re.match(rb"\x15[\x80-\xff]{0,4}[\x00-\x7f]\x15([\x80-\xff]{0,4}[\x00-\x7f])", file.read(16), re.DOTALL)
    if not found:
        raise ValueError(f"the dictionary of column {column.path_in_schema!r} has no readable header")
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[1])) >> 1


def _sizes(array: Any) -> np.ndarray:
    """[rows]: about how many bytes each value is once it is unpacked; eight for what is no text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _sizes(array.storage)
    if pa.types.is_dictionary(kind):
        numbers = array.indices.cast(pa.int64()).fill_null(len(array.dictionary))
        return np.append(_sizes(array.dictionary), 0)[numbers.to_numpy()]
    if pa.types.is_struct(kind):
        return sum((_sizes(part) for part in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_nested(kind):
        ends = pc.list_value_length(array).fill_null(0).to_numpy().cumsum()
        totals = np.append(0, _sizes(array.flatten()).cumsum())[np.append(0, ends)]
        return np.diff(totals)
    if pa.types.is_fixed_size_binary(kind):
        return np.full(len(array), kind.byte_width, np.int64)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return pc.binary_length(array).fill_null(0).to_numpy().astype(np.int64)
    return np.full(len(array), 8, np.int64)


def _slices(sizes: np.ndarray, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of rows that are together small enough to be held; one that is too large stands alone."""
    begin, totals = 0, sizes.cumsum()
    while begin < len(sizes):
        before = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, before + max(row_bytes, SLICE_BYTES), side="right")))
        large = np.flatnonzero(sizes[begin:end] > row_bytes)
        if len(large):
            end = begin + max(1, int(large[0]))
        yield begin, end
        begin = end


def _values(batch: Any, begin: int, end: int) -> list[list[Any]]:
    """Values of the rows, a list a column."""
    return [column.slice(begin, end - begin).to_pylist() for column in batch.columns]


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
