"""`compare` and `studies`: a study of the diagnosis from the first command to its report, and what is refused before it starts."""

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, settings_in, write_rows
from tiny_models import dataset, model_folder

from qlora_core import cli, cli_compare, queue
from qlora_core.settings import Settings

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is known of models, once for all tests: a worker takes seconds to say it."""
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, described: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    found = settings_in(tmp_path)
    found.home.mkdir(parents=True, exist_ok=True)
    (found.home / "architectures").symlink_to(described)
    monkeypatch.setenv("QLORA_LAB_HOME", str(found.home))
    monkeypatch.setenv("QLORA_LAB_LOCKS", str(found.locks))
    monkeypatch.setattr(cli_compare, "POLL_SECONDS", 0.02)
    return found


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command with --json; standard output must be one JSON object and nothing else."""

    def ask(*arguments: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return ask


def compare(*more: str, data: Path | None = None) -> list[str]:
    settings = EXAMPLES / "diagnosis" / "settings.yaml"
    base = ["--base-model", str(model_folder()), "--data", str(data or EXAMPLES / "support_tickets.jsonl")]
    return ["compare", "--config", str(settings), *base, *more]


@pytest.mark.timeout(300)
def test_the_diagnosis_runs_from_one_command_to_verdicts_and_a_report(
    tmp_path: Path, asked: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Reduced: a tiny random model, two steps, the example tickets, one rank."""
    report = tmp_path / "report"
    rows = write_rows(tmp_path / "rows.jsonl", dataset(16))
    found = asked(
        *compare("--vary", "method=lora,qlora", "--vary", "rank=2", data=rows),
        "--max-steps", "2", "--device", "cpu", "--report", str(report),
    )  # fmt: skip
    assert found["study"]["state"] == "finished" and found["study"]["done"] == 2
    lora, qlora = found["arms"]
    assert (lora["label"], qlora["label"]) == ("LoRA, rank 2", "QLoRA, rank 2")
    assert lora["memory_kind"] == "host" and lora["eval_loss"] != qlora["eval_loss"]
    assert found["verdicts"][0]["numbers"] and "host memory" in found["verdicts"][0]["sentence"]
    told = (report / "report.html").read_text()
    assert f"{lora['eval_loss']:.4f}" in told
    (runs,) = report.glob("runs.csv")
    assert len(list(csv.DictReader(runs.read_text().splitlines()))) == 2
    study_id = found["study"]["study_id"]
    bare = tmp_path / "bare"
    asked("studies", "report", study_id, "--out", str(bare), "--without-rows")
    answered = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    assert any(prompt in told for prompt in answered)
    assert not any(prompt in path.read_text() for path in bare.rglob("*.*") for prompt in answered)
    assert [study["study_id"] for study in asked("studies", "list")["studies"]] == [study_id]
    assert asked("studies", "show", study_id)["arms"] == found["arms"]
    assert cli.main(["studies", "show", study_id]) == 0
    printed = capsys.readouterr().out
    assert "LoRA, rank 2" in printed and found["verdicts"][0]["sentence"] in printed
    assert asked("studies", "delete", study_id) == {"deleted": study_id}


def test_an_estimate_starts_nothing(asked: Callable[..., dict[str, Any]], settings: Settings) -> None:
    found = asked(*compare("--kind", "rank-ladder", "--noise-floor", "--estimate"))
    assert len(found["runs"]) == 12 + 6 + 6 and all(run["fits"] and run["needed_bytes"] > 0 for run in found["runs"])
    assert found["seconds"] is None and not settings.runs.exists()


def test_what_does_not_fit_is_refused_by_name_or_left_out(
    asked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(queue, "start_next", lambda settings: [])
    least = asked(*compare("--vary", "rank=2,64", "--estimate", "--memory-budget-gib", "0.01"))
    assert not any(run["fits"] for run in least["runs"])
    budget = ["--memory-budget-gib", f"{sum(run['needed_bytes'] for run in least['runs']) / 2 / 2**30:.6f}"]
    assert cli.main(compare("--vary", "rank=2,64", *budget, "--detach")) == 2
    printed = capsys.readouterr().err
    assert "rank 64: needs" in printed and "rank 2: needs" not in printed and "--skip-unfitting" in printed
    found = asked(*compare("--vary", "rank=2,64", *budget, "--skip-unfitting", "--detach"))
    assert [label for label, _ in found["runs"]] == ["rank 2, seed 42"] and found["left_out"] == ["rank 64, seed 42"]
    assert asked("studies", "show", found["study_id"])["arms"][1]["gap"] == "left out"


def test_mistakes_are_told_at_once_and_nothing_is_made(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, problem in (
        (["--vary", "rnk=2,4"], "rnk is not a setting; did you mean rank?"),
        (["--vary", "rank"], "--vary is 'rank'; write a setting and its values: rank=4,8,16"),
        (["--vary", "rank=2,x"], "rank is 'x'; it must be a whole number"),
        (["--vary", "rank=2,4", "--seeds", "a"], "--seeds is 'a'; write whole numbers"),
        (["--vary", "base_model=a,b"], "base_model cannot be varied"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
    ):
        assert cli.main([*compare(), *arguments]) == 2
        printed = capsys.readouterr()
        assert problem in printed.err and "Traceback" not in printed.err and not printed.out
    # Layers are looked for in the model before anything starts: of all runs at once.
    assert cli.main([*compare("--vary", "target_modules=q_proj,typo,attention@7"), "--detach"]) == 2
    printed = capsys.readouterr().err
    assert "adapters on typo: " in printed and "no linear layer typo" in printed
    assert "adapters on attention@7: " in printed and "goes beyond the model's decoder layers" in printed
    assert not settings.runs.exists() or not list(settings.runs.iterdir())
    assert cli.main(["studies", "show", "nothing"]) == 2


def test_a_study_that_cannot_be_read_holds_no_other_up_and_can_be_deleted(
    settings: Settings, asked: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = settings.home / "studies" / "20261125-000000-aaaa-broken"
    broken.mkdir(parents=True)
    (broken / "study.json").write_text("{")
    assert cli.main(["studies", "list"]) == 0
    printed = capsys.readouterr()
    assert "its study.json cannot be read" in printed.err and "no studies yet" in printed.out
    assert asked("studies", "delete", broken.name) == {"deleted": broken.name} and not broken.exists()


def test_the_commands_of_the_diagnosis_parse() -> None:
    text = (EXAMPLES / "diagnosis" / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python -m qlora_core")]
    assert len(commands) == 2
    for command in commands:
        cli.parser().parse_args(shlex.split(command)[3:])
