"""The command line: exit codes that scripts can trust, one JSON object where asked, and no traceback for a mistake."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    PYTHON,
    ROOT,
    StandIn,
    alpaca,
    config_in,
    fake_gpus,
    model_folder,
    run_in,
    say,
    settings_in,
    step,
    wait_for,
    write_rows,
)

from qlora_core import cli, cli_follow, events, queue
from qlora_core.config import TrainConfig
from qlora_core.run_status import FINISHED, STOPPED
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    found = settings_in(tmp_path)
    monkeypatch.setenv("QLORA_LAB_HOME", str(found.home))
    monkeypatch.setenv("QLORA_LAB_LOCKS", str(found.locks))
    monkeypatch.setattr(cli_follow, "POLL_SECONDS", 0.005)
    fake_gpus(monkeypatch)
    return found


@pytest.fixture
def worker(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "stand-in", settings)
    monkeypatch.setattr("sys.executable", str(stand_in.executable))
    yield stand_in
    stand_in.end_all()


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command with --json; standard output must be one JSON object and nothing else."""

    def ask(*arguments: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == status
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return ask


def training(folder: Path, *more: str) -> list[str]:
    data = write_rows(folder / "rows.jsonl", [alpaca(number) for number in range(10)])
    return ["train", "--data", str(data), "--base-model", str(model_folder(folder / "tiny")), "--method", "lora", *more]


def let_end(monkeypatch: pytest.MonkeyPatch, worker: StandIn, how: str) -> None:
    """The stand-in ends each run that the command follows, as soon as it has started it."""
    start_next = queue.start_next

    def start_and_end(settings: Settings) -> list[Run]:
        started = start_next(settings)
        for run in started:
            worker.end(run, how)
        return started

    monkeypatch.setattr(queue, "start_next", start_and_end)


# --- a person's mistake ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "missing.jsonl"], "missing.jsonl: there is no such file"),
        (["inspect", "."], "is a folder"),
        (["train", "--base-model", "tiny"], "no data is named"),
        (["train", "--data", "missing.jsonl", "--base-model", "tiny"], "no such file"),
        (["train", "--data", "~nobody-here/x.jsonl", "--base-model", "tiny"], "no such file"),
        (["train", "--data", "rows.jsonl", "--base-model", "../missing"], "is no folder here"),
        (["train", "--rank", "0", "--learning-rate", "fast"], "rank is 0"),
        (["train", "--rank", "0", "--learning-rate", "fast"], "learning_rate is 'fast'"),
        (["train", "--config", "missing.yaml"], "missing.yaml: there is no such file"),
        (["merge", "nothing"], "there is no run 'nothing'"),
        *((["runs", action, "nothing"], "there is no run") for action in ("show", "stop", "resume", "delete")),
        (["runs", "move", "nothing", "1"], "there is no run"),
        (["train", "--data", "rows.jsonl", "--base-model", "tiny", "--home", "rows.jsonl"], "rows.jsonl"),
    ],
)
def test_mistake_exits_with_2_and_one_clear_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    config_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["runs"], ["train", "--rnk", "4"], ["runs", "move", "x", "first"], ["merge", "x", "--onto", "y"]],
)
def test_command_that_does_not_exist_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m qlora_core" in capsys.readouterr().err


def test_wrong_environment_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QLORA_LAB_MAX_ROWS", "many")
    assert cli.main(["runs", "list"]) == 2
    assert "QLORA_LAB_MAX_ROWS is 'many'" in capsys.readouterr().err


def test_wrong_state_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path)
    queue.add(run)
    for arguments in (["delete", run.run_id], ["resume", run.run_id], ["move", run.run_id, "0"]):
        assert cli.main(["runs", *arguments]) == 2
    say(run, events.Launched(attempt=1), events.Finished(step=1))
    assert cli.main(["merge", run.run_id]) == 2
    assert cli.main(["merge", run.run_id, "--onto", "dequantized"]) == 2
    printed = capsys.readouterr().err
    for words in (
        "is queued; stop it",
        "only a run that has ended",
        "1 is the next",
        "no adapter yet",
        "no dequantised one",
    ):
        assert words in printed
    assert "Traceback" not in printed


