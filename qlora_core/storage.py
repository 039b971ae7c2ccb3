"""Files and folders that are there whole or not at all, whatever kills the process that writes them. Knows no run."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ABANDONED_SECONDS = 86_400  # longer than any creation or deletion takes


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Written beside and renamed, so that a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.partial")
    # ASCII: half a surrogate pair, from a file name, could not be written otherwise.
    partial.write_text(json.dumps(values, indent=1))
    sync(partial)
    partial.replace(path)


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder to prepare something in; gone afterwards unless it was renamed. Those that were killed are removed first."""
    parent.mkdir(parents=True, exist_ok=True)
    for path in [*parent.glob(".creating-*"), *parent.glob(".deleted-*")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    folder = parent / f".creating-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """At once for whoever looks: a kill leaves no half of it among the others."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def new_id(name: str, *, otherwise: str) -> str:
    """Sorts by time, says what it is, is safe as a file name and never the same twice."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}-{safe.strip('-.')[:60] or otherwise}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
