"""A prepared dataset on disk: rows as JSONL and Parquet, lineage, data card, what changed. Decides nothing about the rows."""

import glob
import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qlora_core import architecture, token_cache
from qlora_core.data.card import data_card
from qlora_core.data.detection import ALPACA, MESSAGES, TEXT
from qlora_core.data.formats import canonical, fits_alpaca, read_rows, row_of
from qlora_core.data.inspection import short_digest
from qlora_core.data.limits import Limits
from qlora_core.data.locate import LINEAGE
from qlora_core.data.rows import Example
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings
from qlora_core.storage import sync
from qlora_core.tokens import load_tokenizer

# File of each split: as rows, and as the Hub wants it. The Hub's name for rows to evaluate on is validation.
TRAIN, EVAL = "train", "eval"
PARQUET = {TRAIN: "data/train.parquet", EVAL: "data/validation.parquet"}
CARD, CHANGES, DIGESTS, SOURCES = "README.md", "changes.csv", "row_digests.npy", "sources.json"
PARQUET_ROWS = 1000
LARGE = "large"  # kind of a whole number that only 64 bits hold


class WorkingFile:
    """Rows on their way to a prepared set: on disk, with what selection needs of each in arrays."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._file, self._most_bytes = path, path.open("wb"), limits.row_bytes
        self._offsets, self._digests = array("q", [0]), array("Q")
        self.lines, self.sources, self._dropped = array("q"), array("l"), []

    def add(self, example: Example, source: int) -> bool:
        """Whether the row was taken: one that would be too large to be read again is not."""
        dumped = _dumped(example.to_json() | {"form": example.form, "columns": example.columns})
        # Chat messages are the longest form; what wraps a tool call is the most that a form adds.
        if 8 * len(dumped) > self._most_bytes and len(_dumped(row_of(example, MESSAGES))) > self._most_bytes:
            return False
        self._offsets.append(self._offsets[-1] + self._file.write(dumped + b"\n"))
        self._digests.append(short_digest(example))
        self.lines.append(example.line)
        self.sources.append(source)
        return True

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self._path.unlink()

    def drop(self, number: int) -> None:
        self._dropped.append(number)

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def digests(self) -> np.ndarray:
        return np.array(self._digests, np.uint64)

    @property
    def kept(self) -> np.ndarray:
        """[rows] bool."""
        kept = np.ones(len(self), bool)
        kept[self._dropped] = False
        return kept

    def read(self, numbers: np.ndarray) -> Iterator[Example]:
        with self._path.open("rb") as file:
            for number in numbers.tolist():
                file.seek(self._offsets[number])
                values = json.loads(file.read(self._offsets[number + 1] - self._offsets[number]))
                form, columns = values.pop("form"), values.pop("columns")
                example = Example.from_json(values)
                yield Example(example.line, example.messages, example.input, form, columns, example.tools)

    def column(self, name: str, numbers: np.ndarray) -> list[str]:
        """The column's values as text; empty where a row has none. Raises DatasetError where no row has it."""
        seen: Counter[str] = Counter()
        values = []
        for example in self.read(numbers):
            seen.update(example.columns.keys())
            value = example.columns.get(name)
            values.append("" if value is None else value if isinstance(value, str) else json.dumps(value))
        if not seen[name]:
            there = ", ".join(map(repr, list(seen)[:12])) or "none"
            raise DatasetError(
                f"no row has a column {name!r} beside its texts; there are {there} (derive can add some)"
            )
        return values


