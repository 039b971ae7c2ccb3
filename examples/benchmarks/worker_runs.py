"""Runs of this project's own worker, each in a fresh process, and the random model that they train. Imports no torch."""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_core import devices, events, queue
from qlora_core.config import TrainConfig
from qlora_core.errors import LabError
from qlora_core.runs import Run, RunStore, lock
from qlora_core.settings import Settings

NEVER = 10_000_000
LOG_LINES = 20
# Packages that come with the others; the rest says enough.
BELOW = ("tokenizers", "safetensors")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes")
STEP_FIGURES = ("step_seconds", "tokens", "supervised_tokens", *PEAKS)


def model_in(folder: Path, shape: str) -> Path:
    """`folder`, with a random model of that shape in it; written once, by a process that gives its GPU memory back."""
    if not (folder / "config.json").exists():
        partial = folder.with_name(f"{folder.name}.partial")
        script = Path(__file__).with_name("random_models.py")
        subprocess.run([sys.executable, str(script), shape, str(partial)], check=True, stdout=sys.stderr)
        store_like_the_hub_cache(partial)
        partial.rename(folder)
    return folder


def store_like_the_hub_cache(folder: Path) -> None:
    """Weights become links to files named by their hash, as in a download: no run has to hash them while it is timed."""
    (folder / "blobs").mkdir(exist_ok=True)
    for path in folder.glob("*.safetensors"):
        if path.is_symlink():
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path.rename(folder / "blobs" / digest)
        path.symlink_to(Path("blobs", digest))


def choose_device(wanted: str) -> str:
    """The UUID of the first GPU, or "cpu"."""
    found = devices.gpus()
    if wanted == "cuda" and not found:
        raise SystemExit("--device is cuda, but no GPU is here")
    return queue.CPU if wanted == queue.CPU or not found else found[0].uuid


@contextlib.contextmanager
def device_alone(device: str) -> Iterator[None]:
    """Wait until no run of this project trains on the device, and keep others off it."""
    with lock(Settings.from_environment().locks / f"{device}.lock", wait=True):
        yield


def used_before(device: str) -> int | None:
    """Bytes of the GPU's memory that somebody uses already; timings beside another program mean little."""
    return next((gpu.used_bytes for gpu in devices.gpus() if gpu.uuid == device), None)


def train(values: dict[str, Any], rows: list[dict], *, device: str, limit_seconds: float) -> dict[str, Any]:
    """Train on the rows with these settings; what was measured, or {"failed": why}. Evaluates on two rows, at both ends."""
    with tempfile.TemporaryDirectory(prefix="qlora-lab-benchmark-") as folder:
        settings = Settings(home=Path(folder, "home"), locks=Path(folder, "locks"))
        names = {"data": rows, "eval_data": [shortened(row) for row in rows[:2]]}
        for name, written in names.items():
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        files = {name: str(Path(folder, f"{name}.jsonl")) for name in names}
        values = files | {"eval_steps": NEVER, "save_steps": NEVER, "device": kind(device)} | values
        try:
            run = RunStore(settings).create(TrainConfig.from_mapping(values))
        except LabError as error:
            return {"failed": str(error)}
        events.append(run.events_path, events.Launched(attempt=1))
        command = [sys.executable, "-m", "qlora_core.worker", str(run.path)]
        begun = time.monotonic()
        failed = run_process(command, run.path / "log.txt", settings, device=device, limit_seconds=limit_seconds)
        return measured(run, failed) | {"process_seconds": time.monotonic() - begun}


def kind(device: str) -> str:
    return queue.CPU if device == queue.CPU else "cuda"


def read(out: Path, kind: str) -> dict[str, dict[str, Any]]:
    """What was measured before, by key."""
    return json.loads(out.read_text())[kind] if out.exists() else {}


def keep(out: Path, kind: str, key: str, entry: dict[str, Any]) -> None:
    """Add the measurement to the file, in place of an earlier one of that key."""
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps({kind: read(out, kind) | {key: entry}}, indent=1))
    partial.rename(out)


def shortened(row: dict[str, str]) -> dict[str, str]:
    return {name: " ".join(text.split()[:8]) for name, text in row.items()}


def run_process(command: list[str], log: Path, settings: Settings, *, device: str, limit_seconds: float) -> str | None:
    """Run it as the queue would, its output in `log`; why it failed, the end of that output, or None."""
    environment = queue.worker_environment(settings, device=device)
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit_seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_seconds:.0f} s"
    said = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
    return None if code == 0 else "\n".join(said) or f"ended with code {code}"


def measured(run: Run, failed: str | None) -> dict[str, Any]:
    history = run.history()
    said = [event.reason for event in history if isinstance(event, events.Failed)]
    result = run.result()
    if failed or result is None:
        return {"failed": (said or [failed or run.log_tail(LOG_LINES)])[-1]}
    info = result["run_info"]
    steps = [event for event in history if isinstance(event, events.Step)]
    started = [event for event in history if isinstance(event, events.Started)][-1]
    return {
        "failed": None,
        "steps": [{name: getattr(step, name) for name in STEP_FIGURES} for step in steps],
        "first_step_seconds": steps[0].time - loaded_at(history),
        "load_peak_allocated_bytes": started.load_peak_allocated_bytes,
        "path": info["path"],
        "started": events.to_json(started),
        "notes": [event.text for event in history if isinstance(event, events.Note)],
        "dtype": info["compute_dtype"],
        "packages": {name: version for name, version in info["packages"].items() if name not in BELOW},
        **{name: info[name] for name in ("device", "python", "driver", "git_commit", "config")},
    }


def loaded_at(history: list[events.Event]) -> float:
    """When the base model was in memory with its adapter: whatever the run says after it began to load."""
    place = next(
        i for i, e in enumerate(history) if isinstance(e, events.Phase) and e.name.startswith("loading the base")
    )
    return history[place + 1].time


def place(found: dict[str, Any]) -> str:
    """On what it was measured, in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    driver = f"; driver {found['driver'][0]}" if found["driver"] else ""
    return f"{found['device']}, {found['dtype']}; {packages}; Python {found['python']}{driver}"
