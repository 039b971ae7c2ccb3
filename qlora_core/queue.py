"""Who is next: ordered files under one short lock, and the only place that starts a worker process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

from qlora_core import devices, events
from qlora_core.config import replace
from qlora_core.errors import RunError
from qlora_core.run_status import ACTIVE, CRASHED, FAILED, FINISHED, STOPPED, RunStatus
from qlora_core.runs import READERS_SECONDS, Run, handled, lock, queue_entries
from qlora_core.settings import Settings

CPU = "cpu"
VISIBLE_GPUS = "QLORA_LAB_VISIBLE_GPUS"
# A worker reads nothing from the network and knows no token (DESIGN.md, rule 4).
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "OAUTH_CLIENT_SECRET")


def waiting(settings: Settings) -> bool:
    return bool(queue_entries(settings))


def add(run: Run) -> None:
    """Put the run at the end of the queue. Does nothing for a run that is there already or running."""
    settings = run.settings
    with lock(settings.queue / ".lock", wait=True):
        # One that has just ended may hold its lock a moment longer; the queue waits for that.
        if run.status().state in ACTIVE:
            return
        (run.path / "stop").unlink(missing_ok=True)
        entries = queue_entries(settings)
        number = int(entries[-1].name.partition("-")[0]) + 1 if entries else 1
        (settings.queue / f"{number:08d}-{run.run_id}").touch()


def resume(run: Run, *, max_steps: int | None = None) -> None:
    """Queue a stopped, crashed or failed run again; its worker goes on from the newest sound checkpoint.

    With `max_steps`, a run of any length becomes one of that many steps; so a finished run can be continued too. Raises
    RunError for a run in another state, or one that has made those steps already.
    """
    status = run.status()
    if run.analysis() and (status.state == FINISHED or max_steps is not None):
        raise RunError(
            f"{run.run_id}: compares the runs of a study and has no steps to continue; resume the study, which analyses it again "
            f"where something has changed: studies resume {run.analysis()['study_id']}"
        )
    if run.combination() and (status.state == FINISHED or max_steps is not None):
        raise RunError(
            f"{run.run_id}: combines adapters and has no steps to continue; merge it and train on the merge "
            f"(--base-model run:{run.run_id})"
        )
    if status.state == FINISHED and max_steps is None:
        raise RunError(f"{run.run_id}: is finished; to continue it, say for how many steps in all: --max-steps N")
    if status.state not in (STOPPED, CRASHED, FAILED, FINISHED):
        raise RunError(f"{run.run_id}: is {status.state}; only a run that has ended can be resumed")
    if problem := handled(run, "resume"):
        raise RunError(problem)
    if max_steps is not None:
        _lengthen(run, status, max_steps)
    add(run)


def _lengthen(run: Run, status: RunStatus, max_steps: int) -> None:
    if max_steps <= status.step:
        raise RunError(f"{run.run_id}: max_steps is {max_steps}; it has made {status.step} steps, so it must be more")
    config = replace(run.config(), max_steps=max_steps)
    said = f"continued: {max_steps} steps in all; the learning rate goes on as its schedule for so many steps has it"
    if config.early_stopping_patience is not None:
        config = replace(config, early_stopping_patience=None)
        said += "; early stopping is off from here on"
    with lock(run.path / "lock", patience_seconds=READERS_SECONDS) as held:
        if held is None:
            raise RunError(f"{run.run_id}: is running; wait until it has ended, or stop it")
        run.change_config(config)
        events.append(run.events_path, events.Note(text=said))


def move(run: Run, place: int) -> None:
    """Give a waiting run another place, 1 for the next. Raises RunError when it does not wait."""
    with lock(run.settings.queue / ".lock", wait=True):
        entries = queue_entries(run.settings)
        ids = [entry.name.partition("-")[2] for entry in entries]
        if run.run_id not in ids:
            raise RunError(f"{run.run_id}: is {run.status().state}, so it has no place in the queue")
        ids.remove(run.run_id)
        ids.insert(max(0, place - 1), run.run_id)
        # New numbers lie above all old ones, so that a kill between two renames loses no run.
        base = int(entries[-1].name.partition("-")[0]) + 1
        by_id = {entry.name.partition("-")[2]: entry for entry in entries}
        for number, run_id in enumerate(ids, base):
            by_id[run_id].rename(run.settings.queue / f"{number:08d}-{run_id}")


def start_next(settings: Settings) -> list[Run]:
    """Start every waiting run whose device is free, in order; returns those started.

    Whoever is alive calls this: the app on its timer, a finishing worker, the command line.
    """
    started = []
    with lock(settings.queue / ".lock") as held:
        if held is None:
            return []
        for entry in queue_entries(settings):
            run = Run(settings.runs / entry.name.partition("-")[2], settings)
            if not (run.path / "config.json").exists() or _launched_since(run, entry):
                entry.unlink(missing_ok=True)
                continue
            try:
                if not _waits_for_others(run) and _start(run, entry):
                    started.append(run)
            except (RunError, ValueError):  # unreadable: it stays, for a person to see and delete, and holds nobody up
                continue
    return started


def _waits_for_others(run: Run) -> bool:
    """An analysis compares what has ended: on a machine of several GPUs its study's last runs may still train."""
    analysis = run.analysis()
    if analysis is None:
        return False
    try:
        study = json.loads((run.settings.home / "studies" / analysis["study_id"] / "study.json").read_text())
    except (OSError, ValueError):  # gone: its worker says so
        return False
    waiting = {entry.name.partition("-")[2] for entry in queue_entries(run.settings)}
    others = [Run(run.settings.runs / entry["run_id"], run.settings) for entry in study["runs"] if entry["run_id"]]
    return any((other.run_id in waiting and _can_start(other)) or other.is_locked() for other in others)


