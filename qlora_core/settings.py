"""Where things live and the limits, read once from the environment. Knows nothing of runs, models or the page."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from qlora_core.data.limits import Limits
from qlora_core.errors import ConfigError


def _setting(default: str, *, env: str, help: str) -> str:
    return field(default=default, metadata={"env": env, "help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting of the installation. Each is an environment variable of the name in its metadata."""

    home: Path = _setting(
        Path.home() / ".qlora-lab",
        env="QLORA_LAB_HOME",
        help="folder that holds runs, the queue and the bundled model; on a Space, a mounted bucket",
    )
    locks: Path = _setting(
        Path(tempfile.gettempdir()) / f"qlora-lab-locks-{os.getuid()}",
        env="QLORA_LAB_LOCKS",
        help="folder of the GPU locks, shared by all data folders of a machine",
    )
    max_row_bytes: int = _setting(
        1_000_000, env="QLORA_LAB_MAX_ROW_BYTES", help="longest line of a dataset file that is read"
    )
    max_rows: int = _setting(5_000_000, env="QLORA_LAB_MAX_ROWS", help="most rows of a dataset that are trained on")
    max_dataset_bytes: int = _setting(
        20_000_000_000,
        env="QLORA_LAB_MAX_DATASET_BYTES",
        help="largest dataset file once it is unpacked; where a gzip or Parquet bomb stops",
    )
    gguf_converter: str = _setting(
        "",
        env="QLORA_LAB_GGUF_CONVERTER",
        help="llama.cpp's convert_hf_to_gguf.py, or a program with its options, for exports as GGUF",
    )

    @property
    def limits(self) -> Limits:
        return Limits(self.max_row_bytes, self.max_dataset_bytes, 2 * self.max_rows)

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def queue(self) -> Path:
        return self.home / "queue"

    @property
    def downloads(self) -> Path:
        return self.home / "downloads"

    @property
    def models(self) -> Path:
        return self.home / "models"

    @classmethod
    def from_environment(cls) -> "Settings":
        """Raises ConfigError naming every variable whose value is not of its type."""
        values, problems = {}, []
        for name, spec in cls.__dataclass_fields__.items():
            variable = spec.metadata["env"]
            text = os.environ.get(variable)
            if not text:
                continue
            if isinstance(spec.default, Path):
                values[name] = Path(text).expanduser().resolve()
            elif isinstance(spec.default, str):
                values[name] = text
            elif text.isdecimal() and int(text) > 0:
                values[name] = int(text)
            else:
                problems.append(f"{variable} is {text!r}; it must be a whole number above 0 ({spec.metadata['help']})")
        if problems:
            raise ConfigError(*problems)
        return cls(**values)
