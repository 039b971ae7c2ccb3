"""Sources and settings -> a prepared dataset: each step counts what it changed and lists it. Starts no process, knows no page."""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core.data import prepared_set
from qlora_core.data.detection import Detection, columns_text, mapping_for
from qlora_core.data.formats import detection_of, free_name, read_rows
from qlora_core.data.locate import LINEAGE
from qlora_core.data.near_duplicates import NearDuplicates
from qlora_core.data.preparation import DROPPED, KEPT, MASKED, Preparation, shares_of
from qlora_core.data.rows import BlankLine, Example, Problem, counted
from qlora_core.data.selection import balanced, held_out
from qlora_core.data.sources import Report, Source, origins, sources_of
from qlora_core.data.steps import Ledger, Row, drop_duplicates, fit, mark_toxic, mask_personal, normalise, with_columns
from qlora_core.errors import DatasetError
from qlora_core.runs import lock
from qlora_core.settings import Settings
from qlora_core.storage import sync

VERSION = 3
WAITING_SECONDS = 1  # after which a preparation that waits for another looks whether it is to end
LISTED = 20  # problems of a source that are named; changes.csv lists all


def prepare(
    data: list[str],
    out: Path,
    preparation: Preparation,
    settings: Settings,
    *,
    token: str | None = None,
    report: Report = lambda *_: None,
) -> prepared_set.PreparedSet:
    """Prepare files and Hub datasets (hub:OWNER/NAME) into the folder `out`; the same again is found and returned.

    Another preparation in that folder stays beside it as `<out>.v1` and so on. Raises DatasetError, ModelError.
    """
    out = out.resolve()
    sources = sources_of(data, settings, token, report)
    told = [VERSION, preparation.to_json(), [(source.name, source.sha256) for source in sources]]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    with _alone(out, report):
        previous = prepared_set.newest(out)
        if previous and previous.folder == out and previous.lineage["key"] == key and previous.is_whole():
            return previous
        if out.exists() and not (out / LINEAGE).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise DatasetError(f"{out}: is there already and is no prepared dataset; name another folder")
        if previous and not (origins(source.to_json() for source in sources) & origins(previous.lineage["sources"])):
            names = ", ".join(source["name"] for source in previous.lineage["sources"])
            raise DatasetError(f"{previous.folder}: holds the dataset prepared from {names}; name another folder")
        made = _prepare(sources, data, out, preparation, settings, key=key, previous=previous, report=report)
    return replace(made, folder=out)


@contextmanager
def _alone(out: Path, report: Report) -> Iterator[None]:
    """One preparation at a time into a folder: another waits. What killed ones have left is removed."""
    while True:
        with lock(out.with_name(f".{out.name}.lock"), patience_seconds=WAITING_SECONDS) as held:
            if held is not None:
                for path in out.parent.glob(f".{glob.escape(out.name)}-*.partial"):
                    if re.fullmatch(r"[0-9]+-[0-9a-f]{8}\.partial", path.name.removeprefix(f".{out.name}-")):
                        shutil.rmtree(path, ignore_errors=True)
                yield
                return
        report(f"waiting for another preparation into {out.name}", 0, 0, "")


