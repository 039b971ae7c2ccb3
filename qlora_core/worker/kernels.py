"""What fused decoder layers compute between products of matrices: Triton on a GPU, the same in plain torch elsewhere."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit

from qlora_core.worker.packed import Packed


def _fast(tensor: torch.Tensor) -> Any:
    """The Triton kernels, where the tensor lies on a GPU."""
    if not tensor.is_cuda:
        return None
    from qlora_core.worker import triton_kernels

    return triton_kernels


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """silu(gate) * up of [tokens, gate and up side by side] into `out`."""
    if fast := _fast(gate_up):
        return fast.swiglu(gate_up, out)
    gate, up = gate_up.chunk(2, dim=1)
    out.copy_(F.silu(gate) * up)


def swiglu_backward_(gate_up: torch.Tensor, activated: torch.Tensor) -> None:
    """Given the gradient of silu(gate) * up in `activated`: `gate_up` becomes its own gradient, `activated` the product
    itself. In place, since both tensors are among the largest of a layer."""
    if fast := _fast(gate_up):
        return fast.swiglu_backward_(gate_up, activated)
    gate, up = (half.clone() for half in gate_up.chunk(2, dim=1))
    share, of_gate, of_up = torch.sigmoid(gate), *gate_up.chunk(2, dim=1)
    of_gate.copy_(activated * up * share * (1 + gate * (1 - share)))
    of_up.copy_(activated * gate * share)
    activated.copy_(gate * share * up)


def rotate(
    source: torch.Tensor,
    target: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    backward: bool = False,
) -> None:
    """Rotary position embedding of the first `heads` heads of [tokens, heads x head_dim] into `target`, which may be
    `source`; `cos` and `sin` are [tokens, head_dim], their halves alike. Backward: the gradient's way back."""
    if fast := _fast(source):
        return fast.rotate(source, target, cos, sin, heads=heads, backward=backward)
    tokens, width = cos.shape
    x = source[:, : heads * width].reshape(tokens, heads, width)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, -first) if backward else (-second, first), dim=-1)
    target[:, : heads * width] = (x * cos[:, None] + turned * sin[:, None]).flatten(1)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, out: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm of x [tokens, hidden] into `out`; returns reciprocal root mean squares [tokens, 1] in fp32. With `added`, x
    becomes x + added first."""
    if fast := _fast(x):
        return fast.norm(x, weight, epsilon, out, added=added)
    if added is not None:
        x += added
    rstd = (x.float().pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    out.copy_(x.float() * rstd * weight.float())
    return rstd


def norm_backward_(
    gradient: torch.Tensor, normed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> None:
    """Add to `gradient`, that of x, what comes back through rms_norm, whose output has the gradient `normed`."""
    if fast := _fast(x):
        return fast.norm_backward_(gradient, normed, x, weight, rstd)
    weighted, unit = normed.float() * weight.float(), x.float() * rstd
    gradient += (rstd * (weighted - unit * (weighted * unit).mean(dim=-1, keepdim=True))).to(gradient.dtype)


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, gradient: bool = True
) -> torch.Tensor:
    """Losses [rows] in fp32; with `gradient`, `logits` [rows, vocabulary] become `scale` times their gradients."""
    if fast := _fast(logits):
        return fast.cross_entropy_(logits, targets, scale=scale, gradient=gradient)
    chances = logits.float().log_softmax(dim=-1)
    losses = -chances.gather(1, targets[:, None])[:, 0]
    if gradient:
        of_logits = chances.exp_()
        of_logits[torch.arange(len(targets)), targets] -= 1
        logits.copy_(of_logits * scale)
    return losses


def dequantize(joined: Packed, out: torch.Tensor, b: torch.Tensor | None) -> None:
    """4-bit weights in the number type of `out`, [outputs, inputs + ranks]; in the last columns, where there are any, b
    [outputs, rank] of each layer beside its rows, block by block, and zeros."""
    if fast := _fast(out):
        return fast.dequantize(joined, out, b)
    width, first = joined.state.shape[1], 0
    out[:, width:] = 0
    for number, weight in enumerate(joined.weights):
        rows = slice(first, first + weight.quant_state.shape[0])
        out[rows, :width] = dequantize_4bit(weight.data, weight.quant_state)
        if b is not None:
            begin = width + number * b.shape[1]
            out[rows, begin : begin + b.shape[1]] = b[rows]
        first = rows.stop


def dropout(x: torch.Tensor, share: float, seed: int, *, onto: torch.Tensor | None = None) -> torch.Tensor:
    """x with that share of its elements dropped, the others scaled up; the seed decides which. Added to `onto` where given.
    Nothing is remembered: the backward pass draws the same again."""
    if fast := _fast(x):
        return fast.dropout(x, share, seed, onto=onto)
    chance = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    kept = torch.where(chance >= share, x / (1 - share), 0)
    return kept if onto is None else onto.add_(kept)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: "Rows", *, scale: float, window: int | None
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Causal attention inside each row of a pass; q [tokens, heads, width], k and v with as many or fewer heads. Returns the
    output, as q, and what the backward pass needs of it. `window`: tokens that one sees, itself among them."""
    if q.is_cuda and rows.are_full and window is None:
        return _dense_attention(q, k, v, rows, scale)
    if q.is_cuda:
        out, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, rows.begins, rows.begins, rows.longest, rows.longest, 0.0, True, False,
            scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )  # fmt: skip
        return out, (log_sum, state, unused)
    return torch.cat([_plain_attention(*row, scale, window) for row in rows.of(q, k, v)]), ()


