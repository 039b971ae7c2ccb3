"""Runs: what the page says of a run is what its directory and the kernel's locks say, whoever was killed when."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    alpaca,
    config_in,
    held_by_another_process,
    run_in,
    say,
    settings_in,
    started,
    step,
    write_rows,
)

from qlora_core import events, queue, runs
from qlora_core.config import replace
from qlora_core.errors import DatasetError, ModelError, RunError
from qlora_core.run_status import CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED
from qlora_core.runs import Run, RunStore, lock

ATTEMPT = events.Launched(attempt=1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_in(tmp_path)


def test_run_holds_its_settings_model_and_rows(run: Run, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    assert run.config() == config
    assert run.base_model().folder == tmp_path / "tiny"
    assert (run.dataset().train_rows, run.dataset().eval_rows) == (9, 1)
    assert (run.result(), run.log_tail(), run.history()) == (None, "", [])
    assert json.loads(json.dumps(run.status().to_json()))["run_id"] == run.run_id


def test_token_given_for_the_download_is_in_no_file(tmp_path: Path) -> None:
    run = RunStore(settings_in(tmp_path)).create(config_in(tmp_path), token="hf_secret")
    assert not any(b"hf_secret" in path.read_bytes() for path in run.path.rglob("*") if path.is_file())


def test_failed_creation_leaves_nothing_behind(tmp_path: Path) -> None:
    store = RunStore(settings_in(tmp_path))
    with pytest.raises(DatasetError):
        store.create(config_in(tmp_path, data=str(tmp_path / "missing.jsonl")))
    with pytest.raises(ModelError):
        store.create(config_in(tmp_path, base_model=str(tmp_path)))
    assert (store.list(), list((tmp_path / "home" / "runs").glob(".creating-*"))) == ([], [])


# --- states ------------------------------------------------------------------------------------------------------------


def test_waiting_run_knows_its_place(run: Run, tmp_path: Path) -> None:
    queue.add(run_in(tmp_path, name="first"))
    queue.add(run)
    status = run.status()
    assert (status.state, status.queue_place) == (QUEUED, 2)
    assert "place 2" in status.detail


def test_run_is_running_while_another_process_holds_its_lock(run: Run) -> None:
    say(run, ATTEMPT, started(), step(1), step(2), events.Phase(name="evaluating", done=3, total=4))
    with held_by_another_process(run.path / "lock"):
        status = run.status()
    assert (status.state, status.step, status.total_steps, status.detail) == (RUNNING, 2, 10, "evaluating 3 of 4")
    assert (status.loss, status.step_seconds) == (1.5, 0.5)
    assert (status.phase, status.phase_done, status.phase_total) == ("evaluating", 3, 4)


def test_run_whose_worker_is_killed_is_crashed_at_once(run: Run) -> None:
    say(run, ATTEMPT, started(), step(1), events.Checkpoint(step=1), step(2))
    with held_by_another_process(run.path / "lock") as holder:
        assert run.status().state == RUNNING
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        status = run.status()
    assert (status.state, status.step, status.checkpoint_step) == (CRASHED, 2, 1)
    assert "can be resumed from step 1" in status.detail
    assert status.eta_seconds is None


@pytest.mark.parametrize(
    ("end", "state", "says"),
    [
        (events.Finished(step=1), FINISHED, "finished after 1 steps"),
        (events.Stopped(step=1), STOPPED, "saved at step 1"),
        (events.Failed(step=1, reason="the loss is nan; lower learning_rate"), FAILED, "lower learning_rate"),
    ],
)
def test_last_word_of_the_worker_is_the_state(run: Run, end: events.Event, state: str, says: str) -> None:
    say(run, ATTEMPT, started(), step(1), events.Checkpoint(step=1), end)
    with held_by_another_process(run.path / "lock"):
        assert run.status().state == state, "a worker that has said its last word only tidies up"
    assert run.status().state == state
    assert says in run.status().detail


def test_only_the_last_attempt_counts(run: Run) -> None:
    say(run, ATTEMPT, started(), step(1), events.Checkpoint(step=1), events.Failed(step=1, reason="memory"))
    queue.resume(run)
    assert run.status().state == QUEUED
    say(run, events.Launched(attempt=2))
    with held_by_another_process(run.path / "lock"):
        assert run.status().state == RUNNING
    say(run, events.Resumed(from_step=1), step(2), events.Finished(step=2))
    for entry in run.settings.queue.glob("0*"):
        entry.unlink()
    assert run.status().state == FINISHED
    assert run.status().step == 2


def test_run_without_steps_says_that_it_starts(run: Run) -> None:
    say(run, ATTEMPT)
    with held_by_another_process(run.path / "lock"):
        status = run.status()
        assert (status.detail, status.step, status.loss, status.eta_seconds) == ("starting", 0, None, None)
        (run.path / "stop").touch()
        assert run.status().detail == "saving and stopping, starting"
    assert "resuming starts again" in run.status().detail


def test_log_shows_its_end_whatever_bytes_it_holds(run: Run) -> None:
    (run.path / "log.txt").write_bytes(b"x" * 200_000 + b"\n\xff\n" + b"\n".join(b"line %d" % i for i in range(50)))
    assert run.log_tail(2) == "line 48\nline 49"
    assert "\ufffd" in run.log_tail(60)


# --- creating, finding, deleting ---------------------------------------------------------------------------------------


def test_double_click_makes_one_run(run: Run, tmp_path: Path) -> None:
    assert run_in(tmp_path).run_id == run.run_id, "before it is queued"
    queue.add(run)
    assert run_in(tmp_path).run_id == run.run_id, "while it waits"
    say(run, ATTEMPT)
    with held_by_another_process(run.path / "lock"):
        assert run_in(tmp_path).run_id == run.run_id, "while it runs"
    assert len(RunStore(run.settings).list()) == 1
    assert not list(run.settings.runs.glob(".creating-*"))


def test_clicks_of_many_threads_make_one_run(tmp_path: Path) -> None:
    config, found = config_in(tmp_path), []

    def click() -> None:
        run = RunStore(settings_in(tmp_path)).create(config)
        queue.add(run)
        found.append(run.run_id)

    threads = [threading.Thread(target=click) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert len(list((tmp_path / "home" / "queue").glob("0*"))) == 1


def test_other_settings_other_rows_or_an_ended_run_make_a_new_one(run: Run, tmp_path: Path) -> None:
    queue.add(run)
    ids = {run.run_id, run_in(tmp_path, rank=4).run_id}
    write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(11)])
    again = run_in(tmp_path)
    ids.add(again.run_id)
    say(again, ATTEMPT, events.Finished(step=1))
    ids.add(run_in(tmp_path).run_id)
    assert len(ids) == 4


def test_run_is_found_by_the_beginning_of_its_id(run: Run, tmp_path: Path) -> None:
    store = RunStore(run.settings)
    assert store.get(run.run_id) == store.get(run.run_id[:18]) == run
    other = run_in(tmp_path, name="other")
    with pytest.raises(RunError, match="it could be") as error:
        store.get(run.run_id[:4])
    assert run.run_id in str(error.value) and other.run_id in str(error.value)
    for text in ("", "nothing", "../runs", "."):
        with pytest.raises(RunError, match="there is no run"):
            store.get(text)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b\0c", "   ", "é😀", "x" * 500, ".hidden"])
def test_any_name_makes_a_safe_folder(tmp_path: Path, name: str) -> None:
    run = run_in(tmp_path, name=name)
    assert run.path.parent == run.settings.runs
    assert run.run_id.isascii() and len(run.run_id) < 100
    assert RunStore(run.settings).list() == [run]
    assert run.status().name == name


def test_list_is_newest_first_and_passes_over_foreign_folders(run: Run, tmp_path: Path) -> None:
    store = RunStore(run.settings)
    newer = Run(run.path.rename(run.path.with_name("20200101-000000-aaaa-old")), run.settings), run_in(tmp_path, rank=4)
    for foreign in ("notes", ".creating-1-abcd"):
        (run.settings.runs / foreign).mkdir()
    (run.settings.runs / "README.txt").touch()
    assert [found.run_id for found in store.list()] == [newer[1].run_id, newer[0].run_id]
    assert RunStore(settings_in(tmp_path / "empty")).list() == []


def test_active_run_is_not_deleted_and_an_ended_one_is(run: Run) -> None:
    store = RunStore(run.settings)
    queue.add(run)
    with pytest.raises(RunError, match="is queued; stop it"):
        store.delete(run)
    run.request_stop()
    say(run, ATTEMPT)
    with held_by_another_process(run.path / "lock"), pytest.raises(RunError, match="is running; stop it"):
        store.delete(run)
    assert run.config()
    store.delete(run)
    assert not run.path.exists() and list(run.settings.runs.glob("*/")) == []


def test_page_that_looks_at_a_run_does_not_keep_it_from_being_deleted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking takes a shared lock for a moment."""
    monkeypatch.setattr(runs, "READERS_SECONDS", 20)
    with held_by_another_process(run.path / "lock", shared=True) as looker:
        threading.Timer(0.05, looker.kill).start()
        RunStore(run.settings).delete(run)
    assert not run.path.exists()


