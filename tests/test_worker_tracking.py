"""Trackers: what they are told is what the run says, also after a resume; none of them ever ends a run."""

import errno
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from helpers import config_in, run_in, settings_in, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_models import StopAfter, adapter_bytes, losses, make_run, said, train_here

from qlora_core import events, queue, trackers
from qlora_core.errors import ConfigError
from qlora_core.run_status import CRASHED, FINISHED, RUNNING
from qlora_core.runs import Run, RunStore
from qlora_core.worker import tracking
from qlora_core.worker.tracking import values_of

SHORT: dict[str, Any] = {
    "max_steps": 8,
    "eval_steps": 4,
    "save_steps": 3,
    "score": "exact",
    "score_max_new_tokens": 2,
    "lora_dropout": 0.1,
}
# Figures of a machine's moment: a step that is made again has others.
OF_THE_MOMENT = {"step_seconds", "tokens_per_second", "peak_host_bytes"}
Logged = dict[str, dict[int, float]]


class BreaksAfter(StopAfter):
    """The process breaks after some steps of this attempt; nothing is saved."""

    def __bool__(self) -> bool:
        if super().__bool__():
            raise RuntimeError("power cut")
        return False


def told(run: Run) -> Logged:
    """Name -> step -> value, from events.jsonl."""
    found: Logged = defaultdict(dict)
    for event in run.history():
        for name, value in values_of(event).items():
            found[name][event.step] = value
    return found


def in_tensorboard(run: Run) -> Logged:
    """As TensorBoard shows it; a step that stands there twice fails."""
    accumulator = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: Logged = {}
    for name in accumulator.Tags()["scalars"]:
        points = accumulator.Scalars(name)
        found[name] = {point.step: point.value for point in points}
        assert len(points) == len(found[name]), f"{name}: a step stands there twice"
    return found


def as_float32(values: Logged) -> Logged:
    """TensorBoard keeps 32 bits of a number."""
    return {
        name: {step: struct.unpack("f", struct.pack("f", value))[0] for step, value in series.items()}
        for name, series in values.items()
    }


def notes(run: Run) -> list[str]:
    return [event.text for event in said(run, events.Note) if event.text.startswith("tracker ")]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("untracked"), **SHORT))


def assert_trained_as(run: Run, untracked: Run) -> None:
    assert run.status().state == FINISHED
    assert losses(run) == losses(untracked)
    assert adapter_bytes(run) == adapter_bytes(untracked)


# -- refused before the run


@pytest.mark.parametrize("tracker", trackers.PACKAGES)
def test_a_missing_package_is_refused_before_anything_is_made(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "is_installed", lambda package: False)
    with pytest.raises(ConfigError) as refused:
        run_in(tmp_path, tracker=tracker)
    assert str(refused.value) == (
        f"tracker is {tracker!r}, but its package is not installed here; `pip install {tracker}`, or set tracker to none"
    )
    assert RunStore(settings_in(tmp_path)).list() == []
    assert run_in(tmp_path, tracker="none").status().step == 0


def test_a_package_is_one_that_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leftovers_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers.is_installed("leftovers_of_wandb")
    assert not trackers.is_installed("no_such_package")
    assert trackers.is_installed("tensorboard") and trackers.is_installed("trackio")


def test_wandb_needs_a_key_unless_it_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "is_installed", lambda package: True)
    config = config_in(tmp_path, tracker="wandb")
    refused = trackers.problem(config, {})
    assert refused and "set WANDB_API_KEY in the environment" in refused and "WANDB_MODE=offline" in refused
    assert trackers.problem(config, {"WANDB_MODE": "online"}) == refused
    assert trackers.problem(config, {"WANDB_API_KEY": "key"}) is None
    assert trackers.problem(config, {"WANDB_MODE": "offline"}) is None


def test_trackio_with_a_place_that_needs_a_token_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path, tracker="trackio")
    assert trackers.problem(config, {"TRACKIO_DIR": "/data/trackio"}) is None
    refused = trackers.problem(config, {"TRACKIO_SPACE_ID": "me/space"})
    assert refused and "TRACKIO_SPACE_ID is set" in refused and "unset it" in refused


# -- tensorboard


