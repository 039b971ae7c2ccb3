"""What quantising a base loses, layer by layer: each weight matrix read, quantised and compared, and none kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import PreTrainedModel

from qlora_core import precision, selectors
from qlora_core.config import TrainConfig
from qlora_core.targets import Layer
from qlora_core.worker.architecture import causal_language_model, linear_layers
from qlora_core.worker.quantising import in_int8
from qlora_core.worker.shards import Shards

BLOCK = 64  # weights that share a constant, as bitsandbytes' layers have it


@torch.no_grad()
def quantisation_error(
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Of each linear layer that the config quantises: relative error ‖W - Q(W)‖ / ‖W‖ (Frobenius), largest error of a weight,
    type and number of weights. W is the weight in `dtype`, as the 16-bit base holds it. One matrix is in memory at a time.

    `report(done, total)` is called before each matrix and may raise to end it. Matrices that the folder holds under other names
    than the model's are left out.
    """
    layers = _layers(folder)
    bits = precision.bits(layers, config)
    found = []
    with Shards(folder) as shards:
        names = _names(shards, bits)
        for done, layer in enumerate(layer for layer in layers if layer.name in names):
            report(done, len(names))
            weight = shards[names[layer.name]][...].to(device, dtype)
            if tuple(weight.shape) != (layer.out_features, layer.in_features):
                weight = weight.T.contiguous()  # GPT-2's Conv1D
            kind = "int8" if bits[layer.name] == 8 else config.quant_type
            found.append(_errors(layer, kind, weight, quantised(weight, kind, double_quant=config.double_quant)))
    return found


def quantised(weight: torch.Tensor, kind: str, *, double_quant: bool) -> torch.Tensor:
    """The weight [outputs, inputs] after the way into nf4, fp4 or int8 and back, in its own number type."""
    if kind == "int8":
        held = in_int8(weight)
        return (held.data.float() * (held.SCB[:, None] / 127)).to(weight.dtype)
    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type=kind)
    return dequantize_4bit(packed, state)


def _errors(layer: Layer, kind: str, weight: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    apart = weight.float() - held.float()
    return {
        "layer": selectors.layer_number(layer.name),
        "module": layer.last_name,
        "type": kind,
        "relative_error": (apart.norm() / weight.float().norm()).item(),
        "max_error": apart.abs().max().item(),
        "parameters": weight.numel(),
    }


def _layers(folder: Path) -> Sequence[Layer]:
    kind, config = causal_language_model(folder)
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
    model.tie_weights()
    return linear_layers(model)


def _names(shards: Shards, wanted: dict[str, int]) -> dict[str, str]:
    """Module -> its tensor in the folder; older folders leave the first part of a name out."""
    found = {}
    for name in wanted:
        for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
            if key in shards:
                found[name] = key
                break
    return found
