"""Files that a browser sent: copied out of gradio's cache, under names that stay in their folder. Reads none of them."""

import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path

from qlora_core.settings import Settings


def keep_upload(path: Path, settings: Settings) -> Path:
    """Copy an upload out of gradio's cache to `<home>/uploads/<content hash>/<safe name>`; returns the copy."""
    digest = hashlib.sha256()
    folder = settings.home / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with path.open("rb") as source, partial.open("wb") as copy:
            while block := source.read(1 << 20):
                digest.update(block)
                copy.write(block)
        kept = folder / digest.hexdigest()[:16] / safe_name(path.name)
        kept.parent.mkdir(exist_ok=True)
        if kept.exists():  # the same content: its inspection stays valid
            return kept
        shutil.move(partial, kept)
        return kept
    finally:
        partial.unlink(missing_ok=True)


def safe_name(name: str) -> str:
    """A file name that stays in its folder and that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", Path(name).name, flags=re.ASCII).strip(".-")[-100:] or "dataset.jsonl"
