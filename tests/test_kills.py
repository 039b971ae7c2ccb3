"""Workers killed at random moments, also while they write a checkpoint: resuming changes no bit of what a run ends with."""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_for
from tiny_models import adapter_bytes, eval_losses, losses, make_run, said

from qlora_core import events, queue
from qlora_core.run_status import CRASHED, FINISHED, RUNNING
from qlora_core.runs import Run

pytestmark = pytest.mark.slow

KILLS = 5
STEPS = 60
# A checkpoint at every step: the worker spends about as much time writing them as it spends on steps.
OFTEN_SAVED: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "eval_steps": 7,
    "lora_dropout": 0.1,
    "keep_checkpoints": 2,
}


@dataclass
class Killer:
    """Kills a run's worker at a moment drawn from the seed, and remembers what each kill left."""

    run: Run
    chance: random.Random
    at_step: list[int] = field(default_factory=list)
    half_written: int = 0

    def partial_checkpoints(self) -> list[Path]:
        return list((self.run.path / "checkpoints").glob("checkpoint-*.partial"))

    def kill(self, *, while_writing: bool) -> None:
        """Some steps after the last kill: at any moment of them, or on sight of a checkpoint that is being written."""
        newest = self.at_step[-1] if self.at_step else 0
        aim = newest + self.chance.randint(1, (STEPS - newest) // (KILLS + 1 - len(self.at_step)) + 1)
        delay_seconds = self.chance.uniform(0, 0.15)
        wait_for(lambda: self.step() >= aim or self.run.status().state != RUNNING, seconds=120)
        assert self.run.status().state == RUNNING, self.run.log_tail()
        worker = int((self.run.path / "lock").read_text())
        if while_writing:
            until = time.monotonic() + 10
            while not self.partial_checkpoints() and time.monotonic() < until:
                pass  # a checkpoint takes milliseconds: looking less often would miss it
        else:
            threading.Event().wait(delay_seconds)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: self.run.status().state == CRASHED)
        self.half_written += bool(self.partial_checkpoints())
        self.at_step.append(self.step())

    def step(self) -> int:
        return max((event.step for event in said(self.run, events.Step)), default=0)


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def start(run: Run) -> None:
    wait_for(lambda: queue.start_next(run.settings) or run.queue_place() is None)


def finish(run: Run) -> None:
    wait_for(lambda: run.status().state != RUNNING, seconds=180)
    assert run.status().state == FINISHED, run.log_tail()


@pytest.mark.parametrize(("method", "seed"), [("lora", 1), ("qlora", 2)])
def test_a_run_killed_five_times_ends_with_the_same_bits(
    method: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # one thread adds in the same order in every process
    undisturbed = make_run(folder(tmp_path, "undisturbed"), method=method, **OFTEN_SAVED)
    queue.add(undisturbed)
    start(undisturbed)
    finish(undisturbed)

    run = make_run(folder(tmp_path, "killed"), method=method, **OFTEN_SAVED)
    killer = Killer(run, random.Random(seed))
    queue.add(run)
    start(run)
    for number in range(KILLS):
        killer.kill(while_writing=number % 2 == 1)
        queue.resume(run)
        start(run)
    finish(run)

    resumed = [event.from_step for event in run.events()[0] if isinstance(event, events.Resumed)]
    print(f"{method}: killed at steps {killer.at_step}, {killer.half_written} of {KILLS} left half a checkpoint")
    assert len(resumed) == KILLS and all(0 <= at - back <= 1 for at, back in zip(killer.at_step, resumed, strict=True))
    assert killer.half_written >= 1, "no kill met a checkpoint that was being written"
    assert not killer.partial_checkpoints(), "what a kill left of a checkpoint is swept up"
    assert losses(run) == losses(undisturbed) and len(losses(run)) == STEPS
    assert eval_losses(run) == eval_losses(undisturbed)
    assert adapter_bytes(run) == adapter_bytes(undisturbed)
    assert run.result()["meta_info"]["attempts"] == KILLS + 1
