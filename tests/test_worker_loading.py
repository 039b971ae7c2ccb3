"""Bases are loaded tensor by tensor: to the bit what transformers loads whole, in little memory, and never with a hole."""

import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPES, model_folder
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from qlora_core.config import TrainConfig
from qlora_core.errors import ModelError
from qlora_core.worker import loading, shards

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[1] / "examples" / "benchmarks" / "random_models.py"
NOT_IN_4_BITS = {"falcon", "mamba"}
MODELS = [(name, "lora") for name in SHAPES] + [(name, "qlora") for name in SHAPES if name not in NOT_IN_4_BITS]


def streamed(folder: Path, method: str, dtype: str = "bf16", **options: Any) -> PreTrainedModel:
    return loading.load_base(folder, TrainConfig(method=method), device=CPU, dtype=dtype, **options)


def at_once(folder: Path, method: str) -> PreTrainedModel:
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4) if method == "qlora" else None
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.bfloat16, quantization_config=quantization, device_map={"": CPU}
    )
    model.config.use_cache = False  # as for training
    return model


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert [(n, type(m)) for n, m in found.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    # Of a 4-bit layer the state holds its scales too; rotary frequencies are buffers outside the state.
    for part in (lambda model: model.state_dict(), lambda model: dict(model.named_buffers())):
        tensors, others = part(found), part(expected)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
    for own in (lambda m: m.config.to_dict(), lambda m: m.generation_config.to_dict(), lambda m: m.name_or_path):
        assert own(found) == own(expected)
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (found, expected)]
    assert tied[0] == tied[1] and not found.training


def in_shards(source: Path, folder: Path, size: str = "60KB") -> Path:
    """The same weights in many files, with layers that reach from one into the next."""
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize(("architecture", "method"), MODELS)
def test_it_is_the_model_that_transformers_loads(architecture: str, method: str, tmp_path: Path) -> None:
    for folder in (model_folder(architecture), in_shards(model_folder(architecture), tmp_path)):
        assert_same(streamed(folder, method), at_once(folder, method))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_names_of_another_class_are_understood(method: str, tmp_path: Path) -> None:
    """GPT-2's own checkpoint lacks the prefix of its layers, and says nothing of generation."""
    folder = shutil.copytree(model_folder("gpt2"), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()
    assert_same(streamed(folder, method), at_once(folder, method))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_of_texts_and_images(method: str, tmp_path: Path) -> None:
    text = SHAPES["gemma3_text"] | {"vocab_size": 264}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert_same(streamed(tmp_path, method), at_once(tmp_path, method))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_model_that_was_saved_in_4_bits(tmp_path: Path) -> None:
    streamed(model_folder(), "qlora").save_pretrained(tmp_path)
    assert_same(streamed(tmp_path, "qlora"), at_once(tmp_path, "qlora"))


# -- memory and disk


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At each reading of a matrix of a layer, how many bytes of such, read before, are still in memory in 16 bits."""
    alive: dict[int, int] = {}
    seen: list[int] = []
    read: Callable[..., torch.Tensor] = shards.LazyTensor.__getitem__

    def watching(lazy: Any, index: Any) -> torch.Tensor:
        tensor = read(lazy, index)
        if tensor.ndim == 2 and ".layers." in lazy._name:
            seen.append(sum(alive.values()))
            number = len(seen)
            alive[number] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, number)
        return tensor

    monkeypatch.setattr(shards.LazyTensor, "__getitem__", watching)
    return seen


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", ["none", "all", "attention,mlp@1"])
def test_one_matrix_at_a_time_is_in_16_bits(int8: str, stored: torch.dtype, tmp_path: Path, watched: list[int]) -> None:
    folder = in_shards(model_folder(dtype=stored), tmp_path)
    loading.load_base(folder, TrainConfig(int8_modules=int8), device=CPU, dtype="bf16")
    largest = max(t.nbytes for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if ".layers." in n)
    assert len(watched) == 14 and max(watched) <= largest


def test_a_mapped_file_is_let_go_after_some_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a mapped file counts as memory of this process until it is closed: here a single large file."""
    opened, mapped = [], []
    monkeypatch.setattr(shards, "REOPEN_AFTER_BYTES", 40_000)
    monkeypatch.setattr(shards, "COPY_BELOW_BYTES", 0)
    opening, reading = shards.safe_open, shards.Shards.read

    def counting(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments[0])
        return opening(*arguments, **options)

    def measuring(found: shards.Shards, name: str, use: Any) -> Any:
        mapped.append(found._read_bytes)
        return reading(found, name, use)

    monkeypatch.setattr(shards, "safe_open", counting)
    monkeypatch.setattr(shards.Shards, "read", measuring)
    streamed(model_folder(), "qlora")
    assert len(opened) > 5 and max(mapped) <= 40_000 + 64 * 264 * 4


def example() -> Any:
    spec = importlib.util.spec_from_file_location("random_models", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_shards_that_are_made_as_they_are_read_leave_nothing_behind(method: str, tmp_path: Path) -> None:
    """So a model larger than the disk can be measured; the weights are those of the whole folder."""
    made: list[str] = []
    at_hand = example().generated_shards("tiny", tmp_path / "made")
    example().write_model("tiny", tmp_path / "whole")

    @contextmanager
    def counted(path: Path) -> Iterator[Path]:
        with at_hand(path) as lies:
            made.append(path.name)
            assert [other.name for other in path.parent.glob("*.safetensors")] == [path.name]
            yield lies

    found = streamed(tmp_path / "made", method, shard_at_hand=counted)
    assert not list((tmp_path / "made").glob("*.safetensors"))
    if method == "qlora":  # several threads read a 16-bit model, and may come back to a file
        assert len(made) == len(set(made)) == 4
    expected = streamed(tmp_path / "whole", method)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())


# -- what is missing


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_with_a_hole_are_refused(method: str, tmp_path: Path) -> None:
    """transformers would fill it with random numbers and say so in the log alone."""
    folder = shutil.copytree(model_folder(), tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if ".1.mlp" in name]
    save_file({n: t for n, t in tensors.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"holed: cannot be loaded: its weights lack 3 tensors .*layers\.1\.mlp\.down"):
        streamed(folder, method)


def test_a_lost_shard_and_a_broken_index_are_named(tmp_path: Path) -> None:
    folder = in_shards(model_folder(), tmp_path)
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    for method in ("lora", "qlora"):
        with pytest.raises(ModelError, match=f"cannot be loaded: .*{lost.name}"):
            streamed(folder, method)
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": None}))
    with pytest.raises(ModelError, match="has no weight_map"):
        streamed(folder, "lora")


def test_memory_that_runs_out_while_quantising_is_told_from_a_damaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers turns it into an error of conversion; the run must say that memory is short."""
    shortages: list[str] = []

    def runs_out(*_: Any) -> None:
        shortages.append("CUDA out of memory")
        raise torch.OutOfMemoryError(shortages[-1])

    monkeypatch.setattr(loading, "shortages_of_memory", lambda device: len(shortages))
    monkeypatch.setattr("bitsandbytes.nn.Params4bit.to", runs_out)
    with pytest.raises(torch.OutOfMemoryError, match="while .* was quantised"):
        streamed(model_folder(), "qlora")