def test_stopping_what_has_ended_is_refused(run: Run) -> None:
    say(run, ATTEMPT, events.Finished(step=1))
    with pytest.raises(RunError, match="is finished, so there is nothing to stop"):
        run.request_stop()
    assert not (run.path / "stop").exists()


def test_stop_signals_no_process_that_merely_has_the_number(run: Run) -> None:
    with held_by_another_process(run.path / "lock") as holder:
        say(run, ATTEMPT)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bystander:
            (run.path / "lock").write_text(f"{bystander.pid}\n")
            assert "after the current step" in run.request_stop()
            assert (run.path / "stop").exists()
            assert bystander.communicate("alive")[0] == "alive"
        assert holder.poll() is None


def test_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "lock") as holder:
        with lock(tmp_path / "lock") as held:
            assert held is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with lock(tmp_path / "lock") as held:
            assert held is not None


def test_abandoned_creations_are_removed_after_an_hour(tmp_path: Path) -> None:
    old, new = (settings_in(tmp_path).runs / name for name in (".creating-1-old", ".creating-2-new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    run_in(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_run_survives_the_process_that_made_it(run: Run) -> None:
    queue.add(run)
    code = (
        "import sys; from pathlib import Path; from qlora_core.runs import RunStore; from qlora_core.settings import Settings; "
        "print(RunStore(Settings(home=Path(sys.argv[1]))).list()[0].status().state)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(run.settings.home)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "queued\n"


def test_config_of_a_run_can_be_used_again(run: Run) -> None:
    assert replace(run.config(), rank=4).rank == 4


def test_time_left_counts_the_evaluations_between_steps_and_the_scoring_at_the_end(tmp_path: Path) -> None:
    run, now = run_in(tmp_path, score="exact"), time.time()
    say(
        run,
        ATTEMPT,
        started(total_steps=40),
        events.Score(step=0, name="exact", correct=0, total=4, seconds=30),
        *(step(number, step_seconds=1.0, time=now - 3 * (10 - number)) for number in range(1, 11)),
    )
    with held_by_another_process(run.path / "lock"):
        # Ten steps of 1 s took 28 s with what stood between them; 30 more, then the answers.
        assert run.status().eta_seconds == pytest.approx(2.8 * 30 + 30, abs=5)


def test_run_that_ends_between_the_looks_at_events_and_lock_is_not_called_crashed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(run, ATTEMPT, started(), step(1))

    def ends_meanwhile(self: Run) -> bool:
        if not isinstance(run.history()[-1], events.Finished):
            say(run, events.Finished(step=1))
        return False

    monkeypatch.setattr(Run, "is_locked", ends_meanwhile)
    assert run.status().state == FINISHED


def test_unreadable_run_holds_up_nobody_and_can_be_deleted(tmp_path: Path, run: Run) -> None:
    queue.add(run)
    (run.path / "config.json").write_text("")
    other = run_in(tmp_path, name="other")
    queue.add(other)
    with pytest.raises(RunError, match="config.json cannot be read .*; delete the run"):
        run.status()
    with pytest.raises(RunError, match=f"there is no run 'other'; it could be {other.run_id}"):
        RunStore(run.settings).get("other")
    runs.remove_from_queue(run)
    RunStore(run.settings).delete(run)
    assert not run.path.exists() and not run.is_locked() and not run.path.exists()


def test_deleting_a_run_deletes_what_was_made_for_download(run: Run) -> None:
    run.settings.downloads.mkdir()
    (run.settings.downloads / f"{run.run_id}-adapter.zip").write_bytes(b"x")
    (run.settings.downloads / "another-run.zip").write_bytes(b"x")
    RunStore(run.settings).delete(run)
    assert [path.name for path in run.settings.downloads.iterdir()] == ["another-run.zip"]