# --- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_lists_every_bad_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: Callable[..., dict[str, Any]]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1), *([{}] * 30), alpaca(1)])
    assert cli.main(["inspect", str(data)]) == 0
    printed = capsys.readouterr().out
    assert all(f"  line {line}: has the keys none" in printed for line in range(2, 32))
    assert "line 32: the same as line 1" in printed
    report = asked("inspect", str(data))
    assert (report["rows"], len(report["problems"])) == (2, 30)


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1)])
    command = [PYTHON, "-m", "qlora_core", "inspect", str(data), "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["rows"] == 1
    assert found.stderr == ""


# --- train -------------------------------------------------------------------------------------------------------------


def test_every_setting_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field takes another value than its default, by its own name in kebab case."""
    others: dict[str, Any] = {}
    for spec in fields(TrainConfig):
        if spec.name == "init_lora_weights":
            others[spec.name] = "orthogonal"  # the one that goes with every method and quantisation
        elif spec.name == "template":
            others[spec.name] = "chatml"
        elif "choices" in spec.metadata:
            others[spec.name] = next(choice for choice in reversed(spec.metadata["choices"]) if choice != spec.default)
        elif spec.type is bool:
            others[spec.name] = not spec.default
        elif spec.name in ("data", "eval_data"):
            others[spec.name] = str(tmp_path / f"{spec.name}.jsonl")
        elif "tuple" in str(spec.type):
            others[spec.name] = ("one", "two")
        elif "str" in str(spec.type):
            others[spec.name] = "other"
        else:
            others[spec.name] = spec.metadata["most"]
    arguments = ["train", "--detach"]
    for name, value in others.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", ",".join(value) if isinstance(value, tuple) else str(value)]
    created: list[TrainConfig] = []

    class Enough(Exception):
        pass

    def create(self: RunStore, config: TrainConfig, *, token: str | None = None) -> Run:
        created.append(config)
        raise Enough

    monkeypatch.setattr(RunStore, "create", create)
    with pytest.raises(Enough):
        cli.main(arguments)
    assert created == [TrainConfig(**others)]
    assert all(getattr(created[0], spec.name) != spec.default for spec in fields(TrainConfig))


def test_options_win_over_the_file(tmp_path: Path, asked: Callable[..., dict[str, Any]], worker: StandIn) -> None:
    config_in(tmp_path)
    (tmp_path / "run.yaml").write_text("data: rows.jsonl\nbase_model: tiny\nrank: 4\nseed: 7\n")
    found = asked(
        "train",
        "--detach",
        "--config",
        str(tmp_path / "run.yaml"),
        "--rank",
        "2",
        "--base-model",
        str(tmp_path / "tiny"),
    )
    config = asked("runs", "show", found["run_id"])["config"]
    assert (config["rank"], config["seed"], config["data"]) == (2, 7, str(tmp_path / "rows.jsonl"))


def test_detached_run_is_started_and_left(
    tmp_path: Path, asked: Callable[..., dict[str, Any]], worker: StandIn, settings: Settings
) -> None:
    first = asked(*training(tmp_path, "--detach"))
    second = asked(*training(tmp_path, "--detach", "--rank", "4"))
    assert (first["state"], second["state"], second["queue_place"]) == ("running", "queued", 1)
    run = RunStore(settings).get(first["run_id"])
    wait_for(lambda: len(run.events()[0]) > 1)
    worker.end(run)
    assert asked("runs", "start-next") == {"started": [second["run_id"]]}


def test_followed_run_ends_with_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    let_end(monkeypatch, worker, "Finished")
    assert cli.main(training(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "finished after" in printed.out
    assert "rows are packed" in printed.err, "what was decided, and why"


def test_followed_run_prints_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: StandIn, asked: Callable[..., dict[str, Any]]
) -> None:
    let_end(monkeypatch, worker, "Finished")
    found = asked(*training(tmp_path))
    assert (found["status"]["state"], found["result"]) == (FINISHED, None)


@pytest.mark.parametrize(("how", "status", "says"), [("Failed", 2, "lower learning_rate"), ("", 1, "log.txt")])
def test_failed_run_exits_with_2_and_a_crashed_one_with_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: StandIn,
    capsys: pytest.CaptureFixture[str],
    how: str,
    status: int,
    says: str,
) -> None:
    let_end(monkeypatch, worker, how)
    assert cli.main(training(tmp_path)) == status
    assert says in capsys.readouterr().err


def test_interrupt_saves_and_stops_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: StandIn,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_next = queue.start_next

    def interrupted(settings: Settings) -> list[Run]:
        started = start_next(settings)
        (run,) = RunStore(settings).list()
        if any(isinstance(event, events.Started) for event in run.events()[0]):
            raise KeyboardInterrupt
        return started

    monkeypatch.setattr(queue, "start_next", interrupted)
    assert cli.main(training(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "saving and stopping after the current step; Ctrl-C again leaves it to itself" in printed.err
    assert RunStore(settings).list()[0].status().state == STOPPED


# --- runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_shown_moved_stopped_and_deleted(
    tmp_path: Path, asked: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run_in(tmp_path, name="a"), run_in(tmp_path, name="b")
    queue.add(first)
    queue.add(second)
    assert {status["run_id"] for status in asked("runs", "list")["runs"]} == {first.run_id, second.run_id}
    moved = asked("runs", "move", second.run_id, "1")
    assert [status["run_id"] for status in moved["queue"]] == [second.run_id, first.run_id]
    assert asked("runs", "queue") == moved
    assert asked("runs", "stop", first.run_id) == {"run_id": first.run_id, "detail": "taken out of the queue"}
    assert asked("runs", "show", first.run_id)["status"]["state"] == STOPPED
    assert asked("runs", "delete", first.run_id) == {"deleted": first.run_id}
    assert [status["run_id"] for status in asked("runs", "list")["runs"]] == [second.run_id]
    capsys.readouterr()
    for arguments, says in (
        (["list"], f"{second.run_id}"),
        (["queue"], f"1. {second.run_id}"),
        (["show", second.run_id], "queued: waits for the device, place 1"),
        (["stop", second.run_id], "taken out of the queue"),
        (["queue"], "nothing waits"),
        (["delete", second.run_id], "deleted"),
        (["list"], "no runs in"),
    ):
        assert cli.main(["runs", *arguments]) == 0
        assert says in capsys.readouterr().out


def test_crashed_run_shows_the_end_of_its_log_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in(tmp_path)
    say(run, events.Launched(attempt=1), step(1))
    (run.path / "log.txt").write_text("CUDA error: unspecified launch failure\n")
    assert cli.main(["runs", "show", run.run_id]) == 0
    assert "unspecified launch failure" in capsys.readouterr().out
    let_end(monkeypatch, worker, "Finished")
    assert cli.main(["runs", "resume", run.run_id]) == 0
    assert run.status().state == FINISHED


def test_home_may_be_named_by_option(tmp_path: Path, asked: Callable[..., dict[str, Any]]) -> None:
    run_in(tmp_path)
    assert len(asked("runs", "list")["runs"]) == 1
    assert asked("runs", "list", "--home", str(tmp_path / "elsewhere")) == {"runs": []}