def _prepare(
    sources: list[Source],
    data: list[str],
    out: Path,
    preparation: Preparation,
    settings: Settings,
    *,
    key: str,
    previous: prepared_set.PreparedSet | None,
    report: Report,
) -> prepared_set.PreparedSet:
    partial = out.with_name(f".{out.name}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        work = _Work(sources, preparation, settings, partial, report)
        made = work.run(key=key, name=out.name, previous=previous)
        # Where the rows came from on this machine, for preparing them again; it is never pushed.
        (partial / prepared_set.SOURCES).write_text(json.dumps([str(named) for named in data]))
        sync(partial / prepared_set.SOURCES)
        sync(partial)
        if previous and previous.folder == out:
            out.rename(prepared_set.place_of(out, previous.lineage["version"]))
        elif out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


class _Work:
    """One preparation under way: a chain of steps over the stream of rows, then what can be decided only at its end."""

    def __init__(
        self, sources: list[Source], preparation: Preparation, settings: Settings, folder: Path, report: Report
    ) -> None:
        self.sources, self.preparation, self.settings = sources, preparation, settings
        self.folder, self.report = folder, report
        self.masks = preparation.personal_data == MASKED
        self.ledger = Ledger(folder / prepared_set.CHANGES, [source.name for source in sources], mask=self.masks)
        # Of each source: its form and why, rows, rows left out.
        self.read_as: list[dict[str, Any]] = []

    def run(self, *, key: str, name: str, previous: prepared_set.PreparedSet | None) -> prepared_set.PreparedSet:
        before = [source.path.stat() for source in self.sources]
        with self.ledger:
            self._check()
            rows = self._write_working_file()
            train, evaluation = self._select(rows)
        for source, stat in zip(self.sources, before, strict=True):
            if (now := source.path.stat()).st_mtime_ns != stat.st_mtime_ns or now.st_size != stat.st_size:
                raise DatasetError(f"{source.name}: was changed while it was read; prepare it again")
        if not len(train):
            raise DatasetError("nothing is left to train on", *self.ledger.told())
        license_ = self.preparation.license or _common([source.license for source in self.sources])
        made = prepared_set.write(
            self.folder,
            rows,
            train,
            evaluation,
            told={
                "name": name,
                "key": key,
                "sources": [s.to_json() | told for s, told in zip(self.sources, self.read_as, strict=True)],
                "preparation": self.preparation.public(),
                "steps": self.ledger.steps,
                "license": license_,
            },
            previous=previous,
            version=previous.lineage["version"] + 1 if previous else 1,
            limits=self.settings.limits,
            report=self.report,
        )
        rows.remove()
        if self.preparation.tokenise:
            made.tokenise(self.preparation.base_model, self.preparation.template, self.settings, self.report)
        return made

    def _check(self) -> None:
        """Everything that is wrong with any source, before hours of work. Raises DatasetError."""
        problems: list[str] = []
        for source in self.sources:
            try:
                detection, rows = self._read_source(source, "checking")
            except DatasetError as error:
                problems += error.problems
                continue
            if self.preparation.skip_bad_rows:
                continue
            bad, listed = 0, []
            for row in rows:
                if isinstance(row, Problem):
                    bad += 1
                    if len(listed) < LISTED:
                        listed.append(f"{source.name} {row}")
            if bad:
                problems.append(
                    f"{source.name}: {counted(bad, 'row')} cannot be used ({detection.reason}); mend them, or leave them out "
                    "with skip_bad_rows"
                )
                problems += listed
        if problems:
            raise DatasetError(*problems)

    def _read(self) -> Iterator[Row]:
        """All usable rows of all sources, in order."""
        begun = self.ledger.step("read", Counter())
        several = len(self.sources) > 1
        for number, source in enumerate(self.sources):
            detection, rows = self._read_source(source, "reading")
            told = {"form": detection.form or "unknown", "read_as": detection.reason, "rows": 0, "left_out": 0}
            self.read_as.append(told)
            for row in rows:
                if isinstance(row, BlankLine):
                    begun["blank lines"] += 1
                elif isinstance(row, Problem):
                    told["left_out"] += 1
                    begun["rows left out that have problems"] += 1
                    # What a message quotes of a value may be cut in the middle of what would be masked.
                    told_why = row.kind if self.masks else row.message
                    self.ledger.change("read", number, row.line, f"left out: {told_why}")
                else:
                    begun["usable rows"] += 1
                    if begun["usable rows"] > self.settings.max_rows:
                        raise DatasetError(
                            f"{source.name}: with it there are more than {self.settings.max_rows:,} rows; prepare fewer, or "
                            "raise QLORA_LAB_MAX_ROWS"
                        )
                    told["rows"] += 1
                    columns = self._columns(row, begun)
                    if several:
                        columns.setdefault("source", source.name)
                    yield Row(replace(row, columns=columns), number)

    def _columns(self, row: Example, begun: Counter[str]) -> dict[str, Any]:
        """The row's other columns as they are written: under names that nothing reads, without what stood in messages."""
        columns = {}
        for name, value in row.columns.items():
            if name.endswith((" of messages", " of tool calls")):
                begun[f"left out: {name}"] += 1
                continue
            free = free_name(name)
            if free != name:
                begun[f"column {name} is now {free}"] += 1
            columns[free] = value
        return columns

    def _read_source(self, source: Source, doing: str) -> tuple[Detection, Iterator[Example | Problem | BlankLine]]:
        """Where there are several files, the chosen columns are those of files in no known form; parted by semicolons, each
        takes the first choice that it has the columns of."""

        def watch(done: int, total: int) -> None:
            self.report(f"{doing} {source.name}", done, total, "bytes")

        columns, limits = self.preparation.columns, self.settings.limits
        if columns and len(self.sources) > 1:
            told = detection_of(source.path, limits)
            columns = "" if told.form else mapping_for(told, columns)
        try:
            detection, rows = read_rows(source.path, limits=limits, columns=columns, watch=watch)
        except DatasetError as error:
            named = (p if p.startswith(source.path.name) else f"{source.name}: {p}" for p in error.problems)
            raise DatasetError(*named) from None
        if detection.form is None and detection.seen:
            likely = columns_text(detection.proposal)
            raise DatasetError(
                f"{source.name}: {detection.reason}; say which column is what (columns: {likely or 'prompt=…, response=…'})"
            )
        return detection, rows

    def _write_working_file(self) -> prepared_set.WorkingFile:
        preparation, ledger = self.preparation, self.ledger
        rows = self._read()
        if preparation.normalise:
            rows = normalise(rows, ledger)
        if preparation.personal_data != KEPT:
            rows = mask_personal(rows, ledger, mask=self.masks)
        if preparation.duplicates == DROPPED:
            rows = drop_duplicates(rows, ledger)
        if preparation.toxicity_model:
            rows = mark_toxic(rows, ledger, preparation, self.settings)
        if preparation.long_rows != KEPT:
            rows = fit(rows, ledger, preparation, self.settings)
        if preparation.derived:
            rows = with_columns(rows, ledger, preparation.derived)
        near = NearDuplicates(threshold=preparation.near_duplicates) if preparation.near_duplicates else None
        written = prepared_set.WorkingFile(self.folder / "rows.partial", self.settings.limits)
        too_large: Counter[str] = Counter()
        with closing(written):
            for row in rows:
                if not written.add(row.example, row.source):
                    too_large["rows left out"] += 1
                    told = "left out: larger than QLORA_LAB_MAX_ROW_BYTES once written"
                    ledger.change("large rows", row.source, row.example.line, told)
                elif near:
                    near.add(len(written) - 1, row.example.text)
        if too_large:
            ledger.step("large rows", too_large)
        if near:
            self.report("comparing rows that are alike", 0, 0, "")
            self._drop_near(near, written)
        return written

    def _drop_near(self, near: NearDuplicates, written: prepared_set.WorkingFile) -> None:
        pairs = near.pairs()
        counts = {
            "rows dropped": len(pairs),
            "threshold": near.threshold,
            "not fully compared": near.not_fully_compared,
        }
        self.ledger.step("near duplicates", counts)
        for pair in pairs:
            written.drop(pair.line)
            first = f"{self.ledger.names[written.sources[pair.first_line]]} {written.lines[pair.first_line]}"
            told = f"dropped: about {pair.similarity:.0%} like {first}"
            self.ledger.change("near duplicates", written.sources[pair.line], written.lines[pair.line], told)

    def _select(self, rows: prepared_set.WorkingFile) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the rows to train on and of those to evaluate on, in their order."""
        preparation, ledger = self.preparation, self.ledger
        random = np.random.default_rng(preparation.seed)
        kept = np.flatnonzero(rows.kept)
        if preparation.balance_by:
            values = rows.column(preparation.balance_by, kept)
            before = kept
            kept, counts = balanced(kept, values, shares_of(preparation.balance_shares)[0], random)
            told = {f"rows of {value}": count for value, count in counts.items()}
            ledger.step("balance", told | {"rows left out": len(before) - len(kept)})
            self._list_left_out("balance", rows, before, kept)
        if preparation.limit and len(kept) > preparation.limit:
            before = kept
            kept = np.sort(random.choice(kept, preparation.limit, replace=False))
            ledger.step("limit", {"rows left out": len(before) - len(kept)})
            self._list_left_out("limit", rows, before, kept)
        if preparation.shuffle:
            kept = random.permutation(kept)
            ledger.step("shuffle", {"rows": len(kept), "seed": preparation.seed})
        if not preparation.eval_fraction or not len(kept):
            return kept, kept[:0]
        strata = rows.column(preparation.stratify_by, kept) if preparation.stratify_by else None
        is_held = held_out(rows.digests[kept], strata, preparation.eval_fraction, random)
        train, evaluation = kept[~is_held], kept[is_held]
        by = f"by {preparation.stratify_by}" if preparation.stratify_by else "at random"
        ledger.step("split", {"rows to train on": len(train), f"rows held out {by}": len(evaluation)})
        return train, evaluation

    def _list_left_out(self, step: str, rows: prepared_set.WorkingFile, before: np.ndarray, kept: np.ndarray) -> None:
        why = {"balance": "left out for the shares", "limit": "left out: not drawn"}[step]
        for number in np.setdiff1d(before, kept).tolist():
            self.ledger.change(step, rows.sources[number], rows.lines[number], why)


def _common(licences: list[str | None]) -> str | None:
    """The licence of all sources, where they have one and the same."""
    return licences[0] if licences and len(set(licences)) == 1 else None
