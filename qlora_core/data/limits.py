"""How much of a file is read, what is said where there is more, and how it is passed over. Knows no kind of file."""

from dataclasses import dataclass
from typing import BinaryIO

from qlora_core.errors import DatasetError


@dataclass(frozen=True)
class Limits:
    """What a file may grow to: bytes of one row, and of the whole file once it is unpacked, and its rows, be they usable,
    damaged or blank."""

    row_bytes: int = 1_000_000
    file_bytes: int = 20_000_000_000
    rows: int = 10_000_000


DEFAULT_LIMITS = Limits()


def too_large(size: int, limit: int) -> str:
    return f"the row has {size:,} bytes, the limit is {limit:,}; split the row, or raise QLORA_LAB_MAX_ROW_BYTES if it is meant"


def file_too_large(name: str, limit: int) -> DatasetError:
    return DatasetError(
        f"{name}: has more than {limit:,} bytes once it is unpacked; take a part of it, or raise "
        "QLORA_LAB_MAX_DATASET_BYTES if it is meant"
    )


def too_many_rows(name: str, limit: int) -> DatasetError:
    return DatasetError(
        f"{name}: has more than {limit:,} rows, damaged and blank ones counted, which is twice what QLORA_LAB_MAX_ROWS lets "
        "a run train on; take a part of it, or raise QLORA_LAB_MAX_ROWS if it is meant"
    )


def rest_of_line(file: BinaryIO, raw: bytes) -> int:
    """Bytes of a line whose beginning was read; the rest of it is skipped."""
    size = len(raw)
    while not raw.endswith(b"\n") and (raw := file.readline(1 << 20)):
        size += len(raw)
    return size