@dataclass(frozen=True)
class PreparedSet:
    """A folder that `write` has made. `lineage` is its lineage.json."""

    folder: Path
    lineage: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "PreparedSet":
        """Raises DatasetError where its lineage cannot be read, as a crash of the machine may leave it."""
        try:
            lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
            if not {"version", "key", "rows", "fingerprint", "sources", "files"} <= set(lineage):
                raise ValueError("parts of it are missing")
        except (OSError, ValueError, TypeError) as error:
            raise DatasetError(
                f"{folder}: its {LINEAGE} cannot be read ({error}); delete the folder, and prepare it again"
            ) from None
        return cls(folder, lineage)

    @property
    def train(self) -> Path:
        return self.folder / f"{TRAIN}.jsonl"

    @property
    def eval(self) -> Path | None:
        path = self.folder / f"{EVAL}.jsonl"
        return path if path.exists() else None

    def files(self) -> list[Path]:
        """What is worth downloading."""
        splits = [split for split in (TRAIN, EVAL) if self.lineage["rows"][split]]
        names = [CARD, LINEAGE, CHANGES, *(f"{split}.jsonl" for split in splits), *(PARQUET[split] for split in splits)]
        return [self.folder / name for name in names]

    def sources(self) -> list[str]:
        """What it was prepared from, as it was named on this machine."""
        return json.loads((self.folder / SOURCES).read_text())

    def is_whole(self) -> bool:
        """Whether every file is there with the size that it was written with."""
        sizes = self.lineage["files"].items()
        return all(
            (self.folder / name).is_file() and (self.folder / name).stat().st_size == size for name, size in sizes
        )

    def tokenise(
        self, base_model: str, template: str, settings: Settings, report: Callable[[str, int, int, str], None]
    ) -> None:
        """Make the tokens of all rows, or find them made. Raises ModelError."""
        tokenizer = load_tokenizer(architecture.tokenizer_folder(base_model, settings), template)
        for split, path in ((TRAIN, self.train), (EVAL, self.eval)):
            if path is not None:
                rows = self.lineage["rows"][split]
                token_cache.table(
                    self.lineage["fingerprints"][split],
                    lambda path=path: _examples(path, settings),
                    tokenizer,
                    settings,
                    report=lambda done, rows=rows, split=split: report(
                        f"tokens of the {split} rows", done, rows, "rows"
                    ),
                )


def place_of(out: Path, version: int) -> Path:
    """Where an earlier version of the set in `out` is kept."""
    return out.with_name(f"{out.name}.v{version}")


def newest(out: Path) -> PreparedSet | None:
    """The set in `out`, or the newest of its earlier versions where `out` is gone; None where there is none."""
    found = [out] if (out / LINEAGE).is_file() else []
    earlier = {int(match[1]): path for path in out.parent.glob(f"{glob.escape(out.name)}.v*")
               if (match := re.fullmatch(r".*\.v(\d+)", path.name)) and (path / LINEAGE).is_file()}  # fmt: skip
    found += [earlier[version] for version in sorted(earlier, reverse=True)]
    return PreparedSet.load(found[0]) if found else None


def _examples(path: Path, settings: Settings) -> Iterator[Example]:
    return (row for row in read_rows(path, limits=settings.limits)[1] if isinstance(row, Example))


def write(
    folder: Path,
    rows: WorkingFile,
    train: np.ndarray,
    evaluation: np.ndarray,
    *,
    told: dict[str, Any],
    previous: PreparedSet | None,
    version: int,
    limits: Limits,
    report: Callable[[str, int, int, str], None],
) -> PreparedSet:
    """Write everything into the folder; the lineage last, so that a folder with one is whole. Raises DatasetError."""
    (folder / "data").mkdir()
    form = _common_form(rows.read(np.concatenate([train, evaluation])))
    fingerprints, hashes, digests = {}, [], []
    columns: dict[str, set[Any]] = {}  # of both splits, whose Parquet files must have the same
    for split, numbers in ((TRAIN, train), (EVAL, evaluation)):
        if len(numbers):
            written = _write_split(folder, split, rows.read(numbers), form, len(numbers), columns, limits, report)
            fingerprints[split], of_split, sha256 = written
            digests.append(of_split)
            hashes.append(f"{sha256}  {split}.jsonl\n")
    for split in fingerprints:
        _write_parquet(folder / f"{split}.jsonl", folder / PARQUET[split], columns)
    everything = np.unique(np.concatenate(digests))
    np.save(folder / DIGESTS, everything)
    before = _digests_of(previous.folder) if previous else np.zeros(0, np.uint64)
    lineage = told | {
        "version": version,
        "form": form,
        "rows": {TRAIN: len(train), EVAL: len(evaluation)},
        "columns": list(columns),
        "fingerprints": fingerprints,
        # As sha256sum prints it, of the output of sha256sum: of all columns, which `fingerprints` leave out.
        "fingerprint": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "since_last_version": previous
        and {
            "version": previous.lineage["version"],
            "fingerprint": previous.lineage["fingerprint"],
            "rows_added": int((~np.isin(everything, before)).sum()),
            "rows_removed": int((~np.isin(before, everything)).sum()),
        },
    }
    (folder / CARD).write_text(data_card(lineage), encoding="utf-8")
    names = [
        *(f"{split}.jsonl" for split in fingerprints),
        *(PARQUET[split] for split in fingerprints),
        CHANGES,
        DIGESTS,
    ]
    lineage["files"] = {name: (folder / name).stat().st_size for name in names}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1, ensure_ascii=False), encoding="utf-8")
    for name in (*names, CARD, LINEAGE):
        sync(folder / name)
    return PreparedSet(folder, lineage)


