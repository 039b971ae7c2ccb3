"""Runs: each is a directory that holds everything about it, and the directory is the truth. Starts no process."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core import events, models, trackers
from qlora_core.config import TrainConfig
from qlora_core.data.locate import locate
from qlora_core.data.stored import StoredDataset, store
from qlora_core.errors import ConfigError, RunError
from qlora_core.events import Event
from qlora_core.run_status import ACTIVE, CRASHED, QUEUED, RunStatus, fold
from qlora_core.settings import Settings
from qlora_core.storage import new_folder, new_id, remove_folder, sync, write_json

READERS_SECONDS = 0.2  # far longer than `Run.is_locked` holds a lock


@dataclass(frozen=True)
class Run:
    """One run's directory: config.json, model.json, dataset/, events.jsonl, log.txt, checkpoints/, adapter/, result.json."""

    path: Path
    settings: Settings

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def config(self) -> TrainConfig:
        """Raises RunError where another version, or a crash of the machine, left what cannot be read."""
        try:
            return TrainConfig.from_json_file(self.path / "config.json")
        except (ConfigError, ValueError) as error:
            raise RunError(f"{self.run_id}: its config.json cannot be read ({error}); delete the run") from None

    def change_config(self, config: TrainConfig) -> None:
        """Only the holder of the run's lock may. The run is then no longer the one that its key stands for."""
        write_json(self.path / "config.json", config.to_json())
        (self.path / "key").unlink(missing_ok=True)

    def key(self) -> str | None:
        """Equal for equal settings on equal rows and base; None in a folder that something else made."""
        path = self.path / "key"
        return path.read_text() if path.exists() else None

    def base_model(self) -> models.BaseModel:
        return models.BaseModel.from_json(json.loads((self.path / "model.json").read_text()))

    def dataset(self) -> StoredDataset:
        return StoredDataset.load(self.path / "dataset")

    def result(self) -> dict[str, Any] | None:
        """What the run found: run_info, train_info, meta_info; None until it has ended with an adapter."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def combination(self) -> dict[str, Any] | None:
        """The adapters that this run adds up instead of training one (combining.py); None for a run that trains."""
        path = self.path / "combination.json"
        return json.loads(path.read_text()) if path.exists() else None

    def analysis(self) -> dict[str, Any] | None:
        """The study that this run compares the adapters of instead of training one (studies.py); None for others."""
        path = self.path / "analysis.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def trains(self) -> bool:
        """Whether it learns an adapter of its own, in steps."""
        return self.combination() is None and self.analysis() is None

    def events(self, offset: int = 0) -> tuple[list[Event], int]:
        return events.read(self.events_path, offset)

    def history(self) -> list[Event]:
        """The events that still hold, over all attempts."""
        return events.effective(events.read_all(self.events_path))

    def log_tail(self, lines: int = 40) -> str:
        """The end of what the worker printed; at most 64 KiB are read."""
        try:
            with (self.path / "log.txt").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def queue_place(self) -> int | None:
        """1 for the next run to start; None when the run is not waiting."""
        for place, entry in enumerate(queue_entries(self.settings), 1):
            if entry.name.partition("-")[2] == self.run_id:
                return place
        return None

    def status(self) -> RunStatus:
        """Raises RunError for a run whose files cannot be read."""
        status = fold(self)
        # It may have ended between the look at its events and the look at its lock; a second look sees its last word.
        return fold(self) if status.state == CRASHED else status

    def is_locked(self) -> bool:
        """True while a worker (or the queue, about to start it) holds the run."""
        if not self.path.exists():  # deleted meanwhile; a lock would make its folder again
            return False
        with lock(self.path / "lock", shared=True) as descriptor:
            return descriptor is None

    def request_stop(self) -> str:
        """Ask the worker to save and stop, or take the run out of the queue. Returns what happens, as a sentence.

        Raises RunError when there is nothing to stop.
        """
        state = self.status().state
        if state not in ACTIVE:
            raise RunError(f"{self.run_id}: is {state}, so there is nothing to stop")
        (self.path / "stop").touch()
        with (
            lock(self.settings.queue / ".lock", wait=True),
            lock(self.path / "lock", patience_seconds=READERS_SECONDS if state == QUEUED else 0) as descriptor,
        ):
            if descriptor is not None:
                # Nobody trains it: what is left is the queue's entry, or the last word of a worker that has just ended.
                (self.path / "stop").unlink(missing_ok=True)
                if self.queue_place() is None:
                    return "has just ended by itself"
                remove_from_queue(self)
                launched = any(isinstance(event, events.Launched) for event in self.events()[0])
                # A run that has ended before keeps that ending.
                events.append(
                    self.events_path,
                    events.Note(text="taken out of the queue") if launched else events.Stopped(step=0),
                )
                return "taken out of the queue"
        # The worker looks for the file between passes, steps and tokens; a signal would kill one that is still starting.
        return "saving and stopping after the current step"


class RunStore:
    """All runs below `settings.home`. Keeps nothing in memory that matters."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def create(self, config: TrainConfig, *, token: str | None = None) -> Run:
        """Check and copy the dataset, resolve the base model, and make the run's directory.

        The same config on the same rows while such a run is queued or running returns that run: a double click
        starts one. Raises ConfigError, DatasetError, ModelError.
        """
        if without_tracker := trackers.problem(config):
            raise ConfigError(without_tracker)
        with new_folder(self.settings.runs) as folder:
            # The dataset first: a typo in its name must not cost the download of a model.
            located = locate(config, self.settings, token=token)
            dataset = store(located, folder / "dataset", limits=self.settings.limits, max_rows=self.settings.max_rows)
            config = located.config
            model = models.resolve(config.base_model, self.settings, token=token)
            return self.publish(folder, config, model, [dataset.train_fingerprint, dataset.eval_fingerprint])

    def publish(self, folder: Path, config: TrainConfig, model: models.BaseModel, made_of: Any) -> Run:
        """Make the prepared folder a run, all at once; or return the run of the same config, base and `made_of` that is
        queued or running."""
        key = hashlib.sha256(json.dumps([config.to_json(), model.to_json(), *made_of]).encode()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
        (folder / "model.json").write_text(json.dumps(model.to_json(), indent=1))
        (folder / "key").write_text(key)
        for path in folder.glob("*"):
            sync(path)
        with lock(self.settings.runs / ".lock", wait=True):
            for run in self.list():
                # A run without events is about to be queued.
                if run.key() == key and (run.status().state in ACTIVE or not run.events_path.exists()):
                    return run
            path = self.settings.runs / new_id(config.run_name(), otherwise="run")
            folder.rename(path)
        return Run(path, self.settings)

    def get(self, run_id: str) -> Run:
        """Raises RunError; names runs that the text is the beginning of."""
        ids = [run.run_id for run in self.list()]
        if run_id in ids:
            return Run(self.settings.runs / run_id, self.settings)
        close = [known for known in ids if known.startswith(run_id)] if run_id else []
        if len(close) == 1:
            return Run(self.settings.runs / close[0], self.settings)
        close = close or (self._named(run_id) if run_id else [])
        hint = f"it could be {', '.join(close)}" if close else "`python -m qlora_core runs list` shows those there are"
        raise RunError(f"there is no run {run_id!r}; {hint}")

    def _named(self, name: str) -> list[str]:
        found = []
        for run in self.list():
            with contextlib.suppress(RunError, OSError):  # one that cannot be read has no name
                found += [run.run_id] if run.config().run_name() == name else []
        return found

    def get_all(self, run_ids: Iterable[str]) -> "list[Run]":
        """Raises RunError naming every one that is not there."""
        found, problems = [], []
        for run_id in run_ids:
            try:
                found.append(self.get(run_id))
            except RunError as error:
                problems += error.problems
        if problems:
            raise RunError(*problems)
        return found

    def list(self) -> list[Run]:
        """Newest first."""
        if not self.settings.runs.is_dir():
            return []
        paths = [p.parent for p in self.settings.runs.glob("*/config.json") if not p.parent.name.startswith(".")]
        return [Run(path, self.settings) for path in sorted(paths, key=lambda p: p.name, reverse=True)]

    def delete(self, run: Run) -> None:
        """Raises RunError while the run is queued or running, or another run cannot do without its files."""
        try:
            state = run.status().state  # asked before the lock is ours, or it would be running
        except RunError:
            state = "unreadable"
        with lock(run.path / "lock", patience_seconds=READERS_SECONDS) as descriptor:
            if descriptor is None or run.queue_place():
                raise RunError(f"{run.run_id}: is {state}; stop it before you delete it")
            if problem := handled(run, "delete") or self._needed(run):
                raise RunError(problem)
            remove_folder(run.path)
            for copy in self.settings.downloads.glob(f"{run.run_id}*"):
                copy.unlink(missing_ok=True)

    def deletion_problem(self, run: Run) -> str | None:
        """Why the run cannot be deleted now, or None."""
        try:
            state = run.status().state
        except RunError:  # unreadable ones can go
            state = ""
        return (
            f"{run.run_id}: is {state}; stop it before you delete it"
            if state in ACTIVE
            else handled(run, "delete") or self._needed(run)
        )

    def _needed(self, run: Run) -> str | None:
        needed_by = [i for i in (*self.based_on(run.path), *self._combining(run)) if i != run.run_id]
        if not needed_by:
            return None
        return (
            f"{run.run_id}: its files are needed by {', '.join(needed_by)}, which could no longer be trained or "
            f"merged; delete {'that run' if len(needed_by) == 1 else 'those runs'} first"
        )

    def based_on(self, folder: Path) -> tuple[str, ...]:
        """Ids of runs whose base model lies in the folder or below it."""
        return self._ids(lambda run: run.base_model().folder.is_relative_to(folder.resolve()))

    def _combining(self, run: Run) -> tuple[str, ...]:
        """Ids of combinations of the run's adapter that are yet to be made."""

        def waits_for_it(other: Run) -> bool:
            parts = (other.combination() or {"parts": []})["parts"]
            return run.run_id in [part["run_id"] for part in parts] and other.status().state in ACTIVE

        return self._ids(waits_for_it)

    def _ids(self, chosen: Callable[[Run], bool]) -> tuple[str, ...]:
        found = []
        for run in self.list():
            with contextlib.suppress(OSError, ValueError, RunError):  # a run that cannot be read needs nothing
                if chosen(run):
                    found.append(run.run_id)
        return tuple(found)


def handled(run: Run, what: str) -> str | None:
    """What somebody is doing with the run's files just now, as the reason not to `what` it."""
    for name, doing in (("publish.lock", "pushed"), ("merge.lock", "merged")):
        if (run.path / name).exists():
            with lock(run.path / name, shared=True) as free:
                if free is None:
                    return f"{run.run_id}: is being {doing}; wait for that to end, then {what} it"
    return None


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False, patience_seconds: float = 0) -> Iterator[int | None]:
    """Hold a `flock` on the file; yields its descriptor, or None when another process has it and `wait` is off.

    `patience_seconds` outlasts those who only look whether it is held, and hold it shared for that moment.

    The kernel frees it when the last process that inherited the descriptor ends, SIGKILL included.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        deadline, held = time.monotonic() + patience_seconds, False
        while not held:
            try:
                fcntl.flock(descriptor, mode)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.002)
        yield descriptor if held else None
    finally:
        os.close(descriptor)


def queue_entries(settings: Settings) -> list[Path]:
    """Files `<place>-<run id>` in the order in which runs will start."""
    return sorted(settings.queue.glob("[0-9]*-*")) if settings.queue.is_dir() else []


def remove_from_queue(run: Run) -> None:
    for entry in queue_entries(run.settings):
        if entry.name.partition("-")[2] == run.run_id:
            entry.unlink(missing_ok=True)
