"""A base model's config.json -> its layers and sizes as JSON, with no weight loaded. Run as a process: -m … FOLDER."""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_core.targets import Architecture, Layer
from qlora_core.worker.fused import problem_with

# PEFT refuses these: Mamba's kernel takes their weights past the layer (peft/tuners/tuners_utils.py).
MAMBA_TYPES, PAST_THE_LAYER = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), {"out_proj"}


def described(folder: Path) -> dict[str, Any]:
    """What `targets.Architecture` is made of, for the causal language model that the folder's config.json describes."""
    return _described(*causal_language_model(folder))


def shape_of(model: PreTrainedModel) -> Architecture:
    """The same of a model that is loaded, whatever became of its layers since."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    return Architecture.from_json(_described(type(model), config))


def causal_language_model(folder: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config that AutoModelForCausalLM chooses for the folder; it takes no state dict itself. Of a model of
    texts and images that is the part for texts."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(f"{config.model_type!r} is no causal language model of transformers")
    if kind.config_class is not type(config) and kind.config_class is config.sub_configs.get("text_config"):
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    return kind, config


def _described(kind: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Any]:
    with torch.device("meta"):
        model = kind._from_config(config)
    model.tie_weights()
    layers = linear_layers(model)
    embedding = model.get_input_embeddings().weight
    return {
        "model_type": config.model_type,
        "layers": [list(asdict(layer).values()) for layer in layers],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "layer_count": config.get_text_config().num_hidden_layers,
        **_sizes(config.get_text_config(), embedding.shape[1]),
        "fusable": problem_with(model) is None,
    }


def _sizes(config: Any, hidden: int) -> dict[str, int]:
    """Heads and inner width; of an architecture that names none, those of a usual one of its width."""
    heads = getattr(config, "num_attention_heads", None) or max(1, hidden // 64)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return {
        "attention_heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "intermediate_size": max(inner) if isinstance(inner, (list, tuple)) else inner,
    }


def linear_layers(model: PreTrainedModel) -> list[Layer]:
    """Every linear layer that PEFT could adapt, in the model's order; the output embedding is the head. bitsandbytes holds those
    but the ones that transformers leaves out, and subclasses (Falcon's)."""
    head, refused, layers = model.get_output_embeddings(), refused_names(model.config.model_type), []
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):  # GPT-2's, which holds its weight transposed
            sizes = module.nx, module.nf
        elif isinstance(module, torch.nn.Linear):  # bitsandbytes' layers are such too
            sizes = module.in_features, module.out_features
        else:
            continue
        adaptable = name.rsplit(".", 1)[-1] not in refused
        holdable = type(module) is torch.nn.Linear or isinstance(module, (Conv1D, Linear4bit, Linear8bitLt))
        quantisable = holdable and should_convert_module(name, kept)
        layers.append(Layer(name, *sizes, module is head, adaptable, quantisable))
    return layers


def refused_names(model_type: str) -> set[str]:
    """Last names of layers that PEFT adapts not at all, or takes for names of expert weights, which are no layers here."""
    experts = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {})
    return set(experts) | (PAST_THE_LAYER if model_type in MAMBA_TYPES else set())


def main() -> None:
    json.dump(described(Path(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
