"""4-bit weights of layers that read the same input, joined, so that one kernel unpacks them all."""

from collections.abc import Sequence
from typing import Any

import torch


class Packed:
    """Weights of bitsandbytes' Linear4bit layers below each other, [outputs, inputs]. The layers' own tensors become views.

    `firsts` and `scale_begins` [layers]: a layer's first row, and where the scales of its absmax begin; `offsets` [layers] as
    bitsandbytes has them. Only layers quantised alike can be joined: see `can_join`.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self.weights = weights
        states = [weight.quant_state for weight in weights]
        first = self.state = states[0]
        self.blocks_a_row = first.shape[1] // first.blocksize
        self.nested = first.nested
        device = weights[0].device
        self.packed = _joined([weight.data for weight in weights])
        for weight, part in zip(weights, self.packed.split([weight.data.numel() for weight in weights]), strict=True):
            weight.data = part.view_as(weight.data)
        self.absmax = _joined([state.absmax for state in states])
        for state, part in zip(states, self.absmax.split([state.absmax.numel() for state in states]), strict=True):
            state.absmax = part
        rows = [state.shape[0] for state in states]
        self.firsts = torch.tensor([sum(rows[:number]) for number in range(len(rows))], device=device)
        self.scales = self.offsets = self.scale_begins = first.code
        if self.nested:
            counts = [state.state2.absmax.numel() for state in states]
            self.scales = _joined([state.state2.absmax for state in states])
            for state, part in zip(states, self.scales.split(counts), strict=True):
                state.state2.absmax = part
            self.scale_begins = torch.tensor([sum(counts[:number]) for number in range(len(counts))], device=device)
            self.offsets = torch.stack([state.offset for state in states])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def can_join(weights: Sequence[Any]) -> bool:
    states = [weight.quant_state for weight in weights]
    alike = {(s.quant_type, s.blocksize, s.nested, s.shape[1], s.nested and s.state2.blocksize) for s in states}
    return len(alike) == 1 and states[0].shape[1] % states[0].blocksize == 0
