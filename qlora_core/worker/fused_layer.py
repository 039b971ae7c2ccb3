"""One decoder layer of the Llama family with few, large kernels: forward and backward written out.

x and its gradient are [tokens, hidden], all rows of a pass below each other. What is kept for the backward pass, and what is
computed again, is decided here, so memory is known before it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_core.worker import kernels
from qlora_core.worker.projections import Projection

HEAD_NORMS = ("q_norm", "k_norm")  # Qwen 3's, of each head's queries and keys before they are rotated
NORMS = ("input_layernorm", "post_attention_layernorm")


def groups_of(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """The linear layers of a decoder layer, those that read the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def head_norms_of(layer: Any) -> list[Any]:
    return [getattr(layer.self_attn, name) for name in HEAD_NORMS if hasattr(layer.self_attn, name)]


@dataclass
class Kept:
    """What the backward pass of a layer needs of its forward pass, each [tokens, …]; the rest is computed again, cheaply."""

    x: torch.Tensor
    qkv: torch.Tensor
    turned: torch.Tensor  # queries and keys, normed and rotated; where nothing is normed, `qkv` itself
    qkv_reduced: torch.Tensor  # `reduced`: what A of the adapters makes of the input
    attention: torch.Tensor
    of_attention: tuple[Any, ...]
    o_reduced: torch.Tensor
    middle: torch.Tensor  # the residual stream between attention and MLP
    gate_up: torch.Tensor | None
    gate_up_reduced: torch.Tensor
    down_reduced: torch.Tensor


@dataclass(frozen=True)
class Position:
    """What all layers of a pass share. `seed` decides what dropout drops; None without dropout."""

    rows: kernels.Rows
    cos: torch.Tensor
    sin: torch.Tensor
    seed: int | None


