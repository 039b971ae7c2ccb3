"""Jobs: long work of the page goes on without it, can be cancelled, keeps no secret, and says how it ended, however it ended."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import alpaca, settings_in, wait_for, write_rows

from qlora_core import jobs
from qlora_core.data.inspected import folder_of, inspect_into
from qlora_core.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
SECRET = "hf_SECRETMARKER123"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes seconds to inspect, so that there is something to cancel."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    row = json.dumps(alpaca(1, output="é" * 500)) + "\n"
    path.write_text(row * 400_000)
    return path


def ended(job: jobs.Job) -> jobs.Progress:
    def has_ended() -> jobs.Progress | None:
        progress = job.progress()
        return progress if progress and progress.state != jobs.RUNNING else None

    return wait_for(has_ended, seconds=60)


def inspecting(path: Path, settings: Settings, **options: object) -> jobs.Job:
    return jobs.start(["inspect", str(path), "--keep", "--json"], settings, **options)


def test_a_job_ends_with_what_it_made_and_the_same_one_is_not_done_twice(tmp_path: Path, settings: Settings) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(1), {}])
    job = inspecting(path, settings)
    done = ended(job)
    assert (done.state, done.result) == (jobs.DONE, {"paths": [str(path)]})
    assert (folder_of(path, settings) / "report.json").exists()
    stamp = (job.folder / "progress.json").stat().st_mtime_ns
    assert inspecting(path, settings) == job and (job.folder / "progress.json").stat().st_mtime_ns == stamp
    assert jobs.find(job.job_id, settings) == job
    for other in ("", "../jobs", "0" * 24):
        assert jobs.find(other, settings) is None


def test_a_mistake_is_told_as_it_would_be_on_the_command_line(tmp_path: Path, settings: Settings) -> None:
    failed = ended(inspecting(tmp_path / "gone.jsonl", settings))
    assert failed.state == jobs.FAILED and "there is no such file" in failed.problems[0]


def test_a_running_job_is_joined_tells_its_progress_and_can_be_cancelled(large: Path, settings: Settings) -> None:
    job = inspecting(large, settings)
    progress = wait_for(lambda: (p := job.progress()) and p.done > 0 and p, seconds=30)
    assert progress.state == jobs.RUNNING and progress.unit == "bytes" and progress.total == large.stat().st_size
    assert inspecting(large, settings) == job, "a second click joins the first"
    job.cancel()
    assert ended(job).state == jobs.CANCELLED
    left = [path.name for path in (settings.home / "inspected").iterdir()]
    assert left == [], "what was half made is gone"
    again = inspecting(large, settings)
    assert wait_for(lambda: again.progress().state) == jobs.RUNNING, "it can be started again"
    again.cancel()
    assert ended(again).state == jobs.CANCELLED


def test_a_job_that_is_killed_has_failed(large: Path, settings: Settings) -> None:
    job = inspecting(large, settings)
    wait_for(lambda: (p := job.progress()) and p.done > 0, seconds=30)
    os.kill(int((job.folder / "lock").read_text()), signal.SIGKILL)
    failed = ended(job)
    assert failed.state == jobs.FAILED and "ended without a word" in failed.problems[0]


def test_a_secret_is_in_no_file_no_argument_and_no_environment(large: Path, settings: Settings) -> None:
    job = inspecting(large, settings, secret=SECRET)
    wait_for(lambda: (p := job.progress()) and p.done > 0, seconds=30)
    process = Path("/proc") / (job.folder / "lock").read_text()
    assert SECRET.encode() not in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
    job.cancel()
    ended(job)
    written = [path for path in settings.home.rglob("*") if path.is_file()]
    assert written and not any(SECRET.encode() in path.read_bytes() for path in written)


def test_what_a_job_has_inspected_is_found_at_once(tmp_path: Path, settings: Settings) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(30)])
    ended(inspecting(path, settings))
    begun = time.monotonic()
    kept = inspect_into(path, settings)
    assert len(kept) == 30 and time.monotonic() - begun < 1
    write_rows(path, [alpaca(n) for n in range(31)])
    assert len(inspect_into(path, settings)) == 31, "a file that has changed is another"
