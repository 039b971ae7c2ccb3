"""The Train form as a YAML file and back. What comes back was written by anyone: it names no file of this machine at will."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_core.config import TrainConfig
from qlora_core.data.locate import LINEAGE
from qlora_core.errors import ConfigError, LabError
from qlora_core.settings import Settings
from qlora_core.ui.chosen import Chosen, rows_of
from qlora_core.ui.form import EXAMPLES
from qlora_core.ui.uploads import safe_name

MOST_BYTES = 200_000
# The browser makes the file itself: nothing is written here, and nothing has to be cleared away.
DOWNLOAD = """(saved) => {
  if (!saved) return;
  const { name, text } = JSON.parse(saved);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/yaml' }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""


@dataclass(frozen=True)
class Loaded:
    """A config from a file, the dataset that it names where the page may use it, and what was left out."""

    config: TrainConfig
    chosen: Chosen | None
    told: tuple[str, ...]


def save(config: TrainConfig) -> str:
    """Name and text of the file, as JSON for the browser."""
    return json.dumps({"name": f"{safe_name(config.run_name())}.yaml", "text": config.to_yaml()})


def load(path: Path, settings: Settings) -> Loaded:
    """Raises ConfigError naming every unknown and every mistyped field."""
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path.name}: has {path.stat().st_size:,} bytes; settings have at most {MOST_BYTES:,}")
    try:
        config = TrainConfig.from_yaml(path)
    except ConfigError as error:
        raise ConfigError(*(problem.replace(str(path), path.name) for problem in error.problems)) from None
    chosen, told = _dataset(config, settings)
    return Loaded(config, chosen, told)


def _dataset(config: TrainConfig, settings: Settings) -> tuple[Chosen | None, tuple[str, ...]]:
    """The dataset that the settings name, if it is an upload or an example of this app; else what is told instead."""
    if not config.data:
        return None, ()
    wanted = [Path(path) for path in (config.data, config.eval_data) if path]
    missing = [path.name for path in wanted if not _is_ours(path, settings)]
    if missing:
        return None, (f"{' and '.join(missing)} is not among the datasets here; the chosen dataset stays",)
    chosen = Chosen(
        config.data, config.eval_data, 0, wanted[0].is_relative_to(EXAMPLES), config.skip_bad_rows, 0, config.columns
    )
    try:
        report = rows_of(chosen, settings).report
    except LabError as error:
        return None, (*error.problems, "the chosen dataset stays")
    return replace(chosen, rows=report.rows, bad_rows=report.bad_rows), ()


def _is_ours(path: Path, settings: Settings) -> bool:
    folders = (*(settings.home / name for name in ("uploads", "datasets", "hub-datasets")), EXAMPLES)
    there = path.is_file() or (path / LINEAGE).is_file()
    return there and any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)
