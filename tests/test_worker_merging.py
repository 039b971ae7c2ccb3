"""Merged models: the same answers as base + adapter, loadable without PEFT, made once, in 4 bits too, and a base again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import VOCABULARY, eval_losses, make_run, model_folder, tokenizer, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from qlora_core import events, merging, models, queue
from qlora_core.errors import ModelError, RunError
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run, RunStore, lock
from qlora_core.worker import loading
from qlora_core.worker.merging import export_nf4, merge_onto

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
        weights = qlora_run.adapter / "adapter_model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + b"?")
        os.utime(weights, ns=(0, 0))  # by its content, not by when it was written
        with pytest.raises(AssertionError, match="merged again"):
            merging.merge(qlora_run)
        weights.write_bytes(before)


def test_a_run_that_is_merged_or_pushed_is_not_resumed_meanwhile(qlora_run: Run) -> None:
    for name, doing in (("merge.lock", "merged"), ("publish.lock", "pushed")):
        with lock(qlora_run.path / name), pytest.raises(RunError, match=f"is being {doing}; .* then resume it"):
            queue.resume(qlora_run, max_steps=100)


def test_an_adapter_that_changes_while_it_is_merged_gives_no_merge(
    qlora_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(qlora_run.path / "merged-dequantized", ignore_errors=True)
    weights = qlora_run.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()

    def changing(run: Run, onto: str, export: str) -> dict[str, Any]:
        (run.path / "merged-dequantized").mkdir()
        weights.write_bytes(before[:-1] + b"?")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_run_worker", changing)
        with pytest.raises(RunError, match="its adapter changed while it was merged"):
            merging.merge(qlora_run)
    assert not (qlora_run.path / "merged-dequantized").exists()
    weights.write_bytes(before)


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


NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@torch.no_grad()
def logits_of(folder: Path, **how: Any) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()(input_ids=IDS).logits.float()


def test_an_nf4_export_is_the_merge_quantised(qlora_run: Run) -> None:
    """Seen: the very logits of the merge quantised when it is loaded; 0.1 from those of the merge in 16 bits."""
    folder, merged = export_nf4(qlora_run, "original"), merge_onto(qlora_run, "original")
    assert folder == qlora_run.path / "merged-original-nf4"
    found = logits_of(folder)
    assert relative(found, logits_of(merged, dtype=torch.bfloat16, quantization_config=NF4)) < 1e-4
    assert 0.01 < relative(found, merged_logits(merged)) < 0.3
    settings = json.loads((folder / "config.json").read_text())
    quantization = settings["quantization_config"]
    assert quantization["load_in_4bit"] and quantization["bnb_4bit_use_double_quant"] and settings["use_cache"]
    assert (quantization["bnb_4bit_quant_type"], quantization["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(merged).chat_template
    assert not list(qlora_run.path.glob("merged-*.*")), "nothing is left of the way there"


def test_an_nf4_export_of_the_dequantised_merge_is_refused(qlora_run: Run) -> None:
    """Its weights lie on the 16 values of 4 bits: a small update is rounded away, and what is left is the base untrained."""
    with pytest.raises(RunError, match="round away again what the adapter adds to it; merge onto original"):
        merging.merge(qlora_run, onto="dequantized", export="nf4")


def test_an_nf4_export_takes_about_a_quarter(tmp_path: Path) -> None:
    """4.127 bits a weight of the linear layers (QLoRA paper); the process that makes it is a real one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        tie_word_embeddings=True, eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "wide")
    tokenizer().save_pretrained(tmp_path / "wide")
    run = train_here(make_run(tmp_path, base_model=str(tmp_path / "wide"), max_steps=1, eval_steps=1))
    reported: list[str] = []
    folder = merging.merge(run, export="nf4", report=reported.append)
    assert reported == ["merging onto the original base, then quantising to NF4"]
    assert merging.merge(run, export="nf4", report=reported.append) == folder and len(reported) == 1
    assert not (run.path / "merged-original").exists(), "asked for was NF4 alone"
    whole, quantised = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "wide", folder))
    assert 0.25 < quantised / whole < 0.32
    linear = sum(t.numel() for name, t in load_file(tmp_path / "wide" / "model.safetensors").items() if "proj" in name)
    stored = sum(t.nbytes for name, t in load_file(folder / "model.safetensors").items() if "proj" in name)
    assert 4.1 < 8 * stored / linear < 4.3
    with pytest.raises(ModelError, match="is quantised already; choose the 16-bit original"):
        models.resolve(str(folder), run.settings)
    with pytest.raises(RunError, match="export is '8bit'; choose one of 16bit, nf4"):
        merging.merge(run, export="8bit")


