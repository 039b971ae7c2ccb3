"""Long work in a child process of its own, with progress, cancel and an outcome that survive a reload of the page.

A job is a directory: what was asked, how far it is, how it ended. Knows nothing of what the work is.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qlora_core.errors import LabError
from qlora_core.queue import SECRETS
from qlora_core.runs import lock
from qlora_core.settings import Settings

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
JOB = "QLORA_LAB_JOB"
SAY_EVERY_SECONDS = 0.3
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far a job is: `done` of `total` in `unit`; total 0 is unknown. `result` is what it made, `problems` why it failed."""

    state: str
    doing: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds: float = 0.0
    problems: tuple[str, ...] = ()
    result: dict[str, Any] = field(default_factory=dict)


class Cancelled(LabError):
    """Ends the work of a job that somebody has asked to end."""


@dataclass(frozen=True)
class Job:
    folder: Path

    @property
    def job_id(self) -> str:
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        """What it was started with."""
        return json.loads((self.folder / "arguments.json").read_text())

    def progress(self) -> Progress | None:
        """None where there is no such job. A process that died without a word has failed."""
        try:
            values = json.loads((self.folder / "progress.json").read_text())
        except (OSError, ValueError):
            return None
        found = Progress(**{**values, "problems": tuple(values["problems"])})
        if found.state == RUNNING and not self._is_alive():
            with suppress(OSError, ValueError):  # its last word may have come between the two looks
                values = json.loads((self.folder / "progress.json").read_text())
                found = Progress(**{**values, "problems": tuple(values["problems"])})
            if found.state == RUNNING:
                state = CANCELLED if (self.folder / "cancel").exists() else FAILED
                log = self._log_tail()
                told = ("the process ended without a word" + (f": {log}" if log else ""),) if state == FAILED else ()
                return Progress(state, found.doing, found.done, found.total, found.unit, found.seconds, told)
        return found

    def cancel(self) -> None:
        """Ask it to end, and end it where it does not, as in an upload whose threads wait; it removes what it has half made."""
        with suppress(OSError):
            (self.folder / "cancel").touch()
        with suppress(OSError, ValueError, ProcessLookupError):
            if self._is_alive():
                os.kill(process := int((self.folder / "lock").read_text()), signal.SIGTERM)
                threading.Thread(target=self._end, args=(process,), daemon=True).start()

    def _end(self, process: int) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while self._is_alive():
            if time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)  # with its own workers
                return
            time.sleep(0.1)

    def _is_alive(self) -> bool:
        if not (self.folder / "lock").exists():
            return False
        with lock(self.folder / "lock", shared=True) as descriptor:
            return descriptor is None

    def _log_tail(self) -> str:
        try:
            lines = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""


def find(job_id: str, settings: Settings) -> Job | None:
    folder = settings.home / "jobs" / job_id
    return Job(folder) if re.fullmatch(r"[0-9a-f]{24}", job_id) and (folder / "arguments.json").exists() else None


def running(beginning: Sequence[str], settings: Settings) -> Job | None:
    """A job that goes on and whose arguments begin so; that of a page that was closed, say. Not of one with a secret."""
    for path in (settings.home / "jobs").glob("*/arguments.json"):
        job = Job(path.parent)
        with suppress(OSError, ValueError):
            ours = job.arguments[: len(beginning)] == list(beginning) and job.job_id == _id_of(job.arguments, None)
            progress = job.progress() if ours else None
            if progress and progress.state == RUNNING:
                return job
    return None


def start(arguments: Sequence[str], settings: Settings, *, secret: str | None = None, again: bool = False) -> Job:
    """Run `python -m qlora_core ARGUMENTS` as a job; the same one that runs, or is done, is returned instead.

    `again` repeats one that is done. A secret goes through a pipe: it is in no file, argument or environment.
    """
    folder = settings.home / "jobs" / _id_of(arguments, secret)
    job, fresh = Job(folder), folder.with_name(f".{secrets.token_hex(8)}")
    with lock(folder.parent / ".lock", wait=True):
        found = job.progress()
        if found and (found.state == RUNNING or (found.state == DONE and not again)):
            return job
        # Made beside and renamed, already locked: whoever looks sees the old job or the new one, never half of one.
        fresh.mkdir()
        (fresh / "arguments.json").write_text(json.dumps(list(arguments)))
        _write(fresh / "progress.json", Progress(RUNNING, "starting"))
        with lock(fresh / "lock") as descriptor:
            assert descriptor is not None, "nobody else knows of the folder"
            if folder.exists():
                folder.rename(old := fresh.with_name(f"{fresh.name}.old"))
                shutil.rmtree(old, ignore_errors=True)
            fresh.rename(folder)
            with (folder / "log.txt").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "qlora_core", *arguments, *(["--token-from-stdin"] if secret else [])],
                    env=_environment(settings, folder),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # The child inherits the lock: it is free when the process has ended, however it ends.
                    pass_fds=(descriptor,),
                )
            os.write(descriptor, str(process.pid).encode())
        assert process.stdin is not None
        with process.stdin, suppress(BrokenPipeError):
            process.stdin.write((secret or "").encode())
    threading.Thread(target=process.wait, daemon=True).start()  # no zombie stays behind
    return job


def _id_of(arguments: Sequence[str], secret: str | None) -> str:
    # Who may not see what another's secret opens does not join their job.
    told = [*arguments, hashlib.sha256(secret.encode()).hexdigest() if secret else ""]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


def _environment(settings: Settings, folder: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in SECRETS},
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_TORCH": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        JOB: str(folder),
        **{spec.metadata["env"]: str(getattr(settings, spec.name)) for spec in fields(settings)},
    }


class Reporter:
    """The child's side: says how far it is, at most a few times a second, and raises Cancelled when it is asked to end.

    Outside of a job it says nothing, or to `say`.
    """

    def __init__(self, say: Callable[[Progress], None] | None = None) -> None:
        self._folder = Path(os.environ[JOB]) if os.environ.get(JOB) else None
        self._say, self._begun, self._last = say, time.monotonic(), 0.0
        if self._folder:
            signal.signal(signal.SIGTERM, _raise_cancelled)

    def __call__(self, doing: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        if self._folder and (self._folder / "cancel").exists():  # asked before the signal could be caught
            raise Cancelled("cancelled")
        now = time.monotonic()
        if now - self._last < SAY_EVERY_SECONDS and done < total:
            return
        self._last = now
        progress = Progress(RUNNING, doing, done, total, unit, now - self._begun)
        if self._folder:
            _write(self._folder / "progress.json", progress)
        if self._say:
            self._say(progress)

    def end(self, state: str, *, problems: Sequence[str] = (), result: dict[str, Any] | None = None) -> None:
        if self._folder:
            seconds = time.monotonic() - self._begun
            told = Progress(state, seconds=seconds, problems=tuple(problems), result=result or {})
            _write(self._folder / "progress.json", told)


def end_with(error: Exception, problems: Sequence[str]) -> None:
    """The last word of a job whose work has failed, or was cancelled; nothing outside of a job."""
    if os.environ.get(JOB):
        cancelled = isinstance(error, Cancelled)
        told = Progress(
            CANCELLED if cancelled else FAILED, problems=tuple(p for p in problems if not cancelled or p != CANCELLED)
        )
        _write(Path(os.environ[JOB]) / "progress.json", told)


def _raise_cancelled(*_: Any) -> None:
    raise Cancelled("cancelled")


def _write(path: Path, progress: Progress) -> None:
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    partial.write_text(json.dumps(asdict(progress)))
    partial.rename(path)
