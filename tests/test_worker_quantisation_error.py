"""What quantising loses of each matrix, against the matrices of a base that bitsandbytes holds quantised."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from tiny_models import model_folder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.worker import shards
from qlora_core.worker.loading import load_base
from qlora_core.worker.quantisation_error import quantisation_error
from qlora_core.worker.quantising import Int8Linear

CPU = torch.device("cpu")


def measured(folder: Path, config: TrainConfig, dtype: torch.dtype = torch.float32, **other: Any) -> Any:
    """(what was found, what was reported, what was told)"""
    reports: list[tuple[int, int]] = []
    told: list[str] = []
    given = {"report": lambda *counts: reports.append(counts), "tell": told.append} | other
    return quantisation_error(folder, config, device=CPU, dtype=dtype, **given), reports, told


def of_loaded_base(folder: Path, config: TrainConfig, dtype: str) -> list[tuple[str, float, float, int]]:
    """(full name, relative and largest error, parameters) of each layer that the loaded base holds quantised."""
    held = load_base(folder, config, device=CPU, dtype=dtype)
    plain = load_base(folder, config, device=CPU, dtype=dtype, four_bit=False)
    found = []
    for name, module in held.named_modules():
        if isinstance(module, (Linear4bit, Int8Linear)):
            layer = plain.get_submodule(name)
            original = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).double()
            apart = original - dequantize_module_weight(module).to(layer.weight.dtype).double()
            found.append((name, (apart.norm() / original.norm()).item(), apart.abs().max().item(), original.numel()))
    return found


@pytest.mark.parametrize(
    ("architecture", "changed"),
    [
        ("llama", {}),
        ("llama", {"double_quant": False}),
        ("llama", {"quant_type": "fp4"}),
        ("llama", {"quant_type": "fp4", "double_quant": False}),
        ("llama", {"quantize_modules": "none", "int8_modules": "all"}),
        ("llama", {"quantize_modules": "attention@0", "int8_modules": "v_proj@0,mlp@1"}),
        ("gpt2", {}),  # holds its weights transposed, and one of them is as high as wide
        ("gpt2", {"int8_modules": "mlp"}),
        ("qwen3_next", {}),  # expert weights are no linear layers
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_errors_are_those_of_the_base_that_qlora_trains_on(
    architecture: str, changed: dict[str, Any], dtype: str
) -> None:
    folder, config = model_folder(architecture), TrainConfig(**{"method": "qlora", "compute_dtype": dtype} | changed)
    found, reports, told = measured(folder, config, torch.bfloat16 if dtype == "bf16" else torch.float32)
    expected = of_loaded_base(folder, config, dtype)
    assert len(expected) > 3 and not told
    assert reports == [(done, len(expected)) for done in range(len(expected))]
    for entry, (name, relative, largest, parameters) in zip(found, expected, strict=True):
        assert name.endswith(entry["module"]) and f".{entry['layer']}." in name
        assert entry["relative_error"] == pytest.approx(relative, rel=1e-5) and entry["relative_error"] > 1e-3
        assert entry["max_error"] == pytest.approx(largest, rel=1e-5, abs=1e-7) and entry["parameters"] == parameters
    kinds = {entry["type"] for entry in found}
    assert kinds <= {config.quant_type, "int8"} and ("int8" in kinds) == bool(config.int8_modules)
    assert len({(entry["layer"], entry["module"]) for entry in found}) == len(found)


def test_nf4_loses_less_than_fp4_and_int8_the_least() -> None:
    errors = {}
    for kind, config in {
        "nf4": TrainConfig(),
        "fp4": TrainConfig(quant_type="fp4"),
        "int8": TrainConfig(quantize_modules="none", int8_modules="all"),
    }.items():
        found, _, _ = measured(model_folder(), config)
        errors[kind] = [entry["relative_error"] for entry in found]
    assert all(a < b < c for a, b, c in zip(errors["int8"], errors["nf4"], errors["fp4"], strict=True))


def test_tensors_are_found_by_the_names_that_transformers_gives_them(tmp_path: Path) -> None:
    """GPT-2's own checkpoint lacks the prefix of its layers; a model of texts and images has two towers of layers."""
    expected, _, _ = measured(model_folder("gpt2"), TrainConfig())
    short = shutil.copytree(model_folder("gpt2"), tmp_path / "gpt2")
    tensors = load_file(short / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    assert measured(short, TrainConfig())[0] == expected and len(expected) == 8

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 264}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262}
    whole = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(whole).save_pretrained(tmp_path / "both")
    found, _, told = measured(tmp_path / "both", TrainConfig())
    assert len(found) == len(of_loaded_base(tmp_path / "both", TrainConfig(), "fp32")) == 15 and not told
    assert len({entry["module"] for entry in found if entry["layer"] == 0}) == 6 + 7


def test_one_matrix_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    before: list[int] = []
    read = shards.LazyTensor.__getitem__

    def watching(lazy: Any, index: Any) -> torch.Tensor:
        before.append(len(alive))
        tensor = read(lazy, index)
        alive.add(len(before))
        weakref.finalize(tensor, alive.discard, len(before))
        return tensor

    monkeypatch.setattr(shards.LazyTensor, "__getitem__", watching)
    found, _, _ = measured(model_folder(), TrainConfig(int8_modules="mlp@1"))
    assert before == [0] * 14 and len(found) == 14


def test_it_ends_where_the_report_raises() -> None:
    class Stopped(Exception):
        pass

    def report(done: int, total: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        measured(model_folder(), TrainConfig(), report=report)


def changed_copy(folder: Path, name: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(model_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    whole = tensors.pop(name)
    tensors["another.name" if value is None else name] = whole if value is None else value.expand_as(whole).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_zeros_lose_nothing_and_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    found, _, _ = measured(changed_copy(tmp_path / "zeros", name, torch.zeros(1)), TrainConfig())
    (entry,) = [entry for entry in found if (entry["layer"], entry["module"]) == (1, "up_proj")]
    assert entry["relative_error"] == entry["max_error"] == 0
    json.dumps(found, allow_nan=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj holds numbers that are not finite"):
        measured(changed_copy(tmp_path / "nan", name, torch.tensor(torch.nan)), TrainConfig())


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    lacking = changed_copy(tmp_path / "other", "model.layers.1.mlp.up_proj.weight", None)
    found, reports, told = measured(lacking, TrainConfig())
    assert len(found) == len(reports) == 13 and told == [
        "1 of 14 quantised layers are not measured, as the base's folder holds them in another form: up_proj"
    ]
    load_base(model_folder(), TrainConfig(), device=CPU, dtype="bf16").save_pretrained(tmp_path / "quantised")
    found, _, told = measured(tmp_path / "quantised", TrainConfig())
    assert not found and "was saved quantised" in told[0]
    with pytest.raises(ConfigError, match="quantize_modules is 'c_attn'"):
        measured(model_folder(), TrainConfig(quantize_modules="c_attn"))
