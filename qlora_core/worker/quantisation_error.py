"""What quantising a base loses, layer by layer: each weight matrix read, quantised and compared, and none kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from qlora_core import precision
from qlora_core.adapter_comparison import short_names
from qlora_core.config import TrainConfig
from qlora_core.errors import ModelError
from qlora_core.selectors import layer_number
from qlora_core.worker.architecture import causal_language_model, linear_layers
from qlora_core.worker.quantising import in_int8
from qlora_core.worker.shards import LazyTensor, Shards

BLOCK = 64  # weights that share a constant, as bitsandbytes' layers have it
# Of a matrix that are compared at once: no second and third one in fp32.
ROWS = 1024


@torch.no_grad()
def quantisation_error(
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Of each linear layer that the config quantises: relative_error ‖W - Q(W)‖ / ‖W‖ (Frobenius; 0 where W is zero), max_error
    of a weight, type (nf4, fp4 or int8) and number of parameters. W is the weight in `dtype`, as the 16-bit base holds it, and
    Q(W) what a layer that holds it so multiplies with. One matrix is in memory at a time.

    `report(done, total)` is called before each matrix and may raise to end it; `tell(sentence)` says what is left out: all of
    a base that was saved quantised, and layers that transformers puts together from other tensors of the folder. Raises ModelError
    where a weight is not finite, ConfigError for layers that the model does not have.
    """
    model = _described(folder)
    bits = precision.bits(linear_layers(model), config)
    if getattr(model.config, "quantization_config", None) is not None:
        tell("the base was saved quantised: what that lost cannot be measured without its 16-bit weights")
        return []
    short, found = short_names(layer.name for layer in linear_layers(model)), []
    with Shards(folder) as shards:
        tensors = _tensors(shards, model)
        names = [name for name in bits if name in tensors]
        if missing := [name for name in bits if name not in tensors]:
            tell(
                f"{len(missing):,} of {len(bits):,} quantised layers are not measured, as the base's folder holds them in another "
                f"form: {', '.join(sorted({short[name] for name in missing}))}"
            )
        for done, name in enumerate(names):
            report(done, len(names))
            kind = "int8" if bits[name] == 8 else config.quant_type
            transposed = isinstance(model.get_submodule(name), Conv1D)  # GPT-2's
            errors = _measured(shards[tensors[name]], kind, config, transposed=transposed, device=device, dtype=dtype)
            if not all(map(math.isfinite, errors.values())):
                raise ModelError(
                    f"base model {folder}: {name} holds numbers that are not finite; fetch it again, whole"
                )
            found.append({"layer": layer_number(name), "module": short[name], "type": kind, **errors})
    return found


def _measured(
    tensor: LazyTensor, kind: str, config: TrainConfig, *, transposed: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Its errors and parameters; nothing of it is in memory after."""
    weight = tensor[...].to(device, dtype)
    if transposed:
        weight = weight.T.contiguous()
    held = quantised(weight, kind, double_quant=config.double_quant)
    return _errors(weight, held) | {"parameters": weight.numel()}


def quantised(weight: torch.Tensor, kind: str, *, double_quant: bool) -> torch.Tensor:
    """The weight [outputs, inputs] after the way into nf4, fp4 or int8 and back, in its own number type."""
    if kind == "int8":
        held = in_int8(weight)
        return held.data.to(weight.dtype).mul_(held.SCB[:, None] / 127)  # as quantising.Int8Linear has it
    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type=kind)
    return dequantize_4bit(packed, state)


def _errors(weight: torch.Tensor, held: torch.Tensor) -> dict[str, float]:
    lost, whole, largest = 0.0, 0.0, 0.0
    for begin in range(0, len(weight), ROWS):
        original = weight[begin : begin + ROWS].float()
        apart = original - held[begin : begin + ROWS].float()
        lost += apart.square().sum(dtype=torch.float64).item()
        whole += original.square().sum(dtype=torch.float64).item()
        largest = max(largest, apart.abs().max().item())
    return {"relative_error": math.sqrt(lost / whole) if whole else 0.0, "max_error": largest}


def _described(folder: Path) -> PreTrainedModel:
    """The model of the folder's config, without weights."""
    kind, config = causal_language_model(folder)
    with torch.device("meta"):
        model = kind._from_config(config)
    model.tie_weights()
    return model


def _tensors(shards: Shards, model: PreTrainedModel) -> dict[str, str]:
    """Module -> the folder's tensor that is its weight, by the names that transformers gives them as it loads."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, found = model.state_dict(), {}
    for key in shards:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, converter = key, None
        if converter is None and name in state:
            found[name.removesuffix(".weight")] = key
    return found
