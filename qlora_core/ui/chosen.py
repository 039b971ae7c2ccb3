"""The dataset that Start will use, and its rows: an upload, an example, a fetched Hub dataset or a prepared one."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.data.detection import parse_columns
from qlora_core.data.hub_source import origin_of
from qlora_core.data.inspected import Inspected, folder_of, inspect_into
from qlora_core.data.locate import LINEAGE
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.data.rows import counted
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings


@dataclass(frozen=True)
class Chosen:
    """`path` is what a run gets as its data: a file, or the folder of a prepared set; empty while none can be used."""

    path: str
    eval_path: str | None = None
    rows: int = 0
    is_example: bool = False
    skip_bad_rows: bool = False
    bad_rows: int = 0
    columns: str = ""
    # Which inspection this is of: another one when the file has changed.
    stamp: str = ""

    @property
    def is_prepared(self) -> bool:
        return bool(self.path) and (Path(self.path) / LINEAGE).is_file()

    @property
    def file(self) -> Path:
        """Where the rows to train on lie."""
        return Path(self.path) / "train.jsonl" if self.is_prepared else Path(self.path)

    @property
    def eval_file(self) -> Path | None:
        """Where the rows to evaluate on lie, if they are apart."""
        held_out = Path(self.path) / "eval.jsonl"
        if self.eval_path or not self.is_prepared:
            return Path(self.eval_path) if self.eval_path else None
        return held_out if held_out.exists() else None

    @property
    def name(self) -> str:
        return Path(self.path).name

    def license(self) -> str:
        """The licence that comes with the rows; empty where none is known."""
        with suppress(DatasetError):  # what is damaged is told where it is chosen
            known = PreparedSet.load(Path(self.path)).lineage if self.is_prepared else origin_of(self.file)
            return known.get("license") or ""
        return ""

    def problem(self, settings: Settings) -> str | None:
        """Why Start cannot use it, with the remedy; None when it can."""
        if not self.path:
            return "no dataset is chosen; choose one on the Data tab"
        if self.stamp and self.stamp != _stamp(self, settings):
            return f"{self.name} has changed since it was looked at, or is gone; look at it again on the Data tab"
        if self.bad_rows and not self.skip_bad_rows:
            bad = counted(self.bad_rows, "row")
            return (
                f"{self.name} has {bad} that cannot be trained on; mend the file, or tick “Leave the listed rows out” on the "
                "Data tab"
            )
        if self.rows == 1 and not self.eval_file:
            return f"{self.name} has one usable row, and evaluation needs one of its own; add rows"
        return None

    def config_fields(self) -> dict[str, Any]:
        return {
            "data": self.path,
            "eval_data": self.eval_path,
            "skip_bad_rows": self.skip_bad_rows,
            "columns": self.columns,
        }


def _stamp(chosen: Chosen, settings: Settings) -> str:
    try:
        return folder_of(chosen.file, settings, columns=chosen.columns).name
    except OSError:
        return ""


def rows_of(chosen: Chosen, settings: Settings) -> Inspected:
    """The usable rows, each to be had by its number. Raises DatasetError, OSError."""
    return inspect_into(chosen.file, settings, columns=chosen.columns)


# Folders below <home> that hold datasets which a browser may take up again.
_KEPT = ("uploads", "datasets", "hub-datasets")


def to_remember(chosen: Chosen, settings: Settings) -> str:
    """What a browser keeps of the choice: names below <home>; empty for an example."""
    try:
        data = str(Path(chosen.path).relative_to(settings.home)) if chosen.path else ""
        evaluation = str(Path(chosen.eval_path).relative_to(settings.home)) if chosen.eval_path else ""
    except ValueError:
        return ""
    return json.dumps({"data": data, "eval": evaluation, "columns": chosen.columns}) if data else ""


def recalled(remembered: str, settings: Settings) -> Chosen | None:
    """The choice that a browser remembers, or None: it is no longer there, or names what is no dataset of this app."""
    try:
        values = json.loads(remembered)
        data, evaluation = (_kept(values[name], settings) for name in ("data", "eval"))
        parse_columns(columns) if (columns := str(values["columns"])) else None
    except (ValueError, KeyError, TypeError, DatasetError):
        return None
    return Chosen(str(data), str(evaluation) if evaluation else None, columns=columns) if data else None


def _kept(name: str, settings: Settings) -> Path | None:
    """Raises ValueError for a name that leaves the folders of datasets; None for an empty one."""
    if not name:
        return None
    path = (settings.home / name).resolve()
    if not any(path.is_relative_to((settings.home / folder).resolve()) for folder in _KEPT) or not path.exists():
        raise ValueError(name)
    if path.is_dir() and not (path / LINEAGE).is_file():
        raise ValueError(name)
    return settings.home / name