def attention_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[Any, ...],
    rows: "Rows",
    *,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    if q.is_cuda and rows.are_full and window is None:
        return _dense_attention_backward(gradient, q, k, v, out, saved, rows, scale)
    if q.is_cuda:
        log_sum, state, unused = saved
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, log_sum, rows.begins, rows.begins, rows.longest, rows.longest, 0.0, True, state, unused,
            scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )  # fmt: skip
    with torch.enable_grad():
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        again = torch.cat([_plain_attention(*row, scale, window) for row in rows.of(*inputs)])
    return torch.autograd.grad(again, inputs, gradient)


def _dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: "Rows", scale: float
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """cuDNN's, up to twice as fast as FlashAttention 2 on an H100; it builds a plan for each shape, so for full rows only."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *rows.batched(q, k, v), None, True, 0.0, True, False, scale=scale
    )
    return found[0].transpose(1, 2).flatten(0, 1), found[1:8]


def _dense_attention_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[Any, ...],
    rows: "Rows",
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_sum, begins_q, begins_k, longest_q, longest_k, seed, offset = saved
    batched = rows.batched(gradient, q, k, v, out)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *batched, log_sum, seed, offset, None, begins_q, begins_k, longest_q, longest_k, 0.0, True, scale=scale
    )
    return tuple(part.transpose(1, 2).flatten(0, 1) for part in found)


def _plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
    seen = (apart >= 0) & (apart < (window or q.shape[2]))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


class Rows:
    """Where the rows of a pass begin. `begins` [rows + 1] in int32, as FlashAttention takes it. `full_length`: rows of this
    length alone make a shape that comes again and again."""

    def __init__(self, lengths: Sequence[int], device: torch.device, *, full_length: int = 0) -> None:
        self.lengths, self.longest = list(lengths), max(lengths)
        self.are_full = set(lengths) == {full_length}
        begins = [0, *accumulate(lengths)]
        self.begins = torch.tensor(begins, dtype=torch.int32, device=device)

    def of(self, *tensors: torch.Tensor) -> Any:
        """The parts of each row, row by row."""
        return zip(*(tensor.split(self.lengths) for tensor in tensors), strict=True)

    def batched(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Of full rows: [tokens, heads, width] as [rows, heads, tokens of a row, width]."""
        return [tensor.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2) for tensor in tensors]
