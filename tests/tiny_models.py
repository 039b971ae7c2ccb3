"""Tiny random models, datasets and runs for the worker's tests: milliseconds a step, nothing downloaded."""

import atexit
import os
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

# Two threads gain nothing at these sizes, and one thread adds in the same order in every process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import settings_in, write_rows
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.errors import LabError
from qlora_core.events import Event
from qlora_core.runs import Run, RunStore
from qlora_core.worker.quantising import QUANTISED, dequantized_weight, forget_quantisation, plain_layer
from qlora_core.worker.training import train

torch.set_num_threads(1)
logging.disable_progress_bar()

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL) + 5  # five ids without a token, as many models have
# Sizes are multiples of 64, bitsandbytes' block; older architectures name them their own way.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
DELTA = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
# Shorter than the rows of every test that means it to matter, in one layer of two where both kinds can stand together.
WINDOW = {"sliding_window": 16}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": USUAL,
    "mistral": USUAL | {"head_dim": 16} | WINDOW,
    "qwen2": USUAL,
    "qwen3": USUAL | {"head_dim": 16},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 16},
    "gpt_neox": SMALL | {"intermediate_size": 128},
    "gemma2": USUAL | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0} | ALTERNATING,
    "gemma3_text": USUAL | {"head_dim": 16, "query_pre_attn_scalar": 16} | ALTERNATING,
    "opt": SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 1024},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": SMALL | {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "mamba": {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "expand": 2},
    "qwen3_next": USUAL | DELTA | EXPERTS | {"head_dim": 16, "linear_value_head_dim": 16},
    "lfm2": USUAL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "bamba": USUAL | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
}
# Where PEFT does not take all linear layers, or warns.
TARGETS = {"mamba": "in_proj", "qwen3_next": "q_proj,v_proj"}


@cache
def _workspace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML, and padding with the end token, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


@cache
def model_folder(architecture: str = "llama", dtype: torch.dtype = torch.float32, spread: float = 4.0) -> Path:
    """A random model of the architecture, saved as safetensors with its tokenizer. Do not change it: it is shared.

    Linear weights are `spread` times larger than at the start of a pretraining, so that attention attends unevenly and a
    row that sees another shows it.
    """
    folder = _workspace() / f"{architecture}-{dtype}-{spread}".replace("torch.", "")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPES[architecture])
    end = tokenizer().eos_token_id
    for name, value in config.to_dict().items():
        # GPT-2 and OPT have a dropout of their own, which stays on in training: losses could not be compared.
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, end, end
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(spread)
            if architecture == "qwen2" and name.endswith(".bias"):
                parameter.normal_(std=0.1)  # of query, key and value; zero at the start of a pretraining
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def dataset(count: int, *, seed: int = 1) -> list[dict[str, str]]:
    """Prompts and completions of 2 to 60 letters each, all different."""
    chance = random.Random(seed)

    def text() -> str:
        return "".join(chance.choices("abcdefghij ", k=chance.randint(2, 60))).strip() or "a"

    return [{"prompt": f"{text()} {i}?", "completion": f"{text()}."} for i in range(count)]


def make_run(folder: Path, *, train_rows: Any = None, eval_rows: Any = None, **config: Any) -> Run:
    """A run on 12 rows, evaluated on 5 others, with everything below `folder`; 6 steps of LoRA in fp32 unless told."""
    data = write_rows(folder / "train.jsonl", dataset(12) if train_rows is None else train_rows)
    held_out = write_rows(folder / "eval.jsonl", dataset(5, seed=2) if eval_rows is None else eval_rows)
    values: dict[str, Any] = {
        "data": str(data),
        "eval_data": str(held_out),
        "base_model": str(model_folder()),
        "method": "lora",
        "rank": 4,
        "compute_dtype": "fp32",
        "device": "cpu",
        "learning_rate": 1e-2,
        "rows_per_step": 4,
        "max_steps": 6,
        "eval_steps": 3,
    }
    return RunStore(settings_in(folder)).create(TrainConfig(**(values | config)))


def train_here(run: Run, stop: Any = False) -> Run:
    """Another attempt at the run in this process, with the events that queue and worker write around it."""
    reset_accelerate()
    attempt = 1 + sum(isinstance(event, events.Launched) for event in run.events()[0])
    events.append(run.events_path, events.Launched(attempt=attempt))
    if isinstance(stop, StopAfter):
        stop.run = run
    try:
        train(run, stop)
    except LabError as error:
        events.append(run.events_path, events.Failed(step=0, reason=str(error)))
        raise
    return run


def reset_accelerate() -> None:
    """accelerate keeps one state a process; a worker trains one run, a test process many."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class StopAfter:
    """True once this attempt has made the given number of steps; `train_here` says whose."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.run: Run | None = None

    def __bool__(self) -> bool:
        made = 0
        for event in self.run.events()[0]:
            made = 0 if isinstance(event, events.Launched) else made + isinstance(event, events.Step)
        return made >= self.steps


def said(run: Run, kind: type[Event]) -> list[Any]:
    """Events of one kind that still hold."""
    return [event for event in run.history() if isinstance(event, kind)]


def losses(run: Run) -> list[float]:
    return [event.loss for event in said(run, events.Step)]


def eval_losses(run: Run) -> dict[int, float]:
    return {event.step: event.loss for event in said(run, events.Evaluation)}


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with every quantised layer as it was before, with the weights that it held in 4 or 8 bits; all at once."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QUANTISED):
            plain = plain_layer(module)
            plain.weight = torch.nn.Parameter(dequantized_weight(module, dtype), requires_grad=False)
            model.set_submodule(name, plain)
    forget_quantisation(model)
    return model.to(dtype)
