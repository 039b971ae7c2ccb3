"""The queue: one run a device, in order, whoever starts it and whoever dies; a stand-in process takes the worker's place."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PYTHON, ROOT, StandIn, fake_gpus, held_by_another_process, run_in, say, settings_in, wait_for

from qlora_core import events, queue
from qlora_core.errors import RunError
from qlora_core.run_status import CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED
from qlora_core.runs import Run, RunStore, lock, queue_entries
from qlora_core.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def worker(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "stand-in", settings)
    monkeypatch.setattr("sys.executable", str(stand_in.executable))
    fake_gpus(monkeypatch)
    yield stand_in
    stand_in.end_all()


def queued(folder: Path, *names: str, **config: object) -> list[Run]:
    runs = [run_in(folder, name=name, **config) for name in names]
    for run in runs:
        queue.add(run)
    return runs


def order(settings: Settings) -> list[str]:
    return [entry.name.rpartition("-")[2] for entry in queue_entries(settings)]


def has_started(run: Run) -> bool:
    return any(isinstance(event, events.Started) for event in run.events()[0])


# --- order -------------------------------------------------------------------------------------------------------------


def test_runs_wait_in_the_order_in_which_they_came_and_once_each(tmp_path: Path, settings: Settings) -> None:
    runs = queued(tmp_path, "a", "b", "c")
    queue.add(runs[0])
    assert order(settings) == ["a", "b", "c"]
    assert [run.status().queue_place for run in runs] == [1, 2, 3]
    assert queue.waiting(settings)


@pytest.mark.parametrize(
    ("place", "expected"), [(1, ["c", "a", "b"]), (2, ["a", "c", "b"]), (3, ["a", "b", "c"]), (99, ["a", "b", "c"])]
)
def test_moved_run_has_its_new_place(tmp_path: Path, settings: Settings, place: int, expected: list[str]) -> None:
    runs = queued(tmp_path, "a", "b", "c")
    queue.move(runs[2], place)
    assert order(settings) == expected
    queued(tmp_path, "d")
    assert order(settings) == [*expected, "d"]


def test_run_that_does_not_wait_cannot_be_moved(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    say(run, events.Launched(attempt=1), events.Finished(step=1))
    with pytest.raises(RunError, match="is finished, so it has no place"):
        queue.move(run, 1)


def test_stopped_waiting_run_leaves_the_queue_and_can_be_resumed(tmp_path: Path, settings: Settings) -> None:
    first, second = queued(tmp_path, "a", "b")
    assert first.request_stop() == "taken out of the queue"
    assert (order(settings), first.status().state, second.status().queue_place) == (["b"], STOPPED, 1)
    assert "stopped before the first step" in first.status().detail
    queue.resume(first)
    assert order(settings) == ["b", "a"]
    assert not (first.path / "stop").exists()
    with pytest.raises(RunError, match="is queued; only a run that has ended can be resumed"):
        queue.resume(first)


def test_queue_needs_nothing_but_its_files(tmp_path: Path, settings: Settings) -> None:
    (run,) = queued(tmp_path, "a")
    code = (
        "import sys; from pathlib import Path; from qlora_core import queue; from qlora_core.runs import RunStore; "
        "from qlora_core.settings import Settings; s = Settings(home=Path(sys.argv[1])); "
        "queue.add(RunStore(s).list()[0]); print(queue.waiting(s), RunStore(s).list()[0].status().queue_place)"
    )
    found = subprocess.run(
        [PYTHON, "-c", code, str(settings.home)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "True 1\n"
    assert [path.read_bytes() for path in queue_entries(settings)] == [b""]


# --- starting ----------------------------------------------------------------------------------------------------------


def test_one_run_a_device_and_the_next_when_it_ends(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    first, second = queued(tmp_path, "a", "b")
    assert queue.start_next(settings) == [first]
    assert queue.start_next(settings) == []
    wait_for(lambda: has_started(first))
    assert (first.status().state, second.status().state) == (RUNNING, QUEUED)
    worker.end(first)
    assert first.status().state == FINISHED
    assert queue.start_next(settings) == [second]
    worker.end(second, "Failed")
    assert (second.status().state, order(settings)) == (FAILED, [])
    assert "learning_rate" in second.status().detail


def test_locks_pass_to_the_worker_without_a_gap(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    (run,) = queued(tmp_path, "a")
    queue.start_next(settings)
    looks = 0
    while not has_started(run):
        assert run.is_locked()
        assert run.status().state == RUNNING
        with lock(settings.locks / "cpu.lock") as device:
            assert device is None
        looks += 1
    assert looks > 3, "the stand-in started before anyone could look"
    assert worker.pid(run) != os.getpid()
    worker.end(run)
    wait_for(lambda: not Path(f"/proc/{worker.pid(run)}").exists())


def test_killed_worker_frees_its_device_at_once_and_its_run_resumes(
    tmp_path: Path, settings: Settings, worker: StandIn
) -> None:
    first, second = queued(tmp_path, "a", "b")
    queue.start_next(settings)
    wait_for(lambda: has_started(first))
    os.kill(worker.pid(first), signal.SIGKILL)
    wait_for(lambda: not first.is_locked())
    assert first.status().state == CRASHED
    assert queue.start_next(settings) == [second]
    (first.path / "stop").touch()
    queue.resume(first)
    assert not (first.path / "stop").exists(), "an old wish to stop would end the new attempt"
    worker.end(second)
    assert queue.start_next(settings) == [first]
    attempts = [event.attempt for event in first.events()[0] if isinstance(event, events.Launched)]
    assert attempts == [1, 2]


def test_worker_outlives_the_process_that_started_it(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    (run,) = queued(tmp_path, "a", device="cpu")
    code = (
        "import sys; from pathlib import Path; from qlora_core import queue; from qlora_core.settings import Settings; "
        "sys.executable = sys.argv[3]; queue.start_next(Settings(home=Path(sys.argv[1]), locks=Path(sys.argv[2])))"
    )
    arguments = [str(settings.home), str(settings.locks), str(worker.executable)]
    subprocess.run([PYTHON, "-c", code, *arguments], env={"PYTHONPATH": str(ROOT)}, check=True)
    wait_for(lambda: has_started(run))
    assert run.status().state == RUNNING
    assert os.getsid(worker.pid(run)) == worker.pid(run), "Ctrl-C in the starter's terminal must not reach it"
    worker.end(run)


def test_running_run_stops_when_asked(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    (run,) = queued(tmp_path, "a")
    queue.start_next(settings)
    wait_for(lambda: has_started(run))
    assert run.request_stop() == "saving and stopping after the current step"
    wait_for(lambda: run.status().state == STOPPED)
    with pytest.raises(RunError, match="nothing to stop"):
        run.request_stop()


def test_run_may_be_resumed_while_its_worker_still_tidies_up(
    tmp_path: Path, settings: Settings, worker: StandIn
) -> None:
    """The last event is written before the lock is free; Resume in between must not be lost."""
    run = run_in(tmp_path)
    say(run, events.Launched(attempt=1), events.Stopped(step=1))
    with held_by_another_process(run.path / "lock"):
        queue.resume(run)
        assert run.status().state == QUEUED
        assert queue.start_next(settings) == []
    assert queue.start_next(settings) == [run]


def test_entry_that_a_dead_starter_left_starts_nothing_twice(
    tmp_path: Path, settings: Settings, worker: StandIn
) -> None:
    crashed, following = queued(tmp_path, "a", "b")
    entry = queue_entries(settings)[0]
    os.utime(entry, (time.time() - 5, time.time() - 5))
    say(crashed, events.Launched(attempt=1))
    assert queue.start_next(settings) == [following]
    assert (crashed.status().state, order(settings)) == (CRASHED, [])


def test_entry_of_a_run_that_is_gone_is_removed(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    (run,) = queued(tmp_path, "b")
    (settings.queue / "00000000-20200101-000000-gone").touch()
    assert queue.start_next(settings) == [run]
    assert order(settings) == []


def test_two_starters_start_a_run_once(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    (run,) = queued(tmp_path, "a")
    with held_by_another_process(settings.queue / ".lock"):
        assert queue.start_next(settings) == []
    assert queue.start_next(settings) == [run]


def test_page_that_looks_at_a_run_does_not_keep_it_from_starting(
    tmp_path: Path, settings: Settings, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "READERS_SECONDS", 20)
    (run,) = queued(tmp_path, "a")
    with held_by_another_process(run.path / "lock", shared=True) as looker:
        threading.Timer(0.05, looker.kill).start()
        assert queue.start_next(settings) == [run]


# --- devices and environment -------------------------------------------------------------------------------------------


def test_worker_knows_no_token_and_no_network(
    tmp_path: Path, settings: Settings, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "OAUTH_CLIENT_SECRET"):
        monkeypatch.setenv(name, "hf_secret")
    (run,) = queued(tmp_path, "a")
    queue.start_next(settings)
    seen = worker.environment(run)
    assert "hf_secret" not in seen.values()
    assert (seen["HF_HUB_OFFLINE"], seen["HF_HUB_DISABLE_IMPLICIT_TOKEN"]) == ("1", "1")
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["QLORA_LAB_HOME"]) == ("", str(settings.home))
    assert b"hf_secret" not in (run.path / "log.txt").read_bytes() + run.events_path.read_bytes()


def test_each_gpu_has_its_own_run(
    tmp_path: Path, settings: Settings, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, "GPU-a", "GPU-b")
    first, second, third = queued(tmp_path, "a", "b", "c", device="auto")
    assert queue.start_next(settings) == [first, second]
    visible = [worker.environment(run)["CUDA_VISIBLE_DEVICES"] for run in (first, second)]
    assert visible == ["GPU-a", "GPU-b"]
    worker.end(second)
    assert queue.start_next(settings) == [third]
    assert worker.environment(third)["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_run_on_the_cpu_leaves_the_gpu_to_others(
    tmp_path: Path, settings: Settings, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, "GPU-a")
    runs = queued(tmp_path, "a", device="cpu") + queued(tmp_path, "b", device="cuda")
    assert queue.start_next(settings) == runs


def test_two_data_folders_share_the_devices_of_a_machine(tmp_path: Path, settings: Settings, worker: StandIn) -> None:
    queued(tmp_path, "a")
    other = Settings(home=tmp_path / "other", locks=settings.locks)
    store = RunStore(other)
    run = store.create(RunStore(settings).list()[0].config())
    queue.add(run)
    queue.start_next(settings)
    assert queue.start_next(other) == []


def test_worker_that_ends_starts_the_next_run_on_the_devices_of_the_app(
    tmp_path: Path, settings: Settings, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on the CPU sees no GPU itself, and calls the queue when it ends."""
    fake_gpus(monkeypatch, "GPU-a")
    (run,) = queued(tmp_path, "a", device="cpu")
    queue.start_next(settings)
    seen = worker.environment(run)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(os, "environ", seen)
    worker.end(run)
    (following,) = queued(tmp_path, "b", device="auto")
    assert queue.start_next(settings) == [following]
    assert worker.environment(following)["CUDA_VISIBLE_DEVICES"] == "GPU-a"


def test_unreadable_run_at_the_head_does_not_hold_up_the_queue(tmp_path: Path, worker: StandIn) -> None:
    broken, following = run_in(tmp_path, name="broken"), run_in(tmp_path, name="following")
    queue.add(broken)
    queue.add(following)
    (broken.path / "config.json").write_text("{")
    assert [run.run_id for run in queue.start_next(following.settings)] == [following.run_id]


def test_worker_that_cannot_be_started_fails_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("too many processes")

    run = run_in(tmp_path)
    queue.add(run)
    monkeypatch.setattr(queue, "_spawn", refuse)
    assert queue.start_next(run.settings) == []
    assert run.status().state == FAILED and "too many processes" in run.status().detail
