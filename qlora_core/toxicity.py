"""Texts -> how toxic a text-classification model finds them, asked of one worker process. Itself knows no torch."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from qlora_core.errors import ModelError
from qlora_core.queue import free_device, worker_environment
from qlora_core.settings import Settings

# What a classifier may consist of: no pickles, no code.
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]
HEAD = "ForSequenceClassification"
# A worker is given so many texts at a time, which it sorts by length, or fewer with so many characters.
WINDOW_TEXTS, WINDOW_CHARACTERS = 256, 1_000_000


@dataclass(frozen=True)
class Verdict:
    """`score` is the probability, from 0 to 1, that the text is toxic; `label` is the toxic label that fits it best.

    Which labels of a model are toxic: those named after it (toxic, hate, offensive, insult, threat, …); where none is, all but
    those named after the opposite (LABEL_0, neutral, normal, safe, clean, non-…, not_…, …). Of a model whose labels exclude each
    other `score` is the sum of the toxic ones' softmax; of one that may give several labels, the highest of their sigmoids.
    """

    label: str
    score: float


@dataclass
class _Count:
    cut: int = 0


class Scores(Iterator[Verdict]):
    """The verdicts in the order of the texts. Closing it, or leaving it to be collected, ends the worker process."""

    def __init__(self, verdicts: Iterator[Verdict], count: _Count) -> None:
        self._verdicts = verdicts
        self._count = count

    @property
    def cut(self) -> int:
        """Texts so far that were longer than the model reads, of which only the beginning was judged."""
        return self._count.cut

    def __next__(self) -> Verdict:
        return next(self._verdicts)

    def close(self) -> None:
        self._verdicts.close()

    def __enter__(self) -> "Scores":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scores(
    texts: Iterable[str],
    *,
    model: str,
    settings: Settings,
    report: Callable[[int], None] | None = None,
    check_stop: Callable[[], None] | None = None,
) -> Scores:
    """A verdict for each text, by the model in a folder or on the Hub ("owner/name" or "owner/name@revision").

    `report` is told how many texts are judged, `check_stop` is called as often and may raise. The process starts with the first
    text; on the first GPU if no run has it, else on the CPU. Raises ModelError, for a model that cannot be used at once and for
    one that cannot be loaded, or a process that dies, at the next verdict.
    """
    folder, count, windows = _folder(model), _Count(), _windows(texts)

    def verdicts() -> Iterator[Verdict]:
        first = next(windows, None)
        if first is None:
            return
        done = 0
        with _worker(folder, model, settings) as worker:
            for window in chain([first], windows):
                judged: dict[int, Verdict] = {}
                for answers in worker.ask(window):
                    for place, label, score, is_cut in answers:
                        judged[place] = Verdict(label, score)
                        count.cut += is_cut
                    if report:
                        report(done + len(judged))
                    if check_stop:
                        check_stop()
                done += len(window)
                yield from (judged[place] for place in range(len(window)))

    return Scores(verdicts(), count)


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


@contextmanager
def _worker(folder: Path, model: str, settings: Settings) -> Iterator["_Worker"]:
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        free_device(settings) as (device, held),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_core.worker.toxicity", str(folder)],
            env=worker_environment(settings, device=device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            pass_fds=held,  # the GPU is not free before the process has ended, even if this one is killed
        )
        try:
            yield _Worker(process, errors, model)
        finally:
            process.kill()  # it has nothing to save
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):  # what it never read
                process.stdin.close()


@dataclass(frozen=True)
class _Worker:
    """The process. It reads a line and then writes some, so that neither waits for the other to empty a pipe."""

    process: subprocess.Popen[str]
    errors: IO[str]
    model: str

    def ask(self, window: list[str]) -> Iterator[list[list[Any]]]:
        """Batches of [place in the window, label, score, whether the text was cut], in whatever order."""
        try:
            self.process.stdin.write(json.dumps(window) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        missing = len(window)
        while missing:
            line = self.process.stdout.readline()
            if not line.endswith("\n"):
                raise self._died()
            answers = json.loads(line)
            missing -= len(answers)
            yield answers

    def _died(self) -> ModelError:
        code = self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        if code < 0:
            last = f"its process was ended by signal {-code}; check the memory that is free here"
        else:
            last = said[-1].strip()[:400] if said else f"its process ended with {code} and no word"
        return ModelError(f"toxicity model {self.model!r}: {last}")


def _folder(model: str) -> Path:
    """Where the model lies; one on the Hub is fetched if its config.json is a classifier's. Raises ModelError."""
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return _checked(model, folder.resolve())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", model):
        raise ModelError(f"toxicity model {model!r}: is no folder here and no Hub id; write a folder or 'owner/name'")
    _checked(model, _fetched(model, ["config.json"]), weights=False)
    return _checked(model, _fetched(model, FILES))


def _fetched(model: str, patterns: list[str]) -> Path:
    repo_id, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns, token=False))
    except (ValueError, OSError, HfHubHTTPError, HTTPError) as error:
        raise ModelError(
            f"toxicity model {model!r}: there is no such folder here, and it could not be fetched from the Hub "
            f"({type(error).__name__}); check the spelling and the connection, or name a folder"
        ) from None


def _checked(model: str, folder: Path, *, weights: bool = True) -> Path:
    """Raises ModelError where the folder holds no classifier, naming all that is wrong."""
    problems = []
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or ["none"]
        if not any(name.endswith(HEAD) for name in names):
            problems.append(
                f"is no text classifier (its config.json names {', '.join(names)}); choose one whose architecture ends in {HEAD}"
            )
    except FileNotFoundError:
        problems.append("has no config.json; choose a folder that `save_pretrained` wrote, with model and tokenizer")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problems.append(f"config.json cannot be read ({error})")
    if weights and not any(folder.glob("*.safetensors")):
        problems.append(
            "has no .safetensors weights, and others are never loaded; convert them with "
            "`save_pretrained(safe_serialization=True)`, or choose another model"
        )
    if problems:
        raise ModelError(*(f"toxicity model {model!r}: {problem}" for problem in problems))
    return folder