def test_tensorboard_shows_what_the_run_says_also_after_a_crash(untracked: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, tracker="tensorboard", **SHORT)
    with pytest.raises(RuntimeError, match="power cut"):
        train_here(run, BreaksAfter(5))
    assert in_tensorboard(run) == as_float32(told(run))
    assert max(in_tensorboard(run)["loss"]) == 5
    train_here(run)
    assert said(run, events.Resumed)[0].from_step < 5, "steps were made twice"
    found = in_tensorboard(run)
    assert found == as_float32(told(run))
    assert list(found["loss"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(found["eval_loss"]) == [0, 4, 8] and list(found["score_exact"]) == [0, 8]
    assert notes(run) == []
    assert_trained_as(run, untracked)


def test_tensorboard_has_the_settings_of_the_run(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, tracker="tensorboard", **SHORT))
    accumulator = EventAccumulator(str(run.path / "tensorboard")).Reload()
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["rank"].number_value == 4 and found["lora_dropout"].number_value == 0.1
    assert found["base_model"].string_value == run.config().base_model
    assert "token_budget" not in found, "nothing was chosen"


# -- a tracker that fails


def test_a_tracker_that_cannot_begin_is_a_note(untracked: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, tracker="tensorboard", **SHORT)
    (run.path / "tensorboard").write_text("a file in the place of the folder")
    train_here(run)
    (note,) = notes(run)
    assert note.startswith("tracker tensorboard: logging failed: FileExistsError: ")
    assert note.endswith("tracking is off from here. The run's own record is complete")
    assert_trained_as(run, untracked)


def test_a_tracker_that_fails_on_the_way_is_a_note_and_is_complete_after_a_resume(
    untracked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    add, tries = SummaryWriter.add_scalar, []

    def add_until_full(writer: SummaryWriter, name: str, value: float, global_step: int, **rest: Any) -> None:
        if global_step >= 3:
            tries.append(global_step)
            raise OSError(errno.ENOSPC, "No space left on device")
        add(writer, name, value, global_step, **rest)

    run = make_run(tmp_path, tracker="tensorboard", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", add_until_full)
        train_here(run, StopAfter(6))
    assert len(notes(run)) == 1 and "No space left on device" in notes(run)[0]
    assert tries == [3], "after the first failure it is left alone"
    assert max(in_tensorboard(run)["loss"]) == 2
    train_here(run)
    assert in_tensorboard(run) == as_float32(told(run))
    assert_trained_as(run, untracked)


def test_no_secret_of_a_tracker_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Run) -> None:
        raise ConnectionError("key s3cret refused by https://me:passw0rd@host/api/runs")

    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    monkeypatch.setitem(tracking.OPEN, "tensorboard", refuse)
    run = train_here(make_run(tmp_path, tracker="tensorboard", **SHORT))
    assert "ConnectionError: key *** refused by https://***@host/api/runs; tracking is off" in notes(run)[0]


@pytest.mark.filterwarnings("ignore:trackio failed to flush:UserWarning")
def test_values_that_trackio_loses_are_told(untracked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It only warns in the worker's log when its disk is full."""

    def full(**_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = make_run(tmp_path, tracker="trackio", **SHORT)
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(SQLiteStorage, "bulk_log", full)
    train_here(run)
    (note,) = notes(run)
    count = sum(len(series) for series in told(run).values())
    assert note.startswith(f"tracker trackio: {count} of {count} values did not arrive")
    assert_trained_as(run, untracked)


# -- trackio, in a real worker

READ_TRACKIO = """
import json, sys
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage

(run,) = Api().runs(sys.argv[1])
logs = SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
print(json.dumps({"name": run.name, "config": run.config, "logs": logs}, default=str))
"""


def in_trackio(run: Run) -> tuple[dict[str, Any], Logged]:
    """The only run of its project, as trackio itself reads it; a step that stands there twice fails."""
    folder = run.settings.home / "trackio"
    read = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO, run.config().tracker_project],
        env=os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    assert found["name"] == run.run_id
    values: Logged = defaultdict(dict)
    for entry in found["logs"]:
        for name in entry.keys() - {"step", "timestamp"}:
            assert entry["step"] not in values[name], f"{name} at step {entry['step']} stands there twice"
            values[name][entry["step"]] = entry[name]
    return found["config"], values


def test_trackio_holds_a_killed_and_resumed_run_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = make_run(tmp_path, tracker="trackio", max_steps=60, eval_steps=20, save_steps=20, lora_dropout=0.1)
    queue.add(run)
    queue.start_next(run.settings)
    wait_for(lambda: run.status().state != RUNNING or run.status().step >= 25, seconds=120)
    os.kill(int((run.path / "lock").read_text()), signal.SIGKILL)
    wait_for(lambda: run.status().state == CRASHED)
    made = {event.step for event in said(run, events.Step)}
    assert 25 <= max(made) < 60
    queue.resume(run)
    wait_for(lambda: queue.start_next(run.settings) or run.queue_place() is None)
    wait_for(lambda: run.status().state != RUNNING, seconds=120)
    assert run.status().state == FINISHED, run.log_tail()

    config, found = in_trackio(run)
    wanted = told(run)
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - OF_THE_MOMENT:
        assert found[name] == wanted[name], name
    for name in OF_THE_MOMENT:
        assert found[name].keys() == wanted[name].keys()
        once = found[name].keys() - {step for step in made if step > 20}
        assert {step: found[name][step] for step in once} == {step: wanted[name][step] for step in once}
    assert notes(run) == []
    assert config["rank"] == 4 and config["lora_dropout"] == 0.1
    stored = b"".join(path.read_bytes() for path in (run.settings.home / "trackio").rglob("*") if path.is_file())
    assert run.run_id.encode() in stored and b"hf_secret" not in stored
