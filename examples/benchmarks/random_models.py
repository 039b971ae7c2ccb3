"""Random-weight checkpoints in the shapes of real models, for measuring speed and memory where no download is wanted.

`python examples/benchmarks/random_models.py SHAPE FOLDER` from the project's folder. Its tokenizer makes one token of each
word w0 to w1019 between spaces, so that a row of N words is N tokens and the few of the chat template.
"""

import argparse
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True,
    },
    "135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1b": LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA_3 | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "70b": LLAMA_3 | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    # Each differs from those above in one thing that memory depends on, so that an estimate can be checked on them.
    "small-vocabulary": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "multi-head": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "3b": LLAMA_3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
POSITIONS = 8192
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
)


def write_model(shape: str, folder: Path) -> None:
    """Write the whole model: config, tokenizer, index, a file for each decoder layer and for each tensor outside them."""
    shards = write_description(shape, folder)
    for name in shards:
        write_shard(folder / name, shards[name])


def generated_shards(shape: str, folder: Path) -> Any:
    """Write all but the weights, and return what `load_base` takes as `shard_at_hand`: it writes each shard just before it
    is read and deletes it after, so that the weights are never on disk together."""
    shards = write_description(shape, folder)

    @contextmanager
    def at_hand(path: Path) -> Iterator[Path]:
        try:
            write_shard(path, shards[path.name])
            yield path
        finally:
            path.unlink(missing_ok=True)

    return at_hand


def write_description(shape: str, folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Write config, tokenizer and index; returns {file name: {tensor name: its shape}}."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    config.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in tensor_shapes(config).items():
        within = name.partition(".layers.")[2].partition(".")[0]
        file = f"layer-{int(within):03d}" if within else name.removeprefix("model.").removesuffix(".weight")
        shards.setdefault(f"model-{file}.safetensors", {})[name] = size
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    numbers = sum(torch.Size(size).numel() for tensors in shards.values() for size in tensors.values())
    index = {"metadata": {"total_size": 2 * numbers}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shards


def config_of(shape: str) -> PreTrainedConfig:
    values = {"tie_word_embeddings": False} | SHAPES[shape]
    config = CONFIG_MAPPING[values.pop("model_type")](
        max_position_embeddings=POSITIONS, bos_token_id=1, eos_token_id=2, pad_token_id=3, dtype="bfloat16", **values
    )
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    return config


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint with this config; a tied head is in none."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write random bf16 tensors, the same each time for a file of this name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance = torch.Generator(device).manual_seed(zlib.crc32(path.name.encode()))
    made = {}
    for name, size in tensors.items():
        if name.endswith("norm.weight"):
            made[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            made[name] = torch.randn(size, generator=chance, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()
    save_file(made, path, metadata={"format": "pt"})


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of 1,024 tokens: four special ones and the words w0 to w1019."""
    vocabulary = {
        text: number for number, text in enumerate([*SPECIAL, *(f"w{n}" for n in range(1024 - len(SPECIAL)))])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=POSITIONS,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    write_model(arguments.shape, arguments.folder)
    files = list(arguments.folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    seconds = time.perf_counter() - begun
    print(f"{arguments.shape}: {size / 1024**3:.2f} GiB in {len(files)} files, written in {seconds:.1f} s")


if __name__ == "__main__":
    main()