class FusedLayer:
    def __init__(self, layer: Any, number: int, project: Callable[..., Projection], config: Any) -> None:
        attention = layer.self_attn
        self.number = number
        self.norms, self.head_norms = (
            [(norm.weight.data, norm.variance_epsilon) for norm in norms]
            for norms in ([getattr(layer, name) for name in NORMS], head_norms_of(layer))
        )
        self.qkv, self.o, self.gate_up, self.down = (project(*group) for group in groups_of(layer))
        self.width = attention.head_dim
        self.heads, self.kv_heads = self.qkv.sizes[0] // self.width, self.qkv.sizes[1] // self.width
        # Most tell it layer by layer; Mistral reads its config, where others have it and do not heed it.
        of_config = config.sliding_window if config.model_type == "mistral" else None
        window = getattr(attention, "sliding_window", of_config)
        self.how = {"scale": attention.scaling, "window": window}

    def seeds(self, position: Position) -> list[int | None]:
        """For the dropout before each of the four projections; the same forward, backward and again."""
        if position.seed is None:
            return [None] * 4
        return [(position.seed * 1_000_003 + self.number * 4 + place) % 2**31 for place in range(4)]

    def heads_of(self, turned: torch.Tensor, qkv: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, [tokens, heads, width]."""
        parts = [*self.columns(turned)[:2], self.columns(qkv)[2]]
        return [part.unflatten(1, (-1, self.width)) for part in parts]

    def columns(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv[:, : self.qkv.outputs].split(self.qkv.sizes, dim=1)

    def turn(self, qkv: torch.Tensor, position: Position) -> torch.Tensor:
        """Queries and keys normed, where the model does so, and rotated; in place where it does not."""
        if not self.head_norms:
            kernels.rotate(qkv, qkv, position.cos, position.sin, heads=self.heads + self.kv_heads)
            return qkv
        turned = torch.empty_like(qkv)
        for part, target, norm in zip(self.columns(qkv), self.columns(turned), self.head_norms, strict=False):
            by_head = part.reshape(-1, self.width)
            kernels.rms_norm(by_head, *norm, out=by_head)
            whole, heads = by_head.view(len(qkv), -1), part.shape[1] // self.width
            kernels.rotate(whole, target, position.cos, position.sin, heads=heads)
        return turned

    def turn_back(
        self, gradients: tuple[torch.Tensor, ...], target: torch.Tensor, qkv: torch.Tensor, position: Position
    ) -> None:
        """Gradients of queries, keys and values, [tokens, heads, width], to those of what came out of the projection."""
        columns = self.columns(target)
        columns[2].copy_(gradients[2].flatten(1))
        for number, (gradient, place) in enumerate(zip(gradients[:2], columns, strict=False)):
            heads, gradient = gradient.shape[1], gradient.flatten(1)
            if not self.head_norms:
                kernels.rotate(gradient, place, position.cos, position.sin, heads=heads, backward=True)
                continue
            kernels.rotate(gradient, gradient, position.cos, position.sin, heads=heads, backward=True)
            weight, epsilon = self.head_norms[number]
            raw = self.columns(qkv)[number].reshape(-1, self.width)
            of_raw, normed = torch.zeros_like(raw), torch.empty_like(raw)
            rstd = kernels.rms_norm(raw, weight, epsilon, out=normed)
            kernels.norm_backward_(of_raw, gradient.reshape(raw.shape), raw, weight, rstd)
            place.copy_(of_raw.view_as(place))

    def forward(self, x: torch.Tensor, position: Position, *, again: bool = False) -> tuple[torch.Tensor | None, Kept]:
        """(output, what is kept); `again` in the backward pass, where the output is not needed."""
        seeds = self.seeds(position)
        qkv, qkv_reduced = self.qkv.forward(self.normed(x, 0, wide=self.qkv), seed=seeds[0])
        turned = self.turn(qkv, position)
        attention, of_attention = kernels.attention(*self.heads_of(turned, qkv), position.rows, **self.how)
        middle, o_reduced = self.o.forward_narrow(attention.flatten(1), seed=seeds[1])
        gate_up, gate_up_reduced = self.gate_up.forward(
            self.normed(middle, 1, wide=self.gate_up, added=x), seed=seeds[2]
        )
        activated = self.down.input_like(gate_up)
        kernels.swiglu(gate_up[:, : self.gate_up.outputs], activated[:, : self.down.inputs])
        if again:
            out, down_reduced = None, self.down.reduce(activated[:, : self.down.inputs], seed=seeds[3])
        else:
            out, down_reduced = self.down.forward_onto(activated, middle, seed=seeds[3])
        return out, Kept(
            x,
            qkv,
            turned,
            qkv_reduced,
            attention,
            of_attention,
            o_reduced,
            middle,
            gate_up,
            gate_up_reduced,
            down_reduced,
        )

    def normed(
        self, x: torch.Tensor, place: int, *, wide: Projection, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The norm before attention (place 0) or MLP (1), with room for x·A^T beside it. `added` is added to x first."""
        normed = wide.input_like(x)
        kernels.rms_norm(x, *self.norms[place], out=normed[:, : x.shape[1]], added=added)
        return normed

    def backward(self, gradient: torch.Tensor, kept: Kept, position: Position) -> None:
        """Turn `gradient`, that of the output, into that of x, and add to the adapters' gradients. It is [tokens, hidden +
        ranks]: the last columns are room for the gradients of x·A^T. Overwrites what was kept."""
        residual, seeds = gradient[:, : kept.x.shape[1]], self.seeds(position)
        activated, of_reduced = self.down.backward(gradient, kept.down_reduced, seed=seeds[3])
        kernels.swiglu_backward_(kept.gate_up[:, : self.gate_up.outputs], activated)
        self.down.learn(of_reduced, activated, seed=seeds[3])
        del activated, of_reduced
        of_normed, of_reduced = self.gate_up.backward(kept.gate_up, kept.gate_up_reduced, seed=seeds[2])
        kept.gate_up = None
        self.backward_of_norm(residual, of_normed, kept.middle, 1, self.gate_up, of_reduced, seeds[2])
        del of_normed, of_reduced  # a view of gate and up

        of_attention, of_reduced = self.o.backward(gradient, kept.o_reduced, seed=seeds[1])
        self.o.learn(of_reduced, kept.attention.flatten(1), seed=seeds[1])
        gradients = kernels.attention_backward(
            of_attention.view_as(kept.attention), *self.heads_of(kept.turned, kept.qkv), kept.attention, kept.of_attention,
            position.rows, **self.how,
        )  # fmt: skip
        of_qkv = torch.empty_like(kept.qkv)
        self.turn_back(gradients, of_qkv, kept.qkv, position)
        # Nothing is learnt before the first layer.
        of_normed, of_reduced = self.qkv.backward(of_qkv, kept.qkv_reduced, seed=seeds[0], wanted=self.number > 0)
        self.backward_of_norm(residual, of_normed, kept.x, 0, self.qkv, of_reduced, seeds[0])

    def backward_of_norm(
        self,
        gradient: torch.Tensor,
        of_normed: torch.Tensor | None,
        x: torch.Tensor,
        place: int,
        after: Projection,
        of_reduced: torch.Tensor,
        seed: int | None,
    ) -> None:
        """Through the norm of x to `gradient`, and A of the layers `after` it, whose input is made again."""
        normed, norm = torch.empty_like(x), self.norms[place]
        rstd = kernels.rms_norm(x, *norm, out=normed)
        after.learn(of_reduced, normed, seed=seed)
        if of_normed is not None:
            kernels.norm_backward_(gradient, of_normed, x, norm[0], rstd)
