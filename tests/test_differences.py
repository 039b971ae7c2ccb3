"""What differs between two runs is all that is told, as it takes effect."""

import json
from typing import Any

import pytest
from helpers import alpaca, config_in, run_in, settings_in, write_rows

from qlora_core.cli import main
from qlora_core.config import TrainConfig
from qlora_core.differences import NOT_USED, differences, run_differences
from qlora_core.runs import Run, RunStore


def told(first: TrainConfig, second: TrainConfig) -> dict[str, tuple[object, object]]:
    return {field: (one, other) for _, field, one, other in differences(first, second)}


@pytest.fixture
def pair(tmp_path) -> tuple[Run, Run]:
    return run_in(tmp_path, rank=4, weight_decay=0.1), run_in(tmp_path, rank=8)


def write_result(run: Run, **info: object) -> None:
    base = {"base_model": {"weights_sha256": "a" * 64}, "device": "CPU", "packages": {"peft": "0.21.2"}}
    (run.path / "result.json").write_text(json.dumps({"run_info": base | info, "train_info": {}}))


def another(name: str, value: Any) -> Any:
    """A valid value of the field that is not `value`."""
    spec = TrainConfig.__dataclass_fields__[name]
    limits = spec.metadata
    if "choices" in limits:
        return next(choice for choice in reversed(limits["choices"]) if choice not in (value, "pissa", "olora"))
    if isinstance(value, bool):
        return not value
    if "tuple" in str(spec.type):
        return ("q_proj",)
    if "str" in str(spec.type):
        return "chatml" if name == "template" else "other"
    return limits["most"] if value != limits["most"] else limits["most"] / 2


@pytest.mark.parametrize("name", list(TrainConfig.__dataclass_fields__))
def test_every_setting_that_changes_the_run_is_told(name):
    """Each field once, with another valid value; `name` alone changes nothing."""
    needs = {
        "score_fields": {"score": "json"},
        "score_rows": {"score": "exact"},
        "score_max_new_tokens": {"score": "exact"},
        "tracker_project": {"tracker": "wandb"},
    }
    before = TrainConfig(data="a.jsonl", **needs.get(name, {}))
    after = TrainConfig(**{**before.to_json(), name: another(name, getattr(before, name))})
    assert (name in told(before, after)) == (name != "name")
    assert told(after, after) == {}


def test_an_automatic_value_counts_as_what_it_becomes():
    assert told(TrainConfig(rank=8), TrainConfig(rank=8, lora_alpha=16)) == {}
    assert told(TrainConfig(rank=8), TrainConfig(rank=16))["lora_alpha"] == (16, 32)
    assert "save_steps" not in told(TrainConfig(eval_steps=5), TrainConfig(eval_steps=5, save_steps=5))


def test_a_value_that_plays_no_part_is_no_difference():
    assert told(TrainConfig(max_steps=5, num_epochs=1), TrainConfig(max_steps=5, num_epochs=9)) == {}
    assert told(TrainConfig(max_steps=5), TrainConfig(num_epochs=2)) == {
        "max_steps": (5, None),
        "num_epochs": (NOT_USED, 2.0),
    }
    plain = TrainConfig(method="lora")
    assert told(plain, TrainConfig(method="lora", quant_type="fp4", double_quant=False)) == {}
    assert told(plain, TrainConfig())["quant_type"] == (NOT_USED, "nf4")


def test_rows_device_and_versions_are_compared_too(tmp_path, pair):
    first, second = pair
    assert [entry.group for entry in run_differences(first, second)] == ["adapter", "adapter", "optimizer"]
    rows = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(12)])  # the same name, other rows
    second = RunStore(settings_in(tmp_path)).create(config_in(tmp_path, rank=4, weight_decay=0.1, data=str(rows)))
    write_result(first)
    assert {entry.field for entry in run_differences(first, second)} == {
        "training rows, SHA-256",
        "evaluation rows, SHA-256",
    }, "of a run without a result nothing is claimed"
    write_result(second, device="NVIDIA H100", packages={"peft": "0.22"})
    ran = {entry.field: entry.words() for entry in run_differences(first, second)}
    assert ran["device"] == ("CPU", "NVIDIA H100") and ran["peft"] == ("0.21.2", "0.22")
    assert "base weights, SHA-256" not in ran


def test_a_combination_names_its_parts(pair):
    first, second = pair
    parts = [{"weight": 0.5, "name": "a"}, {"weight": 2.0, "name": "b"}]
    (second.path / "combination.json").write_text(json.dumps({"method": "svd", "parts": parts}))
    entry = next(entry for entry in run_differences(first, second) if entry.field == "combined from")
    assert entry.words() == ("none", "0.5 x a + 2 x b, by svd")


def test_the_command_prints_both_values_or_that_there_are_none(tmp_path, pair, monkeypatch, capsys):
    first, second = pair
    monkeypatch.setenv("QLORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QLORA_LAB_LOCKS", str(tmp_path / "locks"))
    assert main(["runs", "diff", first.run_id, second.run_id]) == 0
    assert "rank\n  4\n  8\n" in capsys.readouterr().out
    assert main(["runs", "diff", first.run_id, second.run_id, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"] == [first.run_id, second.run_id]
    assert {"group": "optimizer", "field": "weight_decay", "first": 0.1, "second": 0.0} in printed["differences"]
    assert main(["runs", "diff", first.run_id, first.run_id]) == 0
    assert capsys.readouterr().out == "no setting differs\n"
    assert main(["runs", "diff", first.run_id, "nowhere"]) == 2
