"""Ask a worker process to merge a run's adapter into its base model. Itself knows no torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qlora_core import devices
from qlora_core.errors import ModelError, RunError
from qlora_core.queue import worker_environment
from qlora_core.run_status import RUNNING
from qlora_core.runs import Run, RunStore, lock

# A merge holds the base in 16 bits once in host memory and once on the disk; NF4 beside it takes a quarter, and what is
# not quantised.
BYTES_PER_WEIGHT_BYTE = {"16bit": 1.1, "nf4": 1.6}
EXPORTS = tuple(BYTES_PER_WEIGHT_BYTE)


def merge(
    run: Run,
    *,
    onto: str | None = None,
    export: str = "16bit",
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Merge into `merged-original` or `merged-dequantized` below the run's folder; returns that folder.

    `onto`: the original 16-bit base, or the base dequantised from 4 bits, which is the model that qlora trained.
    `export`: "16bit", or "nf4" for a folder with "-nf4" at its end that holds the merged model quantised to 4 bits.
    A merge that exists already for this adapter is returned as it is. Raises RunError, ModelError.
    """
    if run.analysis():
        raise RunError(
            f"{run.run_id}: compares the runs of a study, so it has no adapter to merge; merge one of those runs"
        )
    config = run.config()
    onto = onto or ("dequantized" if config.method == "qlora" else "original")
    if export not in EXPORTS:
        raise RunError(f"export is {export!r}; choose one of {', '.join(EXPORTS)}")
    if onto == "dequantized" and config.method != "qlora":
        raise RunError(
            f"{run.run_id}: trained on the original 16-bit base, so there is no dequantised one; merge onto original"
        )
    if run.status().state == RUNNING:
        raise RunError(f"{run.run_id}: is running; merge it when it has ended, or stop it first")
    if not (run.adapter / "adapter_model.safetensors").exists():
        raise RunError(f"{run.run_id}: has no adapter yet; only a finished or stopped run can be merged")
    with lock(run.path / "merge.lock") as held:
        if held is None:
            raise RunError(f"{run.run_id}: is being merged already; wait for that merge to end")
        return _merge(run, onto, export, report)


def folder_of(run: Run, onto: str, export: str) -> Path:
    return run.path / f"merged-{onto}{'-nf4' if export == 'nf4' else ''}"


def is_current(run: Run, folder: Path) -> bool:
    """Whether the folder is a merge of the adapter that the run has now."""
    weights = run.adapter / "adapter_model.safetensors"
    return (folder / "config.json").exists() and folder.stat().st_mtime > weights.stat().st_mtime


def _merge(run: Run, onto: str, export: str, report: Callable[[str], None]) -> Path:
    folder = folder_of(run, onto, export)
    if is_current(run, folder):
        return folder
    others = RunStore(run.settings).based_on(folder)
    if others:
        raise RunError(
            f"{run.run_id}: its earlier merge {folder.name} is the base model of {', '.join(others)}, which a new merge would "
            "replace; delete those runs first, or copy that folder and train on the copy"
        )
    needed = BYTES_PER_WEIGHT_BYTE[export] * sum(
        p.stat().st_size for p in run.base_model().folder.glob("*.safetensors")
    )
    free = devices.free_disk_bytes(run.path)
    if free < needed:
        raise RunError(
            f"{run.path} has {free / devices.GIB:.1f} GiB free, the merged model needs {needed / devices.GIB:.1f}; "
            "delete runs or free disk space"
        )
    report(f"merging onto the {onto} base" + (", then quantising to NF4" if export == "nf4" else ""))
    finished = subprocess.run(
        [sys.executable, "-m", "qlora_core.worker.merging", str(run.path), onto, export],
        env=worker_environment(run.settings, device="cpu"),
        capture_output=True,
        text=True,
        cwd=run.path,
    )
    if finished.returncode:
        (run.path / "merge-log.txt").write_text(finished.stdout + finished.stderr)
        last = (finished.stderr.strip().splitlines() or [f"signal {-finished.returncode}"])[-1]
        raise ModelError(f"{run.run_id}: the merge failed: {last} (all of it: {run.path / 'merge-log.txt'})")
    return folder
