"""What `data` names -> files on this machine: a file, a prepared folder, or a dataset of the Hub. Reads no rows."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.data import hub_source
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings

# What a prepared folder is known by (preparation.py writes it last).
LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Located:
    """The files of a run's rows. `origin` says where they come from: Hub id and revision, or name, version and fingerprint
    of a prepared set; empty for a file. `config` names the revision that was found."""

    config: TrainConfig
    data: Path
    eval_data: Path | None
    origin: dict[str, Any] = field(default_factory=dict)


def locate(config: TrainConfig, settings: Settings, *, token: str | None = None) -> Located:
    """Raises DatasetError where nothing is named, or nothing is there."""
    if not config.data:
        raise DatasetError(
            "no data is named; name a file, a prepared folder or hub:OWNER/NAME (--data, or the Data tab)"
        )
    eval_data = Path(os.path.expanduser(config.eval_data)) if config.eval_data else None
    if config.data.startswith(hub_source.PREFIX):
        fetched = hub_source.fetch(
            hub_source.HubDataset.parse(config.data),
            settings.home / "hub-datasets",
            token=token,
            limit=settings.max_rows,
            max_bytes=settings.max_dataset_bytes,
        )
        origin = {"source": str(fetched.source), "license": fetched.license, "rows": fetched.rows}
        return Located(
            _licensed(replace(config, data=str(fetched.source)), fetched.license), fetched.path, eval_data, origin
        )
    data = Path(os.path.expanduser(config.data))
    if not (data / LINEAGE).is_file():
        origin = hub_source.origin_of(data)
        return Located(_licensed(config, origin.get("license")), data, eval_data, origin)
    try:
        lineage = json.loads((data / LINEAGE).read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{data / LINEAGE}: cannot be read ({error}); prepare the dataset again") from None
    held_out = data / "eval.jsonl"
    eval_data = eval_data or (held_out if held_out.exists() else None)
    origin = {name: lineage.get(name) for name in ("name", "version", "fingerprint", "license")}
    return Located(_licensed(config, lineage.get("license")), data / "train.jsonl", eval_data, origin)


def _licensed(config: TrainConfig, known: str | None) -> TrainConfig:
    """The licence that comes with the rows, unless a person has named one."""
    return replace(config, dataset_license=known) if known and not config.dataset_license else config