def _can_start(run: Run) -> bool:
    """A run that cannot be read stays in the queue for a person to see, and never ends."""
    try:
        run.config()
    except (OSError, RunError):
        return False
    return True


def _launched_since(run: Run, entry: Path) -> bool:
    """True when the starter died between the launch and the removal of the entry."""
    queued_at = entry.stat().st_mtime
    return any(isinstance(event, events.Launched) and event.time > queued_at for event in run.events()[0])


def _start(run: Run, entry: Path) -> bool:
    """Start the run's worker on the first free device that it may use; False when none is free.

    Both locks pass to the worker as open descriptors: there is no moment in which nobody holds them, and the kernel
    frees them when the worker ends, however it ends.
    """
    for device in _devices_for(run):
        with (
            lock(run.settings.locks / f"{device}.lock") as device_lock,
            lock(run.path / "lock", patience_seconds=READERS_SECONDS) as run_lock,
        ):
            if device_lock is None:
                continue
            if run_lock is None:
                return False
            earlier = run.events()[0]
            attempt = 1 + sum(isinstance(event, events.Launched) for event in earlier)
            events.append(run.events_path, events.Launched(attempt=attempt))
            try:
                process = _spawn(run, device, (device_lock, run_lock))
            except OSError as error:
                reason = f"the worker could not be started: {error}; mend that, then resume"
                events.append(run.events_path, events.Failed(step=0, reason=reason))
                entry.unlink(missing_ok=True)
                return False
            # Waits for its end, or it would stay a zombie while this process lives.
            threading.Thread(target=process.wait, daemon=True).start()
            os.ftruncate(run_lock, 0)
            os.pwrite(run_lock, f"{process.pid}\n".encode(), 0)
            entry.unlink(missing_ok=True)
            return True
    return False


def _devices_for(run: Run) -> list[str]:
    wanted = run.config().device
    # A worker that has ended sees its own device only; it was told what the whole machine may use.
    found = [gpu.uuid for gpu in devices.gpus(visible=os.environ.get(VISIBLE_GPUS))]
    if wanted == CPU or not found:
        return [CPU]
    return found


@contextmanager
def host_work(settings: Settings, report: Callable[[str], None]) -> Iterator[None]:
    """One at a time on this machine: what takes as much host memory as a model has. Each looks at what is free when it begins."""
    path = settings.locks / "host-work.lock"
    with lock(path) as held:
        if held is not None:
            yield
            return
    report("waiting for another merge or proof on this machine to end")
    with lock(path, wait=True):
        yield


@contextmanager
def free_device(settings: Settings, *, gpu: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """For work that is no run: the first GPU that no run has, held, with the lock's descriptor for the process that is to use it;
    else, or without `gpu`, the CPU, which takes no turns here."""
    with ExitStack() as stack:
        for found in devices.gpus(visible=os.environ.get(VISIBLE_GPUS)) if gpu else ():
            held = stack.enter_context(lock(settings.locks / f"{found.uuid}.lock"))
            if held is not None:
                yield found.uuid, (held,)
                return
        yield CPU, ()


def worker_environment(settings: Settings, *, device: str) -> dict[str, str]:
    """What a worker process sees: no token, no network, the one device it may use."""
    # A job of the page keeps torch out of itself (jobs.py); its worker needs it.
    environment = {name: value for name, value in os.environ.items() if name not in (*SECRETS, "USE_TORCH")}
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Without it two busy processes stall each other 3 to 10 times (torch's OpenMP threads spin).
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_CUDA_ALLOC_CONF": environment.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        VISIBLE_GPUS: os.environ.get(VISIBLE_GPUS, os.environ.get("CUDA_VISIBLE_DEVICES", devices.ALL)),
        "CUDA_VISIBLE_DEVICES": "" if device == CPU else device,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), environment.get("PYTHONPATH")])),
        **{spec.metadata["env"]: str(getattr(settings, spec.name)) for spec in fields(settings)},
    }


def _spawn(run: Run, device: str, locks: tuple[int, int]) -> subprocess.Popen[bytes]:
    with (run.path / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_core.worker", str(run.path), *map(str, locks)],
            env=worker_environment(run.settings, device=device),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=locks,
            cwd=run.path,
        )
