"""Base model folder -> model with an adapter, in 16 bits or NF4, ready to train."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.worker.hardware import DTYPES

QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin")
# Layers in which query, key and value are one matrix: they cannot be targeted apart.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")


def load_base(folder: Path, config: TrainConfig, *, device: torch.device, dtype: str) -> PreTrainedModel:
    """The frozen base: 16 (or 32) bits for lora, 4 bits for qlora. Safetensors only, never code of the model's own.

    Raises ModelError.
    """
    quantization = None
    if config.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=DTYPES[dtype],
            quantization_config=quantization,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # memory and shapes: RuntimeError
        raise ModelError(f"base model {folder}: cannot be loaded: {' '.join(str(error).split())[:500]}") from error
    forbid_cpu_repacking(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def forbid_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    On CPUs with AVX512-BF16 a forward pass in evaluation mode repacks every Linear4bit, and nothing unpacks it for
    training: gradients are then wrong while the loss looks right, and a merge gives garbage.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(model: PreTrainedModel, config: TrainConfig, *, base_name: str) -> Any:
    """A PeftModel around `model` with a fresh adapter in fp32. Raises ConfigError for modules that do not exist."""
    targets = resolve_targets(model, config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        # GPT-2's Conv1D holds its weight transposed; PEFT sets this itself, with a warning, when it is left out.
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
    )
    # Seeded right before, so that LoRA and QLoRA of one seed start from the same A.
    torch.manual_seed(config.seed)
    names = linear_names(model)
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:  # such as Mamba's out_proj, whose kernel bypasses the layer
        raise ConfigError(
            f"target_modules is {config.target_modules!r}: {error}; name other layers of {', '.join(names)}"
        ) from None
    # What loads the adapter looks the base up by this: a name that others know, not a path of this machine.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def resolve_targets(model: PreTrainedModel, target_modules: str | tuple[str, ...]) -> str | list[str]:
    """Module names for PEFT. Raises ConfigError naming what the model has instead."""
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    if target_modules == "all-linear":
        return "all-linear"
    if target_modules == "attention":
        found = [n for n in linear if any("attn" in part or "attention" in part for part in n.split(".")[:-1])]
    elif target_modules == "query-value":
        found = [n for n in linear if n.rsplit(".", 1)[-1] in (*QUERY_VALUE, *FUSED_QKV)]
    else:
        names = tuple(target_modules)
        missing = [name for name in names if not any(n == name or n.endswith(f".{name}") for n in linear)]
        if missing:
            raise ConfigError(
                f"target_modules: the model has no linear layer {', '.join(missing)}; it has {', '.join(linear_names(model))}"
            )
        found = list(names)
    if not found:
        raise ConfigError(
            f"target_modules is {target_modules!r}, which fits none of the model's linear layers "
            f"({', '.join(linear_names(model))}); choose all-linear, or name layers"
        )
    return found


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of linear layers, each once."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)})


def is_linear(module: torch.nn.Module) -> bool:
    """Linear layers of any precision (bitsandbytes' are subclasses), GPT-2's Conv1D included."""
    return isinstance(module, (torch.nn.Linear, Conv1D))


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
