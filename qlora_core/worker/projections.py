"""Linear layers that read the same input, with their adapters, as one matrix product forward and one backward."""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer

from qlora_core.activations import ALIGNED
from qlora_core.worker import kernels
from qlora_core.worker.packed import Packed, can_join


class Adapters:
    """The weights and gradients of all adapters, in few large tensors: one kernel copies or clears them all.

    The modules' own parameters become views, so that optimizer, checkpoints and PEFT go on as before. Products are made with
    copies in the number type of the base, of B times the adapter's scale; the fp32 weights are what is learnt. The A of layers
    that read the same input (a group) lie below each other.
    """

    def __init__(self, groups: Sequence[Sequence[LoraLayer]], dtype: torch.dtype) -> None:
        layers = [layer for group in groups for layer in group]
        self.scale, device = layers[0].scaling["default"], layers[0].lora_A["default"].weight.device
        of_a = [layer.lora_A["default"].weight for layer in layers]
        of_b = [layer.lora_B["default"].weight for layer in layers]
        self.parameters, self.begins, elements = [*of_a, *of_b], {}, 0
        for parameter in self.parameters:
            self.begins[id(parameter)] = elements
            elements += parameter.numel()
        self.weights, self.gradients = (torch.zeros(elements, device=device) for _ in range(2))
        self.copies = torch.zeros(elements, dtype=dtype, device=device)
        for parameter in self.parameters:
            parameter.data = self._view(self.weights, parameter).copy_(parameter.data)
            parameter.grad = self._view(self.gradients, parameter)
        # What an optimizer learns: all A and all B, each one tensor.
        all_of_a = sum(parameter.numel() for parameter in of_a)
        self.flat = [torch.nn.Parameter(part) for part in self.weights.split([all_of_a, elements - all_of_a])]
        for whole, part in zip(self.flat, self.gradients.split([all_of_a, elements - all_of_a]), strict=True):
            whole.grad = part
        self.scaled = self.copies[all_of_a:]

    def _view(self, flat: torch.Tensor, parameter: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        begin, shape = self.begins[id(parameter)], (rows or len(parameter), parameter.shape[1])
        return flat[begin : begin + shape[0] * shape[1]].view(shape)

    def a_of(self, group: Sequence[LoraLayer]) -> tuple[torch.Tensor, torch.Tensor]:
        """(copy, gradient) of the group's A, [sum of ranks, inputs]."""
        first, rows = group[0].lora_A["default"].weight, sum(len(layer.lora_A["default"].weight) for layer in group)
        return self._view(self.copies, first, rows), self._view(self.gradients, first, rows)

    def b_of(self, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """(copy times scale, gradient) of the layer's B, [outputs, rank]."""
        parameter = layer.lora_B["default"].weight
        return self._view(self.copies, parameter), self._view(self.gradients, parameter)

    def all_b_of(self, group: Sequence[LoraLayer]) -> torch.Tensor | None:
        """Copies times scale of the group's B below each other, [outputs, rank]; None where ranks differ."""
        weights = [layer.lora_B["default"].weight for layer in group]
        if len({weight.shape[1] for weight in weights}) != 1:
            return None
        return self._view(self.copies, weights[0], sum(len(weight) for weight in weights))

    def refresh(self) -> None:
        """What the optimizer changed, into the copies."""
        self.copies.copy_(self.weights)
        self.scaled.mul_(self.scale)


class Projection:
    """Layers that read the same input, with their adapters, as one matrix

        [ W  B ]   W: base weights below each other, [outputs, inputs]; A, [ranks, inputs]
        [ A  . ]   B: times the adapters' scale, block by block, [outputs, ranks]

    Forward, [x  x·A^T] times its upper rows is the outputs; backward, [gradient  gradient·B] times its left columns is the
    gradient of x: one product each, where PEFT makes several and adds them up. Of 4-bit layers the matrix is made anew each
    time, in a scratch tensor that all projections share.
    """

    def __init__(self, layers: Sequence[Any], adapters: Adapters, *, dropout: float) -> None:
        self.bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.adapters, self.dropout, self.dtype = adapters, dropout, adapters.copies.dtype
        self.inputs, self.sizes = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.outputs, self.device = sum(self.sizes), self.bases[0].weight.device
        adapted = [layer for layer in layers if isinstance(layer, LoraLayer)]
        self.a, self.a_gradient = adapters.a_of(adapted) if adapted else (None, None)
        # Of each layer: the columns of its outputs, and of its adapter those of its ranks, B and its gradient.
        self.pieces, self.ranks, begin = [], 0, 0
        for layer, size in zip(layers, self.sizes, strict=True):
            b, b_gradient = adapters.b_of(layer) if isinstance(layer, LoraLayer) else (None, None)
            ranks = slice(self.ranks, self.ranks + (0 if b is None else b.shape[1]))
            self.pieces.append((slice(begin, begin + size), ranks, b, b_gradient))
            self.ranks, begin = ranks.stop, begin + size
        self.room = -(-self.ranks // ALIGNED) * ALIGNED  # ranks, and columns of zeros where they are not aligned
        self.shape = self.outputs + self.room, self.inputs + self.room
        self.bias = self._bias()
        weights = [base.weight for base in self.bases]
        self.is_packed = [isinstance(base, Linear4bit) for base in self.bases]
        self.joined = Packed(weights) if all(self.is_packed) and can_join(weights) else None
        # B of all layers below each other, where all have adapters: of one rank, they lie so.
        self.all_of_b = adapters.all_b_of(adapted) if len(adapted) == len(layers) else None
        self.whole = None if any(self.is_packed) else self._hold()
        self.is_held = self.whole is not None

    def _bias(self) -> torch.Tensor | None:
        biases = [getattr(base, "bias", None) for base in self.bases]
        if all(bias is None for bias in biases):
            return None
        whole = torch.zeros(self.outputs, dtype=self.dtype, device=self.device)
        for bias, (columns, *_) in zip(biases, self.pieces, strict=True):
            if bias is not None:
                whole[columns] = bias.data.to(self.dtype)
        return whole

    def _hold(self) -> torch.Tensor:
        """16-bit weights moved into the matrix, of which the layers' own become views: no weight is there twice."""
        held = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for base, (rows, *_) in zip(self.bases, self.pieces, strict=True):
            held[rows, : self.inputs] = base.weight.data
            base.weight.data = held[rows, : self.inputs]
        return held

    def use_scratch(self, scratch: torch.Tensor) -> None:
        if not self.is_held:
            self.whole = scratch[: self.shape[0] * self.shape[1]].view(self.shape)
        self.upper, self.left = self.whole[: self.outputs], self.whole[:, : self.inputs]
        self.of_b = self.upper[:, self.inputs :]

    def places_of_b(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(part of the matrix, what belongs there) of each B."""
        return [
            (self.whole[rows, self.inputs + ranks.start : self.inputs + ranks.stop], b)
            for rows, ranks, b, _ in self.pieces
            if b is not None
        ]

    def place_of_a(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [] if self.a is None else [(self.left[self.outputs : self.outputs + self.ranks], self.a)]

    def fill(self, *, with_a: bool) -> None:
        """Make the matrix, where it is not held."""
        if self.is_held:
            return
        if self.joined:
            kernels.dequantize(self.joined, self.upper, self.all_of_b)
        else:
            self.of_b.zero_()
            for base, packed, (rows, *_) in zip(self.bases, self.is_packed, self.pieces, strict=True):
                weight = dequantize_4bit(base.weight.data, base.weight.quant_state) if packed else base.weight.data
                self.upper[rows, : self.inputs] = weight
        if not self.joined or self.all_of_b is None:
            for place, b in self.places_of_b():
                place.copy_(b)
        if with_a:
            if self.room > self.ranks:
                self.left[self.outputs :] = 0
            for place, a in self.place_of_a():
                place.copy_(a)

    def input_like(self, x: torch.Tensor) -> torch.Tensor:
        """Room for an input of as many tokens and its x·A^T: [tokens, inputs + ranks]."""
        return x.new_empty(len(x), self.shape[1])

    def reduce(self, x: torch.Tensor, *, seed: int | None) -> torch.Tensor:
        """x·A^T [tokens, ranks], after dropout where there is any."""
        reduced = x.new_zeros(len(x), self.room) if self.room > self.ranks else x.new_empty(len(x), self.room)
        if self.a is not None:
            torch.mm(self.dropped(x, seed), self.a.T, out=reduced[:, : self.ranks])
        return reduced

    def _reduce_inside(self, wide: torch.Tensor, *, seed: int | None) -> torch.Tensor:
        """x·A^T, also written into the last columns of [x ...]."""
        reduced = self.reduce(wide[:, : self.inputs], seed=seed)
        wide[:, self.inputs :] = reduced
        return reduced

    def forward(self, wide: torch.Tensor, *, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[x ...] -> (outputs, x·A^T). The outputs are the first columns of a tensor that has room for `backward`."""
        reduced = self._reduce_inside(wide, seed=seed)
        out = wide.new_empty(len(wide), self.shape[0])
        self.fill(with_a=False)
        torch.mm(wide, self.upper.T, out=out[:, : self.outputs])
        if self.bias is not None:
            out[:, : self.outputs] += self.bias
        return out, reduced

    def forward_narrow(self, x: torch.Tensor, *, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` of a single layer, where x comes without room beside it: (outputs, x·A^T)."""
        self.fill(with_a=False)
        reduced, weight = self.reduce(x, seed=seed), self.upper[:, : self.inputs]
        # The small product first: the large one adds it up on the way, which costs next to nothing.
        out = x @ weight.T if self.a is None else (reduced @ self.of_b.T).addmm_(x, weight.T)
        if self.bias is not None:
            out += self.bias
        return out, reduced

    def forward_onto(
        self, wide: torch.Tensor, residual: torch.Tensor, *, seed: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[x ...] -> (residual + outputs, x·A^T)"""
        reduced = self._reduce_inside(wide, seed=seed)
        self.fill(with_a=False)
        out = torch.addmm(residual, wide, self.upper.T)
        if self.bias is not None:
            out += self.bias
        return out, reduced

    def dropped(self, x: torch.Tensor, seed: int | None) -> torch.Tensor:
        return kernels.dropout(x, self.dropout, seed) if seed is not None and self.dropout and self.ranks else x

    def backward(
        self, gradient: torch.Tensor, reduced: torch.Tensor, *, seed: int | None, wanted: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(gradient of x where it is wanted, gradient of x·A^T); B's gradient is added to. `gradient` is [tokens, outputs + ranks
        or more], of the outputs; the gradient of x·A^T is written beside them, and is a view of it."""
        outputs, room = gradient[:, : self.outputs], gradient[:, self.outputs : self.shape[0]]
        self.fill(with_a=True)
        of_reduced = torch.mm(outputs, self.of_b, out=room)
        for columns, ranks, b, b_gradient in self.pieces:
            if b is not None:
                add_product_(b_gradient, outputs[:, columns].T, reduced[:, ranks], self.adapters.scale)
        if not wanted:
            return None, of_reduced
        if seed is None or not self.dropout or self.a is None:
            return gradient[:, : self.shape[0]] @ self.left, of_reduced
        of_x = outputs @ self.left[: self.outputs]
        kernels.dropout(of_reduced[:, : self.ranks] @ self.a, self.dropout, seed, onto=of_x)
        return of_x, of_reduced

    def learn(self, of_reduced: torch.Tensor, x: torch.Tensor, *, seed: int | None) -> None:
        """A's gradient, added to, from that of x·A^T."""
        if self.a is not None:
            add_product_(self.a_gradient, of_reduced[:, : self.ranks].T, self.dropped(x, seed), 1.0)


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left·right, where `total` may be of fp32 and the factors of 16 bits."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
