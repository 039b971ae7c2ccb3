"""Merging with little memory: the same weights as PEFT's own merge gives, made shard by shard, refused where there is no room."""

import resource
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import VOCABULARY, dequantized, make_run, model_folder, tokenizer, train_here
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_core import devices, merging
from qlora_core.errors import RunError
from qlora_core.runs import Run
from qlora_core.worker import loading, merged_weights
from qlora_core.worker import merging as worker
from qlora_core.worker.hardware import DTYPES
from qlora_core.worker.merging import computed_in, merge_onto

CPU = torch.device("cpu")


def trained(folder: Path, architecture: str = "llama", **config: Any) -> Run:
    base = str(model_folder(architecture))
    return train_here(make_run(folder, **({"base_model": base, "max_steps": 2, "eval_steps": 2} | config)))


def merged_at_once(run: Run, onto: str, folder: Path) -> dict[str, torch.Tensor]:
    """As PEFT and transformers do it, with all of it in memory."""
    dtype = computed_in(run)
    base = loading.load_base(
        run.base_model().folder, run.config(), device=CPU, dtype=dtype, four_bit=onto == "dequantized"
    )
    if onto == "dequantized":
        base = dequantized(base, DTYPES[dtype])
    merged = PeftModel.from_pretrained(base, str(run.adapter)).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("llama", {"method": "qlora"}),
        ("llama", {"method": "qlora", "compute_dtype": "bf16", "use_dora": True}),
        ("llama", {"method": "qlora", "quantize_modules": "mlp", "int8_modules": "q_proj", "target_modules": "q_proj"}),
        ("gpt2", {"method": "qlora"}),
        ("qwen3_next", {"method": "qlora", "target_modules": "q_proj,v_proj"}),
    ],
    ids=str,
)
def test_weights_are_those_of_a_merge_at_once(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    """To the bit, on every base: with quantised layers that have no adapter, GPT-2's transposed ones, DoRA, and experts."""
    run = trained(tmp_path, architecture, **config)
    for onto in merging.ways(run):
        expected = merged_at_once(run, onto, tmp_path / onto)
        found = load_file(merge_onto(run, onto) / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert AutoModelForCausalLM.from_pretrained(run.path / f"merged-{onto}").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of what is tested here
def test_an_adapted_head_leaves_the_embedding_that_it_was_tied_to(tmp_path: Path) -> None:
    """Training changed what is predicted, not how tokens are read; so does the merge."""
    run = trained(tmp_path, target_modules="q_proj,lm_head", max_steps=20, eval_steps=20)
    before = load_file(run.base_model().folder / "model.safetensors")["model.embed_tokens.weight"]
    found = load_file(merge_onto(run, "original") / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], before.to(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(run.path / "merged-original")
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_files_that_are_computed_from_several_weights_are_whole_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Architectures whose files hold other tensors than the model does cannot wait until a shard is written."""
    run = trained(tmp_path)
    found = load_file(merge_onto(run, "original") / "model.safetensors")

    def stacked(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"all": torch.stack([t for name, t in state.items() if "q_proj" in name])}

    monkeypatch.setattr(merged_weights, "revert_weight_conversion", stacked)
    again = load_file(merge_onto(run, "original") / "model.safetensors")
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)


# -- a model of several shards


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """200 MiB of weights in bf16, in several files."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
        tie_word_embeddings=True, eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder / "base", max_shard_size="50MB"
    )
    tokenizer().save_pretrained(folder / "base")
    few = {"max_steps": 1, "eval_steps": 1, "rows_per_step": 1, "compute_dtype": "bf16", "method": "qlora"}
    return train_here(make_run(folder, base_model=str(folder / "base"), **few))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_merge_holds_one_file_at_a_time(wide_run: Run, onto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights that it has made, no more are in memory than one file holds, and the one that is being made."""
    weights = weight_bytes(wide_run.base_model().folder)
    held, most, make = [], [], merged_weights.Unmade.contiguous

    def watched(self: merged_weights.Unmade) -> torch.Tensor:
        tensor = make(self)
        held.append(weakref.ref(tensor))
        most.append(sum(alive.nbytes for reference in held if (alive := reference()) is not None))
        return tensor

    monkeypatch.setattr(merged_weights.Unmade, "contiguous", watched)
    monkeypatch.setattr(worker, "SHARD_BYTES", weights // 8)
    folder = merge_onto(wide_run, onto)
    assert len(held) == 8 * 7 and len(list(folder.glob("*.safetensors"))) >= 8
    assert weight_bytes(folder) == pytest.approx(weights, rel=0.01)
    assert max(most) < weights // 8 + 8 * 1024**2


def test_the_peak_is_measured_and_was_estimated_before(wide_run: Run) -> None:
    for onto in merging.ways(wide_run):
        folder = merging.folder_of(wide_run, onto, "16bit")
        (folder / "config.json").unlink(missing_ok=True)
        merging.merge(wide_run, onto=onto)
        found = merging.merges(wide_run)[folder.name]
        assert 0.5 < found["peak_host_bytes"] / found["estimated_peak_host_bytes"] < 1.1
        assert found["seconds"] > 0


# -- no room


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(merging, "_run_worker", refuse)


def test_too_little_host_memory_is_said_before_anything_is_loaded(
    tmp_path: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path)
    monkeypatch.setattr(devices, "host_memory", lambda: devices.HostMemory(8 * devices.GIB, 300 * 1024**2))
    with pytest.raises(RunError, match=r"needs about 0\.6 GiB of host memory \(an estimate\), 0\.3 are free; end what"):
        merging.merge(run)


def test_too_little_disk_is_said_before_anything_is_loaded(
    tmp_path: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path)
    monkeypatch.setattr(devices, "free_disk_bytes", lambda folder: 1000)
    with pytest.raises(RunError, match=r"has 0\.0 GiB free, the merged model needs .*; delete runs or free disk space"):
        merging.merge(run)


@pytest.mark.parametrize("export", merging.EXPORTS)
def test_a_disk_that_becomes_full_leaves_no_half_model(tmp_path: Path, export: str) -> None:
    """A real write fails: the limit on a file's size, which the worker inherits, stands for the disk's."""
    run = trained(tmp_path)
    merging.host_bytes(run, "original")  # what describes the architecture is on the disk already
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"the disk became full during the merge, .*; free space on the disk of "):
            merging.merge(run, export=export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(run.path.glob("merged-*")) and not merging.merges(run)
    assert merging.merge(run, export=export).is_dir()


def test_a_merge_that_is_killed_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where host memory runs out; it is said as such."""
    run = trained(tmp_path)

    def killed(command: list[str], **_: Any) -> Any:
        for name in ("merged-original.partial", "merged-original-nf4.16bit.partial"):
            (run.path / name).mkdir()
        return subprocess.CompletedProcess(command, -9, "", "")

    merging.host_bytes(run, "original")
    monkeypatch.setattr(merging.subprocess, "run", killed)
    with pytest.raises(merging.ModelError, match=r"was killed \(signal 9\), as happens where host memory runs out"):
        merging.merge(run)
    assert not (run.path / "merged-original.partial").exists()
