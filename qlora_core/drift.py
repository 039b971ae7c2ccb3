"""How far each merge of a run would be from the model that was trained, measured on held-out rows before one is chosen. Asks a
worker process; itself knows no torch."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from qlora_core import merging
from qlora_core.errors import RunError
from qlora_core.queue import CPU, free_device, host_work, worker_environment
from qlora_core.runs import Run, lock

DRIFT = "drift.json"
# Held-out rows that are measured, evenly from the whole file; tokens of one, and of all together.
ROWS, ROW_TOKENS, TOKENS = 64, 1024, 8192
# Of log-probabilities over the whole vocabulary, which lie on the disk meanwhile: one model is in memory at a time.
REFERENCE_BYTES = 1024**3
FOR_CARD = ("loss", "kl", "top1", "rows", "tokens")
HEADER = ("against the model that was trained", "loss", "difference", "KL, nats a token", "same most likely token")
_NAMES = {
    "original": "merged onto the original 16-bit base",
    "original-nf4": "the same, then quantised to NF4",
    "dequantized": "merged onto the dequantised 4-bit base",
}

Report = Callable[[str, int, int, str], None]


def ways(run: Run) -> tuple[str, ...]:
    """The ways of merging that are measured, by the ends of their folders' names: "original", "original-nf4", "dequantized"."""
    nf4 = f"{merging.ORIGINAL}-nf4"
    return tuple(way for onto in merging.ways(run) for way in (onto, nf4) if way == onto or onto == merging.ORIGINAL)


def measure(run: Run, *, report: Report = lambda doing, done, total, unit: None) -> dict[str, Any]:
    """What drift.json holds: measured now, unless it was for the adapter that the run has; see `read_drift`.

    On the GPU if the run may use one and no run has it, else on the CPU. A merge that is not there is made for it, by what makes
    those that are pushed, and removed. `report(doing, done, total, unit)` may raise to end it. Raises RunError and ModelError.
    """
    merging.check_has_adapter(run, "measure")
    if found := read_drift(run):
        return found
    with lock(run.path / "merge.lock") as held:
        if held is None:
            raise RunError(f"{run.run_id}: is being merged, or its merges are measured, already; wait for that to end")
        with host_work(run.settings, lambda doing: report(doing, 0, 0, "")):
            merging.check_disk(run, more_bytes=REFERENCE_BYTES)
            for onto in merging.ways(run):
                merging.check_host_memory(run, onto)
            with free_device(run.settings, gpu=run.config().device != CPU) as (device, locks):
                _ask(run, device, (held, *locks), report)
    found = read_drift(run)
    if found is None:
        raise RunError(f"{run.run_id}: its adapter changed while its merges were measured; measure them again")
    return found


def read_drift(run: Run) -> dict[str, Any] | None:
    """What was measured of the adapter that the run has now, or None.

    "trained": {"loss"}; "ways": way -> "loss" (nats a supervised token), "loss_difference" (to the trained model's), "kl" (mean of
    KL(trained || merged), nats a supervised token), "top1" (share of those tokens with the same most likely one), "rows", "tokens"
    (supervised); and "adapter_sha256", "rows", "tokens", "held_out_rows", "device", "dtype", "packages", "measured_at" (seconds of
    the epoch), "peak_host_bytes".
    """
    try:
        found = json.loads((run.path / DRIFT).read_text())
        return found if found.get("adapter_sha256") == merging.adapter_sha256(run) else None
    except (OSError, ValueError):
        return None


def for_card(found: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """As `model_card(drift=…)` takes it: "original" and "dequantized" -> what a card shows."""
    if found is None:
        return None
    return {
        way: {name: values[name] for name in FOR_CARD}
        for way, values in found["ways"].items()
        if not way.endswith("-nf4")
    }


def table(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of text for the trained model and for each way, below HEADER."""
    rows = [("the model that was trained", f"{found['trained']['loss']:.4f}", "", "", "")]
    for way, values in found["ways"].items():
        told = (
            f"{values['loss']:.4f}",
            f"{values['loss_difference']:+.4f}",
            f"{values['kl']:.2g}",
            f"{values['top1']:.1%}",
        )
        rows.append((_NAMES.get(way, way), *told))
    return rows


def basis(found: Mapping[str, Any]) -> str:
    """A sentence that says on what it was measured."""
    return (
        f"Measured on {found['rows']:,} of {found['held_out_rows']:,} held-out rows, {found['tokens']:,} supervised tokens, in "
        f"{found['dtype']} on {found['device']}."
    )


# -- the worker


def _ask(run: Run, device: str, locks: tuple[int, ...], report: Report) -> None:
    """Let the worker write drift.json. Raises RunError and ModelError with what it says."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".drift-") as scratch, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_core.worker.drift", str(run.path), scratch],
            env=worker_environment(run.settings, device=device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=run.path,
            pass_fds=locks,  # none of them is free before the process has ended, even if this one is killed
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line) if line.startswith("{") else {}
                problems += said.get("problems", [])
                if "doing" in said:
                    report(said["doing"], said["done"], said["total"], "rows")
        finally:
            process.kill()  # it writes its file whole or not at all
            code = process.wait()
            process.stdout.close()
        errors.seek(0)
        if problems:
            raise RunError(*problems)
        if code:
            raise merging.failure(run, "measurement of its merges", "drift-log.txt", code, errors.read())
