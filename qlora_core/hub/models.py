"""A model's folder to a model repository: which of its files go there. Reads no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import HubError
from qlora_core.hub.files import Content, chosen
from qlora_core.hub.push import Push
from qlora_core.hub.releases import RECORD, Release

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# What of a folder may leave the machine, by what is pushed; the rest stays, optimizer and random state above all.
ALLOWED = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES),
    "merged": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
    ),
}
NEEDED = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "merged": ("config.json", "*.safetensors")}


def model_push(
    folder: Path,
    repo_id: str,
    *,
    token: str,
    release: Release,
    files: Mapping[str, Content],
    **asked: Any,
) -> Push:
    """The push of what `release.what` is, with `files` beside it. See Push for what may be `asked`.
    Raises HubError where something of it is missing or leads out of the folder."""
    what = release.what
    found = {**chosen(Path(folder), ALLOWED[what]), **files}
    missing = [pattern for pattern in NEEDED[what] if not any(Path(name).match(pattern) for name in found)]
    if missing:
        raise HubError(f"{str(folder)!r}: has no {', '.join(missing)}, so it is no {what} that could be pushed")
    assert RECORD not in found and all(map(_is_plain, found)), "the record is written later, and all below the folder"
    return Push(repo_id, "model", token, release, found, **asked)


def _is_plain(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
