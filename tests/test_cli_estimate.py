"""`estimate` of the command line: parts, plan and what others would need, for rows, for a card, and for a budget."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CHATML, alpaca, fake_gpus, model_folder, settings_in, tokenizer_folder, write_rows
from test_planner import LLAMA_8B

from qlora_core import architecture, cli


@pytest.fixture
def estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command for an 8B model; with --json what it printed, else its text."""
    settings = settings_in(tmp_path)
    monkeypatch.setenv("QLORA_LAB_HOME", str(settings.home))
    monkeypatch.setattr(architecture, "read", lambda *_: LLAMA_8B)
    fake_gpus(monkeypatch)
    base = tokenizer_folder(model_folder(tmp_path / "base"), chat_template=CHATML)

    def run(*arguments: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert cli.main(["estimate", "--base-model", str(base), *arguments]) == status
        printed = capsys.readouterr()
        if status:
            return printed.err
        return json.loads(printed.out) if "--json" in arguments else printed.out

    return run


def test_the_parts_the_plan_and_what_others_would_need_are_printed(estimate):
    text = estimate("--gpu-memory-gib", "24", "--method", "qlora", "--rank", "16")
    for part in ("weights", "quantisation constants", "adapters", "optimizer", "gradients", "activations", "context"):
        assert f"\n  {part} " in text
    assert "an estimate" in text and "on a card of 24 GiB" in text and "no data named" in text
    assert "Fits: " in text and "of the 22.80 that may be used" in text and "Passes of up to 8,192 tokens" in text
    assert "Highest rank that fits: 256." in text
    assert "without activations and logits" in text and "0.52p + 24krd" in text and "12 bytes a weight" in text


def test_one_object_holds_the_same_in_bytes(estimate):
    found = estimate("--gpu-memory-gib", "24", "--json")
    assert found["fits"] and found["kind_of_memory"] == "GPU"
    assert found["total_bytes"] == sum(found["parts"].values())
    assert found["needed_bytes"] == found["total_bytes"] + found["context_bytes"] <= found["usable_bytes"]
    assert found["plan"] == {"fused": True, "token_budget": 8192, "checkpointed_layers": 0, "offloaded": False}
    assert found["for_comparison"]["full_fine_tuning_bytes"] == 12 * LLAMA_8B.parameters


def test_rows_are_counted_as_the_model_reads_them(estimate, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(40)])
    some = estimate("--data", str(data), "--gpu-memory-gib", "24", "--json")
    full = estimate("--gpu-memory-gib", "24", "--json")
    assert (some["rows"], some["rank_for_rows"]) == (40, 8) and full["rows"] == 0
    assert 0 < some["tokens_of_largest_pass"] < full["tokens_of_largest_pass"] == 8 * 512
    assert "40 rows looked at" in estimate("--data", str(data), "--gpu-memory-gib", "24")


def test_the_rank_is_for_the_whole_dataset_and_not_for_the_rows_looked_at(estimate, tmp_path):
    data = write_rows(tmp_path / "many.jsonl", [alpaca(number) for number in range(6_000)])
    found = estimate("--data", str(data), "--gpu-memory-gib", "24", "--json")
    assert found["rows"] < 5_000 and found["rank_for_rows"] == 16


def test_without_a_gpu_it_speaks_of_host_memory(estimate):
    found = estimate("--json")
    assert found["kind_of_memory"] == "host" and found["parts"]["libraries"] > 0 and found["context_bytes"] == 0
    assert not found["plan"]["fused"] and "of host memory" in estimate()


def test_what_does_not_fit_says_what_would_help(estimate):
    text = estimate("--gpu-memory-gib", "80", "--memory-budget-gib", "3", "--method", "lora")
    assert "Does not fit: " in text and "3.0 may be used" in text and "QLoRA" in text and "Highest rank" not in text


def test_a_mistake_exits_with_2_and_names_it(estimate):
    assert "above 0" in estimate("--gpu-memory-gib", "0", status=2)
    assert "no linear layer c_attn" in estimate("--target-modules", "c_attn", status=2)
    assert "rank" in estimate("--rank", "0", status=2)
    assert "gone.jsonl" in estimate("--data", "gone.jsonl", status=2)
