"""A base and an adapter -> the state of the merged model, each of its weights made when it is written. Writes nothing itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlora_core.worker.quantising import QUANTISED, dequantized_weight, forget_quantisation, plain_layer


class Unmade(torch.Tensor):
    """A weight that has a shape and a number type and takes no memory. Whoever saves it asks for `contiguous()`, which makes it."""

    make: Callable[[], torch.Tensor]
    # What is computed from one is no weight that could be made.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def contiguous(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.make()


def merged_state(
    base: PreTrainedModel, adapter: Path, *, compute: torch.dtype, stored: torch.dtype
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """(the merged model, without the weights that are yet to be made; its state for `save_pretrained`).

    Each layer is dequantised if it was quantised, added up by PEFT in the number type `compute`, and rounded once to `stored`. Of
    `base`, which is taken apart, what is quantised stays so until then, and what is mapped from a file is not read before.
    """
    quantised = _set_aside(base, compute)
    adapted = PeftModel.from_pretrained(base, str(adapter))
    adapters = {
        name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)
    }
    plain = adapted.unload()
    head = plain.get_output_embeddings()
    if head is not None and any(layer.get_base_layer() is head for layer in adapters.values()):
        plain.config.tie_word_embeddings = False  # only the head was adapted, not the embedding of the same weights
    unmade = {}
    for name in [*adapters, *(name for name in quantised if name not in adapters)]:
        layer = plain.get_submodule(name)
        held = quantised.get(name, layer.weight)
        shape = layer.weight.shape
        layer.weight = nn.Parameter(torch.empty(shape, dtype=stored, device="meta"), requires_grad=False)
        unmade[f"{name}.weight"] = _unmade(layer, held, adapters.get(name), compute, stored)
    plain.to(stored)
    state = {name: unmade.get(name, tensor) for name, tensor in plain.state_dict().items()}
    if _is_computed_from(state, plain):
        state = {name: tensor.contiguous() for name, tensor in state.items()}
    return plain, state


def _set_aside(model: PreTrainedModel, compute: torch.dtype) -> dict[str, nn.Module]:
    """Quantised layers by their names; the model gets plain ones in their place, with one number for all weights."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QUANTISED)}
    for name, module in found.items():
        plain = plain_layer(module)
        plain.weight = nn.Parameter(torch.zeros(1, dtype=compute).expand(plain.weight.shape), requires_grad=False)
        model.set_submodule(name, plain)
    if found:
        forget_quantisation(model)
    return found


def _unmade(
    layer: nn.Module,
    held: nn.Module | torch.Tensor | None,
    adapter: LoraLayer | None,
    compute: torch.dtype,
    stored: torch.dtype,
) -> Unmade:
    @torch.no_grad()
    def make() -> torch.Tensor:
        nonlocal held
        empty = layer.weight
        # A copy: adding to what is mapped from a file would keep its pages.
        weight = (
            dequantized_weight(held, compute) if isinstance(held, nn.Module) else held.detach().to(compute, copy=True)
        )
        held = None  # whoever saves may keep this tensor, of which nobody asks twice
        if adapter is not None:
            layer.weight = nn.Parameter(weight, requires_grad=False)
            adapter.merge()
            weight = layer.weight.data
            layer.weight = empty
        return weight.to(stored).contiguous()

    found = torch.empty_like(layer.weight.data).as_subclass(Unmade)
    found.make = make
    return found


def _is_computed_from(state: dict[str, torch.Tensor], model: PreTrainedModel) -> bool:
    """Whether saving computes the file's tensors from weights that are not made yet: experts, held as one here, are many there."""
    written = revert_weight_conversion(model, dict(state))
    return any(tensor.device.type == "meta" and not isinstance(tensor, Unmade) for tensor in written.values())
