"""Base models: bundled, a local folder, a merged run or a Hub id -> a folder on disk with its origin. Loads no weights."""

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.errors import ModelError
from qlora_core.settings import Settings
from qlora_core.storage import file_sha256

BUNDLED = "bundled"
MERGED_RUN = "run:"
# The true weights on the Hub, at the revision that a Space preloads (README front matter).
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
# What a base model may consist of: no pickles, no code.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class BaseModel:
    """Where a base model lies and what exactly it is. `revision` is a commit hash on the Hub, else None."""

    name: str
    folder: Path
    revision: str | None
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BaseModel":
        return cls(**{**values, "folder": Path(values["folder"])})

    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def positions(self) -> int | None:
        """Tokens that a row may have at most, as its config.json says; None where it says nothing."""
        config = self.config()
        found = config.get("max_position_embeddings") or config.get("n_positions")
        return found if isinstance(found, int) and found > 0 else None


def resolve(name: str, settings: Settings, *, token: str | None = None) -> BaseModel:
    """Find the model, downloading it from the Hub if it is named by id; `run:ID` is a merged run. Raises ModelError."""
    if name == BUNDLED:
        return _bundled(settings)
    folder = Path(os.path.expanduser(name))
    if name.startswith(MERGED_RUN):
        return _checked(_merged(_merge_of(name.removeprefix(MERGED_RUN), settings)))
    if os.path.isdir(folder):
        folder = folder.resolve()
        is_merge = folder.name.startswith("merged-") and folder.parent.parent == settings.runs.resolve()
        return _checked(_merged(folder) if is_merge else BaseModel(folder.name, folder, None, "local folder"))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
        raise _no_name_of_a_model(name)
    return _from_hub(name, token)


def _merge_of(run_id: str, settings: Settings) -> Path:
    """The newest 16-bit merge of the run, whose id may be abbreviated. Raises ModelError where there is none of the adapter
    that the run has now."""
    ids = sorted(path.parent.name for path in settings.runs.glob("[!.]*/config.json"))
    found = [known for known in ids if known == run_id] or [
        known for known in ids if run_id and known.startswith(run_id)
    ]
    if len(found) != 1:
        hint = f"it could be {', '.join(found)}" if found else "`python -m qlora_core runs list` shows those there are"
        raise ModelError(f"base model '{MERGED_RUN}{run_id}': there is no run {run_id!r}; {hint}")
    run = settings.runs / found[0]
    weights = run / "adapter" / "adapter_model.safetensors"
    trained_at = weights.stat().st_mtime if weights.exists() else 0
    merges = [path for onto in ("original", "dequantized") if (path := run / f"merged-{onto}" / "config.json").exists()]
    newest = max((path.parent for path in merges), key=lambda folder: folder.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime < trained_at:
        what = "is not merged yet" if newest is None else "was trained on since it was merged"
        raise ModelError(
            f"base model '{MERGED_RUN}{run_id}': the run {what}; merge it: `python -m qlora_core merge {found[0]}`, or "
            "Publish, Merge"
        )
    return newest.resolve()


def _merged(folder: Path) -> BaseModel:
    """`folder` is a merged model below its run's; the run's name says more than the folder's."""
    run = folder.parent
    name = TrainConfig.from_json_file(run / "config.json").run_name()
    return BaseModel(f"{name} {folder.name.replace('-', ' onto ', 1)}", folder, None, f"merged run {run.name}")


def _no_name_of_a_model(name: str) -> ModelError:
    return ModelError(
        f"base model {name!r}: is no folder here and no Hub id; write 'bundled', a folder, 'owner/name', "
        "'owner/name@revision' or 'run:' and the id of a merged run"
    )


def _known_to_transformers(model_type: Any) -> bool:
    """Whether transformers has the architecture itself: then the code in the repository is not needed, and not run."""
    spec = importlib.util.find_spec("transformers")
    folder = Path(spec.origin).parent / "models" / str(model_type).replace("-", "_")
    return bool(model_type) and (folder / "__init__.py").is_file()


def weights_sha256(model: BaseModel) -> str:
    """SHA-256 over the names and SHA-256 of the weight files. In a Hub cache the names of the blobs are the hashes."""
    paths = sorted(model.folder.glob("*.safetensors"))
    return _weights_sha256(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=4)  # asked for several times a run; size and time tell a file that was replaced
def _weights_sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, _, _ in files:
        blob = path.resolve().name
        digest = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_sha256(path)
        total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def _bundled(settings: Settings) -> BaseModel:
    from qlora_core import bundled  # needs the GGUF reader, which workers do not

    folder = settings.models / bundled.FOLDER_NAME
    if bundled.is_ready(folder):
        return BaseModel(bundled.BUNDLED_ID, folder, None, "bundled (4-bit GGUF, converted)")
    try:
        return _from_hub(f"{bundled.BUNDLED_ID}@{HUB_REVISION}", None, local_only=True)
    except ModelError:
        raise ModelError(
            f"the bundled model is not in {folder} yet; `make model` fetches it (93 MB), or name another base model"
        ) from None


def _from_hub(name: str, token: str | None, *, local_only: bool = False) -> BaseModel:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo_id, _, revision = name.partition("@")
    try:
        path = snapshot_download(
            repo_id, revision=revision or None, allow_patterns=FILES, token=token or False, local_files_only=local_only
        )
    except HFValidationError:
        raise _no_name_of_a_model(name) from None
    except GatedRepoError:
        raise ModelError(
            f"base model {repo_id!r}: is gated; ask for access on its page, and sign in with the account that has it"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"base model {repo_id!r}: has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"base model {repo_id!r}: there is no such folder here and no such model on the Hub, or it is private; "
            "check the spelling; for a private one sign in, or type a token (on the command line: `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "no connection, and no copy is cached" if offline else " ".join(str(error).split())[:200]
        raise ModelError(
            f"base model {repo_id!r}: there is no such folder here, and it could not be fetched from the Hub ({reason}); "
            "check the spelling and the connection, or use 'bundled'"
        ) from None
    return _checked(BaseModel(repo_id, Path(path), Path(path).name, "Hugging Face Hub"))


def _checked(model: BaseModel) -> BaseModel:
    """Raises ModelError where the folder cannot be a base model, naming all that is wrong."""
    problems = []
    try:
        config = model.config()
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        problems.append("has no config.json")
        config = {}
    except (OSError, ValueError) as error:
        problems.append(f"config.json cannot be read ({error})")
        config = {}
    if "auto_map" in config and not _known_to_transformers(config.get("model_type")):
        problems.append(
            "needs code from its repository, which is never run here; choose a model that transformers knows"
        )
    if config.get("quantization_config"):
        problems.append("is quantised already; choose the 16-bit original, qlora quantises it")
    if not any(model.folder.glob("*.safetensors")):
        remedy = (
            "convert them with `save_pretrained(safe_serialization=True)`" if any(model.folder.glob("*.bin")) else ""
        )
        problems.append(f"has no .safetensors weights {remedy}".rstrip())
    if (model.folder / "adapter_config.json").exists():
        problems.append("is an adapter, not a base model; merge it first")
    if problems:
        raise ModelError(*(f"base model {str(model.folder)!r}: {problem}" for problem in problems))
    return model