def test_a_merge_keeps_the_number_type_of_an_fp16_run(tmp_path: Path, lora_run: Run) -> None:
    """A CPU does not train in fp16, so the run's result is told that it did."""
    run = RunStore(lora_run.settings).get(lora_run.run_id)
    copy = Run(tmp_path / "copy", run.settings)
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("merged-*"))
    result = run.result()
    result["run_info"]["compute_dtype"] = "fp16"
    (copy.path / "result.json").write_text(json.dumps(result))
    model = AutoModelForCausalLM.from_pretrained(merge_onto(copy, "original"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.fixture
def merged_run(tmp_path: Path) -> Run:
    run = train_here(make_run(tmp_path, name="first lesson", max_steps=4, eval_steps=4))
    merging.merge(run)
    return run


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_run_is_the_base_of_a_new_one(tmp_path: Path, merged_run: Run, method: str) -> None:
    """The new run begins where the first one ended, says whose merge it began with, and can be merged in its turn."""
    base = f"run:{merged_run.run_id[:20]}"
    run = train_here(make_run(tmp_path, base_model=base, method=method, max_steps=4, eval_steps=4))
    assert run.status().state == FINISHED and run.status().base_model == "first lesson merged onto original"
    told = run.result()["run_info"]["base_model"]
    assert told["origin"] == f"merged run {merged_run.run_id}" and len(told["weights_sha256"]) == 64
    before, after = eval_losses(run)[0], eval_losses(run)[4]
    assert before == pytest.approx(eval_losses(merged_run)[4], rel=0.02 if method == "lora" else 0.1)
    assert before < eval_losses(merged_run)[0] and after < before
    assert (merge_onto(run, "dequantized" if method == "qlora" else "original") / "config.json").exists()


def test_a_merge_named_by_its_folder_is_known_too(merged_run: Run) -> None:
    named = models.resolve(str(merged_run.path / "merged-original"), merged_run.settings)
    assert named == models.resolve(f"run:{merged_run.run_id}", merged_run.settings)


def test_the_newest_merge_is_the_base(qlora_run: Run) -> None:
    merge_onto(qlora_run, "dequantized")
    newest = merge_onto(qlora_run, "original")
    later = newest.stat().st_mtime_ns + 10**9
    os.utime(newest, ns=(later, later))
    assert models.resolve(f"run:{qlora_run.run_id}", qlora_run.settings).folder == newest.resolve()


def test_a_run_without_a_merge_of_its_adapter_is_no_base(tmp_path: Path, merged_run: Run) -> None:
    with pytest.raises(ModelError, match=r"there is no run 'nope'; .*runs list"):
        models.resolve("run:nope", merged_run.settings)
    weights, folder = merged_run.adapter / "adapter_model.safetensors", merged_run.path / "merged-original"
    newer = folder.stat().st_mtime_ns + 10**9
    os.utime(weights, ns=(newer, newer))
    with pytest.raises(ModelError, match=f"was trained on since .*: `python -m qlora_core merge {merged_run.run_id}`"):
        models.resolve(f"run:{merged_run.run_id}", merged_run.settings)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=f"is not merged yet; .*: `python -m qlora_core merge {merged_run.run_id}`"):
        models.resolve(f"run:{merged_run.run_id}", merged_run.settings)


def test_a_merge_that_a_run_stands_on_stays(tmp_path: Path, merged_run: Run) -> None:
    """Neither deleting the run nor merging it anew, after more steps, takes the base away."""
    store = RunStore(merged_run.settings)
    second = make_run(tmp_path, base_model=f"run:{merged_run.run_id}")
    with pytest.raises(RunError, match=f"needed by {second.run_id}, .*delete that run first"):
        store.delete(merged_run)
    assert merging.merge(merged_run) == merged_run.path / "merged-original", "what is current is returned as it is"
    queue.resume(merged_run, max_steps=6)
    train_here(merged_run)
    with pytest.raises(
        RunError, match=f"merged-original is the base model of {second.run_id}, which a new merge would"
    ):
        merging.merge(merged_run)
    store.delete(second)
    assert not store.based_on(merged_run.path)