def _digests_of(folder: Path) -> np.ndarray:
    """Eight bytes of the digest of each different row of the set in this folder, as far as its files are there."""
    with suppress(OSError, ValueError, EOFError):
        return np.load(folder / DIGESTS)
    found = array("Q")
    for split in (TRAIN, EVAL):
        with suppress(OSError), (folder / f"{split}.jsonl").open("rb") as file:
            found.extend(_short(line) for line in file)
    return np.unique(np.array(found, np.uint64))


def _short(line: bytes) -> int:
    return int.from_bytes(hashlib.sha256(line).digest()[:8])


def _common_form(examples: Iterator[Example]) -> str:
    """The form of all rows, or chat messages, which every conversation can be."""
    forms = {TEXT if example.is_text else ALPACA if fits_alpaca(example) else MESSAGES for example in examples}
    if TEXT in forms and len(forms) > 1:
        raise DatasetError("some rows are plain text and some are conversations; prepare them apart")
    return forms.pop() if len(forms) == 1 else MESSAGES


def _write_split(
    folder: Path,
    split: str,
    examples: Iterator[Example],
    form: str,
    count: int,
    columns: dict[str, set[Any]],
    limits: Limits,
    report: Callable[[str, int, int, str], None],
) -> tuple[str, np.ndarray, str]:
    """(fingerprint of the conversations, short digests of the written rows [rows], SHA-256 of the file) of the split; the
    kinds of its columns are added to `columns`."""
    fingerprint, whole = hashlib.sha256(), hashlib.sha256()
    digests, expected, read = array("Q"), array("Q"), array("Q")
    path = folder / f"{split}.jsonl"
    with path.open("wb") as file:
        for number, example in enumerate(examples):
            report(f"writing {split}.jsonl", number, count, "rows")
            row = row_of(example, form)
            expected.append(short_digest(canonical(example, form)))
            for name, value in row.items():
                columns.setdefault(name, set()).add(_kind(value))
            line = _dumped(row) + b"\n"
            file.write(line)
            whole.update(line)
            digests.append(_short(line))
    # What is read again is what will be trained on, so the fingerprint is of that.
    for row in read_rows(path, limits=limits)[1]:
        if not isinstance(row, Example):
            raise DatasetError(f"{split}.jsonl: a row is not read as it was written: {row}")
        fingerprint.update(row.digest())
        read.append(short_digest(row))
    assert read == expected, "what is read is what was written"
    return fingerprint.hexdigest(), np.array(digests, np.uint64), whole.hexdigest()


def _kind(value: Any) -> Any:
    """The value's type; of whole numbers also whether a float (LARGE), or 64 bits (object), do not hold them."""
    if type(value) is int and abs(value) > 2**53:
        return LARGE if abs(value) < 2**63 else object
    return type(value)


def _write_parquet(source: Path, path: Path, columns: dict[str, set[Any]]) -> None:
    """The same rows as Parquet. A column whose values are of several kinds becomes their JSON text. Raises DatasetError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())])
    fields = []
    for name, kinds in columns.items():
        kinds = kinds - {type(None)}
        if LARGE in kinds and float not in kinds:
            kinds = kinds - {LARGE} | {int}
        kind = (
            pa.float64()
            if kinds == {int, float}
            else plain.get(next(iter(kinds)), pa.string())
            if len(kinds) == 1
            else None
        )
        fields.append(pa.field(name, pa.list_(message) if name == "messages" else kind or pa.string()))
    schema = pa.schema(fields)
    try:
        with source.open("rb") as file, pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while lines := [line for _, line in zip(range(PARQUET_ROWS), file, strict=False)]:
                rows = [
                    {field.name: _cell(values.get(field.name), field) for field in fields}
                    for values in map(json.loads, lines)
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    except (pa.ArrowException, OverflowError) as error:
        raise DatasetError(f"{path.name}: the rows cannot be written as Parquet: {error}") from None


def _cell(value: Any, field: Any) -> Any:
    if field.name == "messages":
        return [
            {**part, "tool_calls": json.dumps(part["tool_calls"]) if "tool_calls" in part else None} for part in value
        ]
    if value is None or isinstance(value, str):
        return value
    kind = str(field.type)
    if kind == "string":
        return json.dumps(value, ensure_ascii=False)
    return value


def _dumped(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values, default=str)
    except TypeError:  # a number of more than 64 bits, or half a character in a column that is not read
        return json.dumps(values, default=str).encode()
