"""Ask a worker process to merge a run's adapter into its base model, where there is room for it. Itself knows no torch."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_core import architecture, devices, footprint
from qlora_core.config import replace
from qlora_core.errors import ModelError, RunError
from qlora_core.queue import host_work, worker_environment
from qlora_core.run_status import RUNNING
from qlora_core.runs import Run, RunStore, lock
from qlora_core.storage import file_sha256, write_json

ORIGINAL, DEQUANTIZED = "original", "dequantized"
# On the disk, for each byte of the base; NF4 beside the merged model takes a quarter, and what is not quantised.
BYTES_PER_WEIGHT_BYTE = {"16bit": 1.1, "nf4": 1.6}
EXPORTS = tuple(BYTES_PER_WEIGHT_BYTE)
# The dequantised base lies on the 16 values of 4 bits: a small update added to it is rounded away again. Measured on SmolLM2-135M
# after 20 steps: 5 in 10,000,000 values differed from the base's own, and the loss was that before training.
EXPORTED_IN_NF4 = (ORIGINAL,)
# A merged model is written file by file; so much of it is in host memory at a time.
SHARD_BYTES = 1_000_000_000
# Measured of a merge's process: torch and transformers; and beside each byte of a file that is being written, pages of the base
# that it was made from and what the allocator keeps.
PROCESS_BYTES = 640 * 1024**2
BYTES_PER_SHARD_BYTE = 1.2
# For each weight of a layer that is added up in fp32: base, update, their sum, and what is made on the way.
LAYER_BYTES = 4 * 4
DISK_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
MERGES = "merges.json"


def merge(
    run: Run,
    *,
    onto: str | None = None,
    export: str = "16bit",
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Merge into `merged-original` or `merged-dequantized` below the run's folder; returns that folder.

    `onto`: the original 16-bit base, or the base dequantised from 4 bits, which is the model that qlora trained and its default.
    `export`: "16bit", or "nf4" for a folder with "-nf4" at its end that holds the merged model quantised to 4 bits, which only
    the original base bears.
    A merge that exists already for this adapter is returned as it is. Raises RunError, also where disk or host memory would not
    do, and ModelError.
    """
    if export not in EXPORTS:
        raise RunError(f"export is {export!r}; choose one of {', '.join(EXPORTS)}")
    onto = onto or (ORIGINAL if export == "nf4" else ways(run)[-1])
    if onto == DEQUANTIZED and onto not in ways(run):
        raise RunError(
            f"{run.run_id}: trained on the original 16-bit base, so there is no dequantised one; merge onto original"
        )
    if export == "nf4" and onto not in EXPORTED_IN_NF4:
        raise RunError(
            f"{run.run_id}: the {onto} base lies on the values of 4 bits already, so NF4 would round away again what the adapter "
            "adds to it; merge onto original for an export in NF4, or export in 16 bits"
        )
    check_has_adapter(run, "merge")
    with lock(run.path / "merge.lock") as held:
        if held is None:
            raise RunError(f"{run.run_id}: is being merged, or its merges are measured, already; wait for that to end")
        return _merge(run, onto, export, report)


def ways(run: Run) -> tuple[str, ...]:
    """What the run's adapter can be merged onto; the default is the last: the base that it was trained on."""
    return (ORIGINAL, DEQUANTIZED) if run.config().method == "qlora" else (ORIGINAL,)


def check_has_adapter(run: Run, what: str) -> None:
    """Raises RunError where there is nothing to `what` ("merge") yet."""
    if run.analysis():
        raise RunError(
            f"{run.run_id}: compares the runs of a study, so it has no adapter to {what}; {what} one of those runs"
        )
    if run.status().state == RUNNING:
        raise RunError(f"{run.run_id}: is running; {what} it when it has ended, or stop it first")
    if not (run.adapter / "adapter_model.safetensors").exists():
        raise RunError(f"{run.run_id}: has no adapter yet; only a finished or stopped run can be {what}d")


def folder_of(run: Run, onto: str, export: str) -> Path:
    return run.path / f"merged-{onto}{'-nf4' if export == 'nf4' else ''}"


def is_current(run: Run, folder: Path) -> bool:
    """Whether the folder is a merge of the adapter that the run has now."""
    return (folder / "config.json").exists() and merges(run).get(folder.name, {}).get(
        "adapter_sha256"
    ) == adapter_sha256(run)


