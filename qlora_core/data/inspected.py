"""An inspected file on disk: its report, lists of what is wrong, and its usable rows, each to be had at once by number.

Made once for a file, by whoever asks first; the page reads it after any reload. Knows no model.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qlora_core.data.detection import parse_columns
from qlora_core.data.files import Watch, kind_of
from qlora_core.data.formats import detection_of
from qlora_core.data.inspection import LISTED, DatasetReport, inspect, short_digest
from qlora_core.data.listing import Listing, write_listing
from qlora_core.data.near_duplicates import NearDuplicates
from qlora_core.data.rows import Example, Problem
from qlora_core.runs import lock
from qlora_core.settings import Settings
from qlora_core.storage import sync

# Changes with what is written here.
VERSION = 3
REPORT, ROWS, PROBLEMS, DUPLICATES = "report.json", "rows.jsonl", "problems.csv", "duplicates.csv"


def folder_of(path: Path, settings: Settings, *, columns: str = "") -> Path:
    """Where the inspection of this very file lies, or will. Raises OSError where the file is gone."""
    stat = path.stat()
    told = [VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, columns, vars(settings.limits)]
    return settings.home / "inspected" / hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


def inspect_into(
    path: Path, settings: Settings, *, columns: str = "", eval_path: Path | None = None, watch: Watch | None = None
) -> "Inspected":
    """Inspect the file and keep all of it; what is kept already is returned at once. Raises DatasetError.

    The rows of `eval_path` are looked for in it; it is inspected and kept, too.
    """
    kind_of(path)
    if columns:
        parse_columns(columns)
    folder = folder_of(path, settings, columns=columns)
    kept = Inspected(folder)
    if not kept.is_whole():
        _inspect_into(folder, path, settings, columns, watch)
        kept = Inspected(folder)
    if eval_path is None:
        return kept
    # As in training, the chosen columns are those of a file in no known form.
    known = bool(columns) and detection_of(eval_path, settings.limits).form
    other = inspect_into(eval_path, settings, columns="" if known else columns, watch=watch)
    return replace(kept, eval_rows_also_here=int(np.isin(other.digests, kept.digests).sum()))


def _inspect_into(folder: Path, path: Path, settings: Settings, columns: str, watch: Watch | None) -> None:
    with ExitStack() as stack:
        partial = stack.enter_context(_partial_folder(folder.parent))
        offsets, characters, digests = array("q", [0]), array("q"), array("Q")
        with (partial / ROWS).open("wb") as rows, Listing(partial / PROBLEMS, ("line", "kind", "problem")) as problems:

            def keep(example: Example) -> None:
                written = rows.write(_bytes(example))
                offsets.append(offsets[-1] + written)
                characters.append(len(example.text))
                digests.append(short_digest(example))

            def list_problem(problem: Problem) -> None:
                problems.add(problem.line, problem.kind, problem.message)

            report = inspect(
                path,
                limits=settings.limits,
                columns=columns,
                on_row=keep,
                on_problem=list_problem,
                watch=watch,
            )
        np.save(partial / "offsets.npy", np.frombuffer(offsets, np.int64))
        np.save(partial / "characters.npy", np.array(characters, np.int64))
        np.save(partial / "digests.npy", np.array(digests, np.uint64))
        write_listing(partial / DUPLICATES, ("line", "line of the first equal row"), report.duplicates)
        (partial / REPORT).write_bytes(orjson.dumps(report.to_json()))
        for file in partial.iterdir():
            sync(file)
        if folder.exists() and not Inspected(folder).is_whole():
            shutil.rmtree(folder)
        if not folder.exists():
            partial.rename(folder)


@contextmanager
def _partial_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it was renamed. What killed processes have left is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    owner = partial.with_suffix(".lock")  # held as long as someone works in the folder
    with ExitStack() as stack:
        with lock(parent.with_name(f".{parent.name}.lock"), wait=True):
            for left in parent.glob(".*.partial"):
                with lock(left.with_suffix(".lock")) as held:
                    if held is not None:
                        shutil.rmtree(left, ignore_errors=True)
                        left.with_suffix(".lock").unlink(missing_ok=True)
            stack.enter_context(lock(owner))
            partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            owner.unlink(missing_ok=True)


def _bytes(example: Example) -> bytes:
    values = example.to_json() | {"columns": example.columns}
    try:
        return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE, default=str)
    except TypeError:  # a number of more than 64 bits, or half a character in a column that is not read
        return json.dumps(values, default=str).encode() + b"\n"


@dataclass(frozen=True)
class Inspected:
    """What `inspect_into` has kept."""

    folder: Path
    eval_rows_also_here: int | None = None

    @cached_property
    def report(self) -> DatasetReport:
        report = DatasetReport.from_json(orjson.loads((self.folder / REPORT).read_bytes()))
        return replace(report, eval_rows_also_here=self.eval_rows_also_here)

    def is_whole(self) -> bool:
        """Whether it is there, and no crash of the machine has emptied its report or its arrays."""
        try:
            return self.report.rows == len(self) == len(self.digests) == len(self.characters)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            return False

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def characters(self) -> np.ndarray:
        """[rows]: characters of each usable row."""
        return np.load(self.folder / "characters.npy", mmap_mode="r")

    @cached_property
    def digests(self) -> np.ndarray:
        """[rows]: eight bytes of the digest of each usable row."""
        return np.load(self.folder / "digests.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, number: int) -> Example:
        """Usable row `number`, from 1. Raises IndexError."""
        if not 1 <= number <= len(self):
            raise IndexError(number)
        begin, end = self._offsets[number - 1 : number + 1].tolist()
        with (self.folder / ROWS).open("rb") as file:
            file.seek(begin)
            return _example(file.read(end - begin))

    def longest(self) -> int:
        """Number of the row with the most characters; 0 without rows."""
        return int(self.characters.argmax()) + 1 if len(self) else 0

    def shortest(self) -> int:
        return int(self.characters.argmin()) + 1 if len(self) else 0

    def search(self, wanted: str, after: int, *, keep_on: Callable[[], bool] = lambda: True) -> int | None:
        """Number of the next row that holds the text, upper and lower case alike, going round at the end; None without one."""
        # Text stands in the file as JSON writes it; what would be escaped there is compared row by row.
        folded = wanted.casefold()
        begin = int(self._offsets[min(max(after, 0), len(self))])
        size = int(self._offsets[-1])
        with (self.folder / ROWS).open("rb") as file:
            for first, last in ((begin, size), (0, begin)):
                file.seek(first)
                while (place := file.tell()) < last and keep_on():
                    if folded in _example(file.readline()).text.casefold():
                        return int(np.searchsorted(self._offsets, place, side="right"))
        return None


def near_duplicates(kept: Inspected, threshold: float, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Rows that are like an earlier one: how many, the first of them, and how long it took. All stand in near_duplicates.csv."""
    begun, path = time.monotonic(), kept.folder / f"near_duplicates-{threshold:g}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    near = NearDuplicates(threshold=threshold)
    with (kept.folder / ROWS).open("rb") as rows:
        for number, raw in enumerate(rows):
            if number % 500 == 0:
                report(number, len(kept))
            example = _example(raw)
            near.add(example.line, example.text)
    pairs = near.pairs()
    write_listing(
        kept.folder / f"near_duplicates-{threshold:g}.csv",
        ("line", "line of an earlier row", "estimated similarity"),
        ((pair.line, pair.first_line, round(pair.similarity, 3)) for pair in pairs),
    )
    found = {
        "threshold": threshold,
        "count": len(pairs),
        "pairs": [asdict(pair) for pair in pairs[:LISTED]],
        "not_fully_compared": near.not_fully_compared,
        "seconds": round(time.monotonic() - begun, 2),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    partial.write_text(json.dumps(found))
    sync(partial)
    partial.rename(path)
    return found


def _example(raw: bytes) -> Example:
    values: dict[str, Any] = json.loads(raw)
    columns = values.pop("columns", {})
    example = Example.from_json(values)
    return Example(example.line, example.messages, example.input, "", columns, example.tools)
