"""Ask a worker process what a base model consists of, and remember it. Itself knows no torch, and fetches no weights."""

import hashlib
import importlib.metadata
import json
import os
import secrets
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from qlora_core import models
from qlora_core.errors import ModelError
from qlora_core.hub import acting_token, reason
from qlora_core.queue import worker_environment
from qlora_core.settings import Settings
from qlora_core.targets import Architecture

SECONDS = 180
WORKER = Path(__file__).parent / "worker"
DESCRIBE = ("architecture.py", "fused*.py")
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja"]


def read(base_model: str, settings: Settings) -> Architecture:
    """Layers and sizes of a base model; seconds the first time, a small file afterwards. Raises ModelError."""
    folder = files_of(base_model, ["config.json"], settings, what="config.json")
    try:
        config = (folder / "config.json").read_bytes()
    except OSError as error:
        raise ModelError(f"base model {base_model!r}: its config.json cannot be read ({error.strerror})") from None
    version = importlib.metadata.version("transformers")
    name = hashlib.sha256(config + version.encode() + _code_that_describes()).hexdigest()
    cached = settings.home / "architectures" / f"{name}.json"
    try:
        return Architecture.from_json(json.loads(cached.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        text = _asked(folder, base_model, settings)
        _keep(text, cached)
        return Architecture.from_json(json.loads(text))


@lru_cache(maxsize=1)
def _code_that_describes() -> bytes:
    """What is said of a model changes with it, above all which ones can be fused."""
    return b"".join(path.read_bytes() for name in DESCRIBE for path in sorted(WORKER.glob(name)))


def tokenizer_folder(base_model: str, settings: Settings) -> Path:
    """Where the model's tokenizer lies. Of a model on the Hub only its tokenizer is fetched. Raises ModelError."""
    return files_of(base_model, TOKENIZER_FILES, settings, what="tokenizer")


def files_of(base_model: str, patterns: list[str], settings: Settings, *, what: str) -> Path:
    """A folder with those files of the model. Of a model on the Hub only they are fetched; Start fetches the weights.

    Raises ModelError.
    """
    if base_model == models.BUNDLED or base_model.startswith("run:") or os.path.isdir(os.path.expanduser(base_model)):
        return models.resolve(base_model, settings).folder
    repo_id, _, revision = base_model.partition("@")
    token = acting_token()
    try:
        return Path(
            snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns, token=token or False)
        )
    except GatedRepoError as error:
        raise ModelError(f"base model {base_model!r}: {reason(error, token)}") from None
    except (ValueError, OSError, HfHubHTTPError, HTTPError) as error:
        raise ModelError(
            f"base model {base_model!r}: its {what} could not be fetched from the Hub ({type(error).__name__}); check the "
            "spelling and the connection, or use 'bundled'"
        ) from None


def _asked(folder: Path, base_model: str, settings: Settings) -> str:
    """What a worker without GPU, network and token prints."""
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "qlora_core.worker.architecture", str(folder)],
            env=worker_environment(settings, device="cpu"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"base model {base_model!r}: its layers could not be read: {error}") from None
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or [f"signal {-finished.returncode}"])[-1]
        raise ModelError(
            f"base model {base_model!r}: its config.json describes no model that can be built: {last[:400]}"
        )
    return finished.stdout


def _keep(text: str, path: Path) -> None:
    """Written beside and renamed: two processes may ask at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    partial.write_text(text)
    partial.rename(path)