def adapter_sha256(run: Run) -> str:
    """Of the weights that the run has now; read again only when the file has changed."""
    weights = run.adapter / "adapter_model.safetensors"
    state = weights.stat()
    return _sha256(weights, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _sha256(path: Path, changed_ns: int, size: int) -> str:
    return file_sha256(path)


def merges(run: Run) -> dict[str, dict[str, Any]]:
    """Of each merge that was made, by its folder's name: "adapter_sha256", "seconds", and of its process's host memory
    "peak_host_bytes" as measured and "estimated_peak_host_bytes"."""
    path = run.path / MERGES
    return json.loads(path.read_text()) if path.exists() else {}


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
    with host_work(run.settings, report):
        return _merge_now(run, onto, export, folder, report)


def _merge_now(run: Run, onto: str, export: str, folder: Path, report: Callable[[str], None]) -> Path:
    check_disk(run, export)
    estimate = check_host_memory(run, onto, export)
    report(f"merging onto the {onto} base" + (", then quantising to NF4" if export == "nf4" else ""))
    begun, adapter = time.monotonic(), adapter_sha256(run)
    try:
        peak = _run_worker(run, onto, export)
    finally:  # however it ended, also by a kill
        for partial in (".partial", ".16bit", ".16bit.partial"):
            shutil.rmtree(folder.with_name(folder.name + partial), ignore_errors=True)
    if adapter_sha256(run) != adapter:
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(f"{run.run_id}: its adapter changed while it was merged; merge it again")
    measured = {
        "adapter_sha256": adapter,
        "seconds": time.monotonic() - begun,
        "estimated_peak_host_bytes": estimate,
        **peak,
    }
    write_json(run.path / MERGES, {**merges(run), folder.name: measured})
    return folder


def _run_worker(run: Run, onto: str, export: str) -> dict[str, Any]:
    """What the worker prints. Raises RunError for a full disk, else ModelError, with the worker's last words."""
    finished = subprocess.run(
        [sys.executable, "-m", "qlora_core.worker.merging", str(run.path), onto, export],
        env=worker_environment(run.settings, device="cpu"),
        capture_output=True,
        text=True,
        cwd=run.path,
    )
    if finished.returncode == 0:
        return json.loads(finished.stdout.strip().splitlines()[-1])
    raise failure(run, "merge", "merge-log.txt", finished.returncode, finished.stdout + finished.stderr)


def failure(run: Run, what: str, log_name: str, code: int, said: str) -> ModelError | RunError:
    """Why a worker that merges failed, for a person: from its exit status and what it said, which the log keeps."""
    if any(reason in said for reason in DISK_FULL):
        return RunError(
            f"{run.run_id}: the disk became full during the {what}, and nothing of it was kept; free space on the disk of "
            f"{run.path}, then try again"
        )
    log = run.path / log_name
    log.write_text(said)
    if code == -9:
        why = "its process was killed (signal 9), as happens where host memory runs out"
    else:
        why = (said.strip().splitlines() or [f"signal {-code}"])[-1]
    return ModelError(f"{run.run_id}: the {what} failed: {why} (all of it: {log})")


# -- room


def check_disk(run: Run, export: str = "16bit", *, more_bytes: int = 0) -> None:
    """Raises RunError where the disk has no room for the merge and `more_bytes`."""
    needed = more_bytes + BYTES_PER_WEIGHT_BYTE[export] * sum(
        path.stat().st_size for path in run.base_model().folder.glob("*.safetensors")
    )
    free = devices.free_disk_bytes(run.path)
    if free < needed:
        raise RunError(
            f"{run.path} has {free / devices.GIB:.1f} GiB free, the merged model needs {needed / devices.GIB:.1f}; "
            "delete runs or free disk space"
        )


def check_host_memory(run: Run, onto: str, export: str = "16bit") -> int | None:
    """The estimate of the merge's peak; None where the base cannot be read, which the merge will say.

    Raises RunError where less is free.
    """
    try:
        needed = host_bytes(run, onto, export)
    except (ModelError, OSError, SafetensorError):
        return None
    free = devices.host_memory().available_bytes
    if free < needed:
        raise RunError(
            f"{run.run_id}: merging onto the {onto} base needs about {needed / devices.GIB:.1f} GiB of host memory (an estimate), "
            f"{free / devices.GIB:.1f} are free; end what else runs here, or merge on a machine with more"
        )
    return needed


def host_bytes(run: Run, onto: str, export: str = "16bit") -> int:
    """Estimate of the peak host memory of a merge, in bytes: its process, the base as it is held, one shard of the merged model,
    and one layer while it is added up. Raises ModelError, OSError, SafetensorError."""
    config, folder = run.config(), run.base_model().folder
    shape = architecture.read(str(folder), run.settings)
    dtype = (run.result() or {"run_info": {"compute_dtype": "bf16"}})["run_info"]["compute_dtype"]
    width = 4 if dtype == "fp32" else 2
    if onto == DEQUANTIZED:
        held = sum(footprint.weight_bytes(shape, config, width))
    else:  # in the number type of its files it is mapped from them, read layer by layer
        held = 0 if _dtype_of_files(folder) == dtype else width * shape.parameters
    layer = LAYER_BYTES * max(layer.elements for layer in shape.layers if not layer.is_head)
    shard = max(min(SHARD_BYTES, 2 * shape.parameters), 2 * shape.vocabulary * shape.hidden_size)
    adapter = (run.adapter / "adapter_model.safetensors").stat().st_size
    needed = adapter + held + BYTES_PER_SHARD_BYTE * shard + layer
    if export == "nf4":  # afterwards
        quantised = replace(config, method="qlora", quantize_modules="all", int8_modules=())
        needed = max(needed, sum(footprint.weight_bytes(shape, quantised, 2)) + layer)
    return round(PROCESS_BYTES + needed)


def _dtype_of_files(folder: Path) -> str:
    """bf16, fp16 or fp32, as the first tensor has it."""
    with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="np") as file:
        return file.get_slice(next(iter(file.keys()))).get_dtype().lower().replace("f", "fp").replace("bfp", "bf")
