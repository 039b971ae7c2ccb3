"""A dataset file of any kind -> its records, one at a time: JSONL, a JSON array, CSV, TSV, Parquet, each also as .gz.

Knows no format of conversations. Holds no more than two rows, of Parquet a batch (where lists repeat texts, the texts of a
row group once), whatever the file claims to be.
"""

import gzip
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_core.data.json_rows import array_elements, parsed
from qlora_core.data.limits import Limits, file_too_large, rest_of_line, too_large, too_many_rows
from qlora_core.data.rows import LINE, ROW, BlankLine, Problem, Record, Records, Unusable
from qlora_core.data.tables import delimiter_of, parquet_records, table_records
from qlora_core.errors import DatasetError

JSONL, JSON_ARRAY, CSV, TSV, PARQUET = "JSONL", "JSON array", "CSV", "TSV", "Parquet"
# What other kinds of file start with, and what to do with them.
MAGIC = {
    b"PK\x03\x04": "a zip archive or spreadsheet; unpack it, or save the sheet as CSV",
    b"\x1f\x8b": "compressed with gzip twice; unpack it once",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"(\xb5/\xfd": "compressed with zstd; unpack it, or use gzip",
    b"BZh": "compressed with bzip2; unpack it, or use gzip",
    b"\xfd7zXZ": "compressed with xz; unpack it, or use gzip",
}
GZIP, PARQUET_MAGIC, MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
HEAD_BYTES = 8192
WATCH_EVERY = 2000


@dataclass(frozen=True)
class FileKind:
    """What a file is, by its content first and its name second. `unit` is what its records are counted in."""

    name: str
    gzipped: bool
    byte_order_mark: bool
    delimiter: str = ""

    @property
    def unit(self) -> str:
        return ROW if self.name in (JSON_ARRAY, PARQUET) else LINE

    def __str__(self) -> str:
        separated = {";": ", semicolons", "|": ", bars", "\t": ", tabs"}.get(self.delimiter, "") * (self.name == CSV)
        return self.name + separated + (", gzip" if self.gzipped else "")


# (bytes of the file read, of how many); raises to end the reading.
Watch = Callable[[int, int], None]


def kind_of(path: Path) -> FileKind:
    """Raises DatasetError where no row of the file can be read: it is missing, empty, or of another kind."""
    try:
        if path.is_dir():
            raise DatasetError(f"{path.name}: is a folder; name a file in it")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        size = path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    gzipped = head.startswith(GZIP)
    name = path.name.lower()
    if gzipped:
        name = name.removesuffix(".gz")
        head, size = _unpacked_head(path)
    text = head.removeprefix(MARK).lstrip(BLANK)
    if size <= len(head) and not text:
        raise DatasetError(f"{path.name}: is empty; expected rows as JSONL, a JSON array, CSV, TSV or Parquet")
    if head.startswith(PARQUET_MAGIC):
        return FileKind(PARQUET, gzipped, False)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise DatasetError(f"{path.name}: is {what}; expected JSONL, a JSON array, CSV, TSV or Parquet")
    if b"\x00" in head and not text.startswith(b"{"):
        raise DatasetError(f"{path.name}: is a binary file; expected JSONL, a JSON array, CSV, TSV or Parquet")
    marked = head.startswith(MARK)
    if name.endswith((".csv", ".tsv")) and not text.startswith(b"{"):
        kind = TSV if name.endswith(".tsv") else CSV
        return FileKind(kind, gzipped, marked, "\t" if kind == TSV else delimiter_of(text))
    return FileKind(JSON_ARRAY if text.startswith(b"[") else JSONL, gzipped, marked)


def read_records(path: Path, limits: Limits, *, watch: Watch | None = None) -> Records:
    """Every record of the file in order. A damaged row is a Problem; what comes after it is read on where it can be.

    Raises DatasetError as `kind_of` does, and where the file is larger or has more rows than the limits allow.
    """
    kind = kind_of(path)
    with ExitStack() as stack:
        packed = stack.enter_context(path.open("rb"))
        if kind.name == PARQUET:
            file = _seekable(packed, path, limits, stack) if kind.gzipped else packed
            records = parquet_records(file, path.name, limits)
        else:
            raw: Any = gzip.GzipFile(fileobj=packed) if kind.gzipped else packed
            file = io.BufferedReader(_Counted(raw, path.name, limits.file_bytes), 1 << 20)
            if kind.byte_order_mark:
                file.read(len(MARK))
            if kind.name == JSON_ARRAY:
                records = _json(array_elements(file, limits.row_bytes), ROW)
            elif kind.name == JSONL:
                records = _json(_lines(file, limits.row_bytes), LINE)
            else:
                records = table_records(file, path.name, kind.delimiter, limits)
        size, last = path.stat().st_size, 0
        try:
            for number, record in enumerate(records):
                if watch and number % WATCH_EVERY == 0:
                    watch(packed.tell(), size)
                if number >= limits.rows:
                    raise too_many_rows(path.name, limits.rows)
                last = record.line
                yield record
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Problem(last + 1, "damaged file", f"the compressed file is damaged from here on ({error})", kind.unit)
        if watch:
            watch(size, size)


def _unpacked_head(path: Path) -> tuple[bytes, int]:
    """(first bytes, a size that is larger than them where more follow)."""
    try:
        with gzip.open(path) as file:
            head = file.read(HEAD_BYTES + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise DatasetError(f"{path.name}: begins as a gzip file and cannot be unpacked ({error})") from None
    return head[:HEAD_BYTES], len(head)


class _Counted(io.RawIOBase):
    """Passes bytes on until there are more than the limit allows: a small archive can stand for a file without end."""

    def __init__(self, file: Any, name: str, most_bytes: int) -> None:
        self._file, self._name, self._most, self._read = file, name, most_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Not `read`, which throws away what it has unpacked before the place where an archive is damaged.
        data = self._file.read1(len(buffer))
        self._read += len(data)
        if self._read > self._most:
            raise file_too_large(self._name, self._most)
        buffer[: len(data)] = data
        return len(data)


def _seekable(packed: BinaryIO, path: Path, limits: Limits, stack: ExitStack) -> BinaryIO:
    """A Parquet file is read from its end, which a gzip stream cannot do."""
    file: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    source = _Counted(gzip.GzipFile(fileobj=packed), path.name, limits.file_bytes)
    buffer = bytearray(1 << 20)
    try:
        while count := source.readinto(buffer):
            file.write(buffer[:count])
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path.name}: the compressed file is damaged ({error})") from None
    file.seek(0)
    return file


# --- JSON --------------------------------------------------------------------------------------------------------------


def _lines(file: BinaryIO, row_bytes: int) -> Iterator[tuple[int, bytes | Problem]]:
    line = 0
    while raw := file.readline(row_bytes + 2):
        line += 1
        if len(raw) > row_bytes and len(raw.removesuffix(b"\n").removesuffix(b"\r")) > row_bytes:
            yield line, Problem(line, "row too large", too_large(rest_of_line(file, raw), row_bytes))
        else:
            yield line, raw


def _json(documents: Iterator[tuple[int, bytes | Problem]], unit: str) -> Records:
    for line, raw in documents:
        if isinstance(raw, Problem):
            yield raw
        elif not raw.strip():
            yield BlankLine(line)
        else:
            try:
                values, is_clean = parsed(raw)
            except Unusable as problem:
                yield Problem(line, *problem.args, unit=unit)
            else:
                yield Record(line, values, len(raw), is_clean)
