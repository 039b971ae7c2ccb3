"""What a preparation is made from: files and Hub datasets -> files here with their hash and origin. Reads no rows."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.data.files import kind_of
from qlora_core.data.hub_source import PREFIX, HubDataset, fetch, origin_of
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings

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


def sources_of(data: list[str], settings: Settings, token: str | None, report: Report) -> list[Source]:
    """Each of the named files and Hub datasets as a file here. Raises DatasetError naming all that are not there."""
    found: list[Source] = []
    problems = [] if data else ["no data is named; name files or hub:OWNER/NAME"]
    for named in data:
        try:
            path = Path(os.path.expanduser(named))
            if named.startswith(PREFIX):
                path = fetch(
                    HubDataset.parse(named),
                    settings.home / "hub-datasets",
                    token=token,
                    limit=settings.max_rows,
                    max_bytes=settings.max_dataset_bytes,
                    progress=lambda rows, named=named: report(f"fetching {named}", rows, 0, "rows"),
                ).path
            kind_of(path)
            sha256 = _sha256(path, report)
        except DatasetError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{named}: cannot be read: {error.strerror or error}")
        else:
            origin = origin_of(path)
            same = sum(source.path.name == path.name for source in found)
            name = f"{path.name} ({same + 1})" if same else path.name
            found.append(Source(path, name, sha256, origin.get("license"), origin.get("source")))
    if problems:
        raise DatasetError(*problems)
    return found


def _sha256(path: Path, report: Report) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            report(f"hashing {path.name}", file.tell(), size, "bytes")
    return digest.hexdigest()


def origins(sources: Iterable[dict[str, Any]]) -> set[str]:
    """What tells datasets apart, whatever version they are of: Hub ids, and names of files."""
    told = ((source.get("hub"), source["name"]) for source in sources)
    return {hub.partition("@")[0].removeprefix(PREFIX).partition(":")[0] if hub else name for hub, name in told}
