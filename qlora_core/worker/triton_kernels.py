"""Triton kernels of the fused decoder layers. Imported on a GPU only; `kernels` says what each computes.

Products of matrices, attention and norms come from torch. What is here is what torch has no single kernel for: between two
products each of these reads and writes its tensors once, where a chain of torch operators would do so three to seven times.
"""

import torch
import triton
import triton.language as tl

from qlora_core.worker.packed import Packed

BLOCK = 1024
BLOCKS = 64  # of quantised weights, each 64 long
VOCABULARY_BLOCK = 8192


@triton.jit
def _swiglu(gate_up, activated, row_stride, out_stride, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * row_stride + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + at, mask=inside).to(tl.float32)
    tl.store(activated + row * out_stride + at, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _swiglu_backward(gate_up, activated, row_stride, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate_at = gate_up + row * row_stride + at
    activated_at = activated + row * width + at
    gate = tl.load(gate_at, mask=inside).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside).to(tl.float32)
    gradient = tl.load(activated_at, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(activated_at, silu * up, mask=inside)
    tl.store(gate_at, gradient * up * share * (1 + gate * (1 - share)), mask=inside)
    tl.store(gate_at + width, gradient * silu, mask=inside)


@triton.jit
def _rotate(source, target, source_stride, target_stride, cos, sin, sign, heads, half,
            HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    place = head * (2 * half) + at
    first = tl.load(source + row * source_stride + place, mask=inside).to(tl.float32)
    second = tl.load(source + row * source_stride + place + half, mask=inside).to(tl.float32)
    c = tl.load(cos + row * (2 * half) + at, mask=at < half).to(tl.float32)
    s = tl.load(sin + row * (2 * half) + at, mask=at < half).to(tl.float32) * sign
    tl.store(target + row * target_stride + place, first * c - second * s, mask=inside)
    tl.store(target + row * target_stride + place + half, second * c + first * s, mask=inside)


@triton.jit
def _norm(x, added, weight, out, rstd, out_stride, width, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = (values + tl.load(added + row * width + at, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype.element_ty
        )
        tl.store(x + row * width + at, total, mask=inside)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + epsilon)
    tl.store(rstd + row, scale)
    normed = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, normed, mask=inside)


@triton.jit
def _norm_backward(gradient, normed, x, weight, rstd, gradient_stride, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    of_normed = tl.load(normed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    weighted = of_normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row)
    unit = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale
    of_x = scale * (weighted - unit * (tl.sum(weighted * unit, 0) / width))
    place = gradient + row * gradient_stride + at
    tl.store(place, tl.load(place, mask=inside).to(tl.float32) + of_x, mask=inside)


@triton.jit
def _dequantize(packed, codes, absmax, absmax_codes, scales, offsets, firsts, scale_begins, out, out_stride, blocks_a_row,
                b, rank, ranks, NESTED: tl.constexpr, LAYERS: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside, number = block < blocks_a_row, row * blocks_a_row + block
    layer = 0
    for following in tl.static_range(1, LAYERS):
        layer += (row >= tl.load(firsts + following)).to(tl.int32)
    scale = tl.load(absmax + number, mask=inside, other=0)
    if NESTED:
        of_layer = number - tl.load(firsts + layer) * blocks_a_row
        of_absmax = tl.load(scales + tl.load(scale_begins + layer) + of_layer // 256, mask=inside, other=0.0)
        scale = tl.load(absmax_codes + scale.to(tl.int32)) * of_absmax + tl.load(offsets + layer)
    pairs = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(packed + pairs, mask=inside[:, None], other=0).to(tl.int32)
    values = tl.join(tl.load(codes + (pair >> 4)), tl.load(codes + (pair & 15)))
    values = tl.reshape(values, (BLOCKS, BLOCK)) * scale[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + row * out_stride + at, values, mask=inside[:, None])
    if (RANKS > 0) and (tl.program_id(1) == 0):
        column = tl.arange(0, RANKS)
        own = (column >= layer * rank) & (column < layer * rank + rank)
        of_b = tl.load(b + row * rank + column - layer * rank, mask=own, other=0.0)
        tl.store(out + row * out_stride + blocks_a_row * BLOCK + column, of_b, mask=column < ranks)


@triton.jit
def _cross_entropy(logits, targets, losses, columns, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    aimed = tl.load(logits + target).to(tl.float32)  # before the second loop writes over it
    largest, total = -float("inf"), 0.0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - aimed)
    if GRADIENT:
        for begin in range(0, columns, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            values = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            of_logits = (tl.exp(values - log_sum) - tl.where(at == target, 1.0, 0.0)) * scale
            tl.store(logits + at, of_logits, mask=at < columns)


@triton.jit
def _dropout(x, out, share, seed, x_stride, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    # Four random numbers come at the price of one; which element gets which does not matter, if it is always the same.
    number = (row * tl.num_programs(1) + tl.program_id(1)) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.rand4x(seed, number.to(tl.int32))
    chance = tl.reshape(tl.join(tl.join(first, second), tl.join(third, fourth)), (BLOCK,))
    kept = chance >= share
    values = tl.load(x + row * x_stride + at, mask=inside).to(tl.float32)
    values = tl.where(kept, values / (1 - share), 0.0)
    if ADD:
        values += tl.load(out + row * width + at, mask=inside).to(tl.float32)
    tl.store(out + row * width + at, values, mask=inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    rows, width = out.shape
    _swiglu[(rows, triton.cdiv(width, BLOCK))](gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK)


def swiglu_backward_(gate_up: torch.Tensor, activated: torch.Tensor) -> None:
    rows, width = activated.shape
    _swiglu_backward[(rows, triton.cdiv(width, BLOCK))](gate_up, activated, gate_up.stride(0), width, BLOCK=BLOCK)


def rotate(
    source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, backward: bool
) -> None:
    half = cos.shape[-1] // 2
    _rotate[(source.shape[0],)](
        source, target, source.stride(0), target.stride(0), cos, sin, -1.0 if backward else 1.0, heads, half,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half), num_warps=8,
    )  # fmt: skip


def norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor, *, added: torch.Tensor | None
) -> torch.Tensor:
    rows, width = x.shape
    rstd = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _norm[(rows,)](
        x, x if added is None else added, weight, out, rstd, out.stride(0), width, epsilon,
        ADD=added is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return rstd


def norm_backward_(
    gradient: torch.Tensor, normed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> None:
    rows, width = x.shape
    _norm_backward[(rows,)](
        gradient, normed, x, weight, rstd, gradient.stride(0), width, BLOCK=triton.next_power_of_2(width), num_warps=8
    )


def dequantize(joined: Packed, out: torch.Tensor, b: torch.Tensor | None) -> None:
    rows, state = len(out), joined.state
    ranks = out.shape[1] - state.shape[1]
    _dequantize[(rows, triton.cdiv(joined.blocks_a_row, BLOCKS))](
        joined.packed, state.code, joined.absmax, state.state2.code if joined.nested else state.code, joined.scales,
        joined.offsets, joined.firsts, joined.scale_begins, out, out.stride(0), joined.blocks_a_row,
        state.code if b is None else b, 0 if b is None else b.shape[1], ranks,
        NESTED=joined.nested, LAYERS=len(joined.weights), RANKS=triton.next_power_of_2(ranks) if ranks else 0,
        BLOCKS=BLOCKS, BLOCK=state.blocksize,
        enable_fp_fusion=False,  # bitsandbytes rounds between product and sum; one rounding less would be another weight
    )  # fmt: skip


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, scale: float, gradient: bool) -> torch.Tensor:
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, columns, scale, GRADIENT=gradient, BLOCK=VOCABULARY_BLOCK, num_warps=16
    )
    return losses


def dropout(x: torch.Tensor, share: float, seed: int, *, onto: torch.Tensor | None) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device) if onto is None else onto
    _dropout[(rows, triton.cdiv(width, BLOCK))](
        x, out, share, seed, x.stride(0), width, ADD=onto is not None, BLOCK=BLOCK
    )
    return out
