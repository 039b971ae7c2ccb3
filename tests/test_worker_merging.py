"""Merged models: the same answers as base + adapter, loadable without PEFT, and made once."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import make_run, model_folder, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core import events, merging
from qlora_core.errors import ModelError, RunError
from qlora_core.runs import Run
from qlora_core.worker import loading
from qlora_core.worker.merging import merge_onto

IDS = torch.tensor([[*range(5, 60), *range(70, 130)]])


def trained(folder: Path, method: str) -> Run:
    base = str(model_folder(dtype=torch.bfloat16))
    return train_here(
        make_run(folder, base_model=base, method=method, compute_dtype="bf16", max_steps=20, eval_steps=20)
    )


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("lora"), "lora")


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("qlora"), "qlora")


@torch.no_grad()
def trained_logits(run: Run) -> torch.Tensor:
    """Of the model that was trained: the base as the run loaded it, with the saved adapter, not merged."""
    base = loading.load_base(run.base_model().folder, run.config(), device=torch.device("cpu"), dtype="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        return PeftModel.from_pretrained(base, run.adapter).eval()(input_ids=IDS).logits.float()


@torch.no_grad()
def merged_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM"
    return model.eval()(input_ids=IDS).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_a_merged_lora_model_answers_as_base_and_adapter_do(lora_run: Run) -> None:
    """Seen: 0.005 in bf16; without the adapter it is 1.4."""
    expected = trained_logits(lora_run)
    assert relative(merged_logits(merge_onto(lora_run, "original")), expected) < 0.01
    assert relative(merged_logits(lora_run.base_model().folder), expected) > 0.2


def test_a_merge_onto_the_dequantised_base_is_the_model_that_qlora_trained(qlora_run: Run) -> None:
    """Seen: 0.005 in bf16, and 0.05 when merged onto the original base."""
    expected = trained_logits(qlora_run)
    dequantised, original = (
        relative(merged_logits(merge_onto(qlora_run, onto)), expected) for onto in ("dequantized", "original")
    )
    assert dequantised < 0.01 < 3 * dequantised < original < 0.2


def test_a_merged_folder_is_a_whole_model(lora_run: Run) -> None:
    """Safetensors, the tokenizer with its chat template, and none of PEFT's or the quantiser's settings."""
    folder = merge_onto(lora_run, "original")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith("adapter") or name.endswith(".bin")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache and not hasattr(model.config, "quantization_config")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "hello"}]
    own, base = (AutoTokenizer.from_pretrained(path) for path in (folder, lora_run.base_model().folder))
    assert own.apply_chat_template(chat) == base.apply_chat_template(chat)


def test_lora_has_no_dequantised_base(lora_run: Run) -> None:
    with pytest.raises(RunError, match="original 16-bit base, so there is no dequantised one"):
        merging.merge(lora_run, onto="dequantized")


def test_a_run_without_an_adapter_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no adapter yet"):
        merging.merge(make_run(tmp_path))


def test_a_merge_is_made_once_and_again_after_a_new_adapter(qlora_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process makes it; the default of qlora is the dequantised base."""
    shutil.rmtree(qlora_run.path / "merged-dequantized", ignore_errors=True)
    reported: list[str] = []
    folder = merging.merge(qlora_run, report=reported.append)
    assert folder == qlora_run.path / "merged-dequantized" and (folder / "config.json").exists()
    assert reported == ["merging onto the dequantized base"]

    def no_process(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("merged again")

    with monkeypatch.context() as patch:
        patch.setattr(merging.subprocess, "run", no_process)
        assert merging.merge(qlora_run, report=reported.append) == folder
        newer = folder.stat().st_mtime_ns + 10**9
        weights = qlora_run.adapter / "adapter_model.safetensors"
        os.utime(weights, ns=(newer, newer))
        with pytest.raises(AssertionError, match="merged again"):
            merging.merge(qlora_run)


def test_a_merge_that_fails_leaves_the_reason_and_no_half_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    run = train_here(make_run(tmp_path, base_model=str(base), max_steps=1))
    (base / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"(?s)the merge failed: .*base.*merge-log\.txt"):
        merging.merge(run)
    assert not (run.path / "merged-original").exists()
    assert "Traceback" in (run.path / "merge-log.txt").read_text()


def test_a_running_run_is_not_merged(lora_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    events.append(lora_run.events_path, events.Launched(attempt=2))
    monkeypatch.setattr(Run, "is_locked", lambda self: True)
    with pytest.raises(RunError, match="is running; merge it when it has ended"):
        merging.merge(lora_run)
