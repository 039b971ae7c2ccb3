"""A prepared dataset to a dataset repository: which of its files go there, and as which version."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_core.errors import HubError
from qlora_core.hub.files import Content, chosen
from qlora_core.hub.push import Push
from qlora_core.hub.releases import Release

# What of a prepared dataset's folder may leave the machine; the rest stays.
DATASET_FILES = ("README.md", "lineage.json", "changes.csv", "data/*.parquet")
LINEAGE = "lineage.json"


def dataset_push(
    folder: Path,
    repo_id: str,
    *,
    token: str,
    report: Callable[[str], None] | None = None,
    **asked: Any,
) -> Push:
    """The push, to be planned and run; see Push for what may be `asked`. Raises HubError where that is no dataset."""
    files: dict[str, Content] = {**chosen(folder, DATASET_FILES)}
    if not any(path.startswith("data/") for path in files):
        raise HubError(f"{str(folder)!r}: has no data/*.parquet; prepare the dataset first")
    return Push(repo_id, "dataset", token, _release(folder), files, report=report or (lambda _: None), **asked)


def _release(folder: Path) -> Release:
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        number, rows = lineage.get("version"), lineage.get("rows") or {}
        metrics = {f"{split}_rows": float(count) for split, count in rows.items()}
        fingerprint = str(lineage.get("fingerprint") or "")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise HubError(f"{str(folder / LINEAGE)!r}: cannot be read ({error}); prepare the dataset again") from None
    version = f"v{number}" if isinstance(number, int) else ""
    return Release("dataset", version, dataset_fingerprint=fingerprint, metrics=metrics)
