"""Checkpoints that a kill cannot half-write and that are verified before they are trusted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_core.errors import TrainingError
from qlora_core.storage import file_sha256, sync

MANIFEST, MADE_FOR = "manifest.json", "made_for.json"
ADAPTER = "adapter.safetensors"


def save(
    folder: Path,
    step: int,
    *,
    adapter: dict[str, torch.Tensor],
    state: dict[str, Any],
    made_for: dict[str, Any],
    keep: int,
    best: int | None,
) -> None:
    """Write `checkpoint-<step>` below `folder`, then remove all but the newest `keep` and that of step `best`.

    `made_for` names what a run must have in common with this one to load it.
    Files are written to `.partial`, synced and renamed; old ones go only after that. Raises TrainingError on a disk
    that is full or refuses, and then the checkpoints there were are still there.
    """
    final, partial = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.partial"
    if final.is_dir() and _damage(final) is None:
        return  # a stop right after it was written; replacing it would leave a moment without any
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()},
            partial / ADAPTER,
        )
        torch.save(state, partial / "state.pt")
        (partial / MADE_FOR).write_text(json.dumps(made_for, indent=1))
        manifest = {path.name: _identity(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: torch.save raises RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"step {step}: the checkpoint could not be written to {folder} ({error}); "
            f"free disk space, then resume: earlier checkpoints are whole"
        ) from error
    for old in list_checkpoints(folder)[keep:]:
        if old.name != f"checkpoint-{best}":
            shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def load_adapter(folder: Path, step: int, *, device: torch.device) -> dict[str, torch.Tensor] | None:
    """The adapter of the checkpoint of that step; None where it is gone or damaged."""
    path = folder / f"checkpoint-{step}"
    return None if _damage(path) else load_file(path / ADAPTER, device=str(device))


def load_newest(
    folder: Path, made_for: Callable[[], dict[str, Any]], *, device: torch.device, report: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(adapter, state) of the newest checkpoint whose files are whole; each one skipped is reported by name.

    Raises TrainingError, naming all that differs, where that checkpoint was made for other settings, rows or base weights.
    """
    for partial in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for path in list_checkpoints(folder):
        if damage := _damage(path):
            report(f"{path.name} skipped: {damage}")
            # Out of the way: it must not count among the newest that are kept.
            shutil.rmtree(path.with_name(f"{path.name}.damaged"), ignore_errors=True)
            path.rename(path.with_name(f"{path.name}.damaged"))
            continue
        _check_made_for(path, made_for())
        adapter = load_file(path / ADAPTER, device=str(device))
        return adapter, torch.load(path / "state.pt", map_location=device, weights_only=True)
    return None


def _check_made_for(path: Path, wanted: dict[str, Any]) -> None:
    found = json.loads((path / MADE_FOR).read_text())
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        raise TrainingError(
            *(
                f"{path.name} was made with {name} {found.get(name)!r}, this run has {wanted.get(name)!r}"
                for name in differing
            ),
            f"bring back what was changed, or remove {path.parent} to train from the start",
        )


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, identity in manifest.items():
            if _identity(path / name) != identity:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _identity(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}
