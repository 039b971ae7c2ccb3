"""What a worker says: events appended to a file one line each, and read from an offset. Knows nothing of training."""

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """`time` is seconds since the epoch."""

    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Launched(Event):
    """The queue started a worker process; written before it, under the run's lock."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """A sentence for the log."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Phase(Event):
    """Work around the steps, such as loading or scoring: `done` of `total` units, or total 0 when it has none."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """What will run, decided: the device, the path through the code and why."""

    total_steps: int
    train_rows: int
    eval_rows: int
    rows_cut: int
    rows_left_out: tuple[int, ...]
    device: str
    compute_dtype: str
    template: str
    packed: bool
    packed_reason: str
    compiled: bool
    compiled_reason: str
    token_budget: int
    trainable_parameters: int
    fused: bool
    fused_reason: str
    checkpointed_layers: int
    offloaded: bool
    memory_reason: str
    # What the plan expects: peak allocated on a GPU, peak host memory on a CPU.
    estimated_peak_bytes: int
    load_peak_host_bytes: int | None
    load_peak_allocated_bytes: int | None
    # Lines of the evaluation rows that were left out: of the file named in eval_data, else of the same file.
    eval_rows_left_out: tuple[int, ...] = ()
    # Bytes of that peak by part, as MemoryEstimate.parts() names them.
    estimated_parts: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> tuple[str, ...]:
        """Which way through the code was taken, and why."""
        return self.fused_reason, self.packed_reason, self.compiled_reason, self.memory_reason


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """Training goes on after `from_step`; what earlier attempts said of later steps no longer holds."""

    from_step: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer step. `tokens` counts what the model read, without padding. GPU figures are None on a CPU."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    step_seconds: float
    tokens: int
    supervised_tokens: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_host_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Event):
    """`loss` is the mean over all supervised tokens of the evaluation rows."""

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Score(Event):
    """A task score: `correct` of `total` generated answers."""

    step: int
    name: str
    correct: int
    total: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event):
    step: int


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """`reason` is a sentence where the run ended before its last planned step, else empty."""

    step: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """A person stopped the run; everything up to `step` is saved."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run cannot go on; `reason` says what, where and the remedy."""

    step: int
    reason: str


KINDS: dict[str, type[Event]] = {
    cls.__name__.lower(): cls
    for cls in (Launched, Note, Phase, Started, Resumed, Step, Evaluation, Score, Checkpoint, Finished, Stopped, Failed)
}
TERMINAL = (Finished, Stopped, Failed)


def append(path: Path, event: Event) -> None:
    """Add one event; only the holder of the run's lock may. A line that a killed writer left unfinished is cut first."""
    line = json.dumps(to_json(event), allow_nan=False, ensure_ascii=False)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(_end_of_last_line(file, end))
        file.truncate()
        # Half a surrogate pair, from a file name, becomes the escape that JSON has for it.
        file.write(line.encode(errors="backslashreplace") + b"\n")


def _end_of_last_line(file: Any, end: int) -> int:
    """Offset just after the last newline before `end`; 0 if there is none."""
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Events from byte `offset` on, and the offset to read from next. A last line without newline is left for later."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    return [parse(line) for line in complete.splitlines()], offset + len(complete)


_parsed: dict[Path, tuple[int, int, list[Event]]] = {}
_parsed_lock = threading.Lock()
PARSED_FILES = 32


def read_all(path: Path) -> list[Event]:
    """All events of the file. What an earlier call parsed is kept, so a poll costs only what is new.

    A file that was replaced has another inode and is read again; a file only ever grows otherwise.
    """
    try:
        inode = path.stat().st_ino
    except FileNotFoundError:
        return []
    with _parsed_lock:
        known_inode, offset, known = _parsed.pop(path, (inode, 0, []))
        if known_inode != inode:
            offset, known = 0, []
        found, offset = read(path, offset)
        known.extend(found)
        _parsed[path] = inode, offset, known
        while len(_parsed) > PARSED_FILES:
            del _parsed[next(iter(_parsed))]
        return list(known)


def parse(line: bytes | str) -> Event:
    values = json.loads(line)
    cls = KINDS[values.pop("event")]
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def to_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__.lower(), **asdict(event)}


# The first steps pay for caches and memory pools; they are left out of every figure of speed.
WARM_UP_STEPS = 2


def timed_steps(history: list[Event]) -> list[Step]:
    """The steps that figures of speed are made of."""
    steps = [event for event in history if isinstance(event, Step)]
    return steps[WARM_UP_STEPS:] or steps


def peak(history: list[Event], name: str) -> int | None:
    """The largest of one kind of memory over all steps, in bytes; None where it was never measured."""
    return max(
        (value for e in history if isinstance(e, Step) and (value := getattr(e, name)) is not None), default=None
    )


def effective(events: list[Event]) -> list[Event]:
    """The events that still hold: after `Resumed(from_step=N)`, what earlier attempts said beyond step N is dropped.

    From step 0, the first evaluation and score are made again too.
    """
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Resumed):
            kept = [e for e in kept if not isinstance(e, TERMINAL) and not _comes_again(e, event.from_step)]
        kept.append(event)
    return kept


def _comes_again(event: Event, from_step: int) -> bool:
    step = getattr(event, "step", -1)
    return step > from_step or (step == from_step == 0 and isinstance(event, (Score, Evaluation)))
