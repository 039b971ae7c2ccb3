"""Sources and settings -> a prepared dataset: each step counts what it changed and lists it. Starts no process, knows no page."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core.data import prepared_set
from qlora_core.data.detection import Detection
from qlora_core.data.files import Watch
from qlora_core.data.formats import detection_of, read_rows
from qlora_core.data.hub_source import PREFIX, Fetched, HubDataset, fetch
from qlora_core.data.locate import LINEAGE
from qlora_core.data.near_duplicates import NearDuplicates
from qlora_core.data.preparation import DROPPED, KEPT, MASKED, Preparation, shares_of
from qlora_core.data.rows import BlankLine, Example, Problem
from qlora_core.data.selection import balanced, held_out
from qlora_core.data.steps import Ledger, Row, drop_duplicates, fit, mark_toxic, mask_personal, normalise, with_columns
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings

VERSION = 1
# (what is being done, how far, of how much, in what); raises to end the preparation.
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Source:
    """One file that rows come from, and what is known of its origin."""

    path: Path
    name: str
    sha256: str
    license: str | None = None
    hub: str | None = None

    def to_json(self) -> dict[str, Any]:
        size = self.path.stat().st_size
        known = {"name": self.name, "sha256": self.sha256, "size_bytes": size, "license": self.license, "hub": self.hub}
        return {name: value for name, value in known.items() if value is not None}


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
    sources = _sources(data, settings, token, report)
    told = [VERSION, preparation.to_json(), [(source.name, source.sha256) for source in sources]]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    previous = prepared_set.PreparedSet.load(out) if (out / LINEAGE).exists() else None
    if previous and previous.lineage["key"] == key and previous.is_whole():
        return previous
    if out.exists() and previous is None and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out}: is there already and is no prepared dataset; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        work = _Work(sources, preparation, settings, partial, report)
        made = work.run(key=key, name=out.name, previous=previous)
        # Where the rows came from on this machine, for preparing them again; it is never pushed.
        (partial / prepared_set.SOURCES).write_text(json.dumps([str(named) for named in data]))
        if previous:
            out.rename(prepared_set.place_of(out, previous.lineage["version"]))
        elif out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(made, folder=out)


def _sources(data: list[str], settings: Settings, token: str | None, report: Report) -> list[Source]:
    found, problems = [], []
    for named in data:
        fetched: Fetched | None = None
        try:
            if named.startswith(PREFIX):
                fetched = fetch(
                    HubDataset.parse(named),
                    settings.home / "hub-datasets",
                    token=token,
                    limit=settings.max_rows,
                    max_bytes=settings.max_dataset_bytes,
                    progress=lambda rows, named=named: report(f"fetching {named}", rows, 0, "rows"),
                )
            path = fetched.path if fetched else Path(os.path.expanduser(named))
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except DatasetError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{named}: {(error.strerror or str(error)).lower()}")
        else:
            hub = str(fetched.source) if fetched else None
            found.append(Source(path, path.name, sha256, fetched.license if fetched else None, hub))
    if not data:
        problems.append("no data is named; name files or hub:OWNER/NAME")
    if problems:
        raise DatasetError(*problems)
    return found


class _Work:
    """One preparation under way: a chain of steps over the stream of rows, then what can be decided only at its end."""

    def __init__(
        self, sources: list[Source], preparation: Preparation, settings: Settings, folder: Path, report: Report
    ) -> None:
        self.sources, self.preparation, self.settings = sources, preparation, settings
        self.folder, self.report = folder, report
        self.ledger = Ledger(folder / "changes.csv", [source.name for source in sources])
        # Of each source: its form and why, rows, rows left out.
        self.read_as: list[dict[str, Any]] = []

    def run(self, *, key: str, name: str, previous: prepared_set.PreparedSet | None) -> prepared_set.PreparedSet:
        with self.ledger:
            rows = self._write_working_file()
            train, evaluation = self._select(rows)
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
                "preparation": self.preparation.to_json(),
                "steps": self.ledger.steps,
                "license": license_,
            },
            previous=previous,
            report=self.report,
        )
        rows.remove()
        if self.preparation.tokenise:
            made.tokenise(self.preparation.base_model, self.preparation.template, self.settings, self.report)
        return made

    def _read(self) -> Iterator[Row]:
        """All usable rows of all sources, in order."""
        begun = self.ledger.step("read", {})
        several = len(self.sources) > 1
        for number, source in enumerate(self.sources):

            def watch(done: int, total: int, source: Source = source) -> None:
                self.report(f"reading {source.name}", done, total, "bytes")

            detection, rows = self._read_source(source.path, watch)
            told = {"form": detection.form or "unknown", "read_as": detection.reason, "rows": 0, "left_out": 0}
            self.read_as.append(told)
            problems: list[str] = []
            for row in rows:
                if isinstance(row, BlankLine):
                    begun["blank lines"] = begun.get("blank lines", 0) + 1
                elif isinstance(row, Problem):
                    told["left_out"] += 1
                    begun["rows left out that have problems"] = begun.get("rows left out that have problems", 0) + 1
                    self.ledger.change("read", number, row.line, f"left out: {row.message}")
                    if len(problems) < 20:
                        problems.append(f"{source.name} {row}")
                else:
                    begun["rows"] = begun.get("rows", 0) + 1
                    if begun["rows"] > self.settings.max_rows:
                        raise DatasetError(f"more than {self.settings.max_rows:,} rows (QLORA_LAB_MAX_ROWS)")
                    told["rows"] += 1
                    if several and "source" not in row.columns:
                        row = replace(row, columns=row.columns | {"source": source.name})
                    yield Row(row, number)
            if told["left_out"] and not self.preparation.skip_bad_rows:
                raise DatasetError(
                    f"{source.name}: {told['left_out']:,} rows have problems; mend them, or leave them out with skip_bad_rows "
                    f"({detection.reason})",
                    *problems,
                )

    def _read_source(self, path: Path, watch: Watch) -> tuple[Detection, Iterator[Example | Problem | BlankLine]]:
        """Where there are several files, the chosen columns are those of files in no known form."""
        columns, limits = self.preparation.columns, self.settings.limits
        if columns and len(self.sources) > 1 and detection_of(path, limits).form:
            columns = ""
        detection, rows = read_rows(path, limits=limits, columns=columns, watch=watch)
        if detection.form is None and detection.seen:
            likely = ", ".join(f"{role}={name}" for role, name in detection.proposal.items())
            raise DatasetError(
                f"{path.name}: {detection.reason}; say which column is what (columns: {likely or 'prompt=…, response=…'})"
            )
        return detection, rows

    def _write_working_file(self) -> prepared_set.WorkingFile:
        preparation, ledger = self.preparation, self.ledger
        rows = self._read()
        if preparation.normalise:
            rows = normalise(rows, ledger)
        if preparation.personal_data != KEPT:
            rows = mask_personal(rows, ledger, mask=preparation.personal_data == MASKED)
        if preparation.duplicates == DROPPED:
            rows = drop_duplicates(rows, ledger)
        if preparation.toxicity_model:
            rows = mark_toxic(rows, ledger, preparation, self.settings)
        if preparation.long_rows != KEPT:
            rows = fit(rows, ledger, preparation, self.settings)
        if preparation.derived:
            rows = with_columns(rows, ledger, preparation.derived)
        near = NearDuplicates(threshold=preparation.near_duplicates) if preparation.near_duplicates else None
        written = prepared_set.WorkingFile(self.folder / "rows.partial")
        with closing(written):
            for number, row in enumerate(rows):
                if near:
                    near.add(number, row.example.text)
                written.add(row.example, row.source)
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
            kept, counts = balanced(kept, values, shares_of(preparation.balance_shares)[0], random)
            ledger.step("balance", {f"rows of {value}": count for value, count in counts.items()})
        if preparation.limit and len(kept) > preparation.limit:
            ledger.step("limit", {"rows left out": len(kept) - preparation.limit})
            kept = np.sort(random.choice(kept, preparation.limit, replace=False))
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


def _common(licences: list[str | None]) -> str | None:
    """The licence of all sources, where they have one and the same."""
    return licences[0] if licences and len(set(licences)) == 1 else None
