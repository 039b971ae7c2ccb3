"""What a forward and backward pass keeps and needs, term by term, in bytes. Pure sums over a model's sizes; knows no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qlora_core import precision
from qlora_core.config import TrainConfig
from qlora_core.selectors import layer_number
from qlora_core.targets import Architecture, Layer

# Of the fused layers, which take both from here. Logits of so many bytes are made at once: enough to fill a GPU, little beside
# the layers. Columns for adapters are a multiple of 8: rows that FlashAttention and the tensor cores read begin at multiples of
# 16 bytes.
LOGITS_BYTES, ALIGNED = 2**28, 8
# Their query and key have norms of their own, which keep what they read.
HEAD_NORMED = ("qwen3",)
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class PassBytes:
    layer: int  # what a layer that is not recomputed keeps from its forward to its backward pass
    layer_input: int  # the part of it that a recomputed layer keeps
    around: int  # kept outside the layers
    working: int  # what the backward pass of one layer needs beside what is kept
    loss: int  # what the loss needs, when every layer's activations are there
    buffers: int = 0  # allocated once, for all passes
    copies: int = 0  # of the adapters beside 16-bit weights


def fused_pass(
    shape: Architecture, config: TrainConfig, targeted: Sequence[Layer], tokens: int, supervised_share: float, size: int
) -> PassBytes:
    """Our own decoder layers, a term for each tensor; `size` bytes a number."""
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.attention_heads
    query, key_value = heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    # Columns of x·A^T, beside the outputs of the matrices that share an input.
    sharing = QKV, ("o_proj",), GATE_UP, ("down_proj",)
    qkv, o, gate_up, down = (columns(targeted, config, shape, names) for names in sharing)
    groups = (
        (hidden, query + 2 * key_value, qkv),
        (query, hidden, o),
        (hidden, 2 * inner, gate_up),
        (inner, hidden, down),
    )
    bits = precision.bits_held(shape.layers, config)
    # In how many decoder layers they are made anew for each product: where one of them is in 4 bits.
    packed = [len({layer_number(name) for name in bits if name.rpartition(".")[2] in names}) for names in sharing]
    turned = query + 2 * key_value + qkv if shape.model_type in HEAD_NORMED else 0
    layer = (
        hidden * size  # its input
        + (query + 2 * key_value + qkv + turned) * size  # query and key, normed and rotated, and value
        + query * size + heads * 4  # what attention returns, and the logarithms of its sums
        + hidden * size  # the residual stream between attention and MLP
        + (2 * inner + gate_up) * size
        + (qkv + o + gate_up + down) * size  # x·A^T
    )  # fmt: skip
    gradient = (hidden + max(o, down)) * size  # that of the residual stream
    in_mlp = (inner + down) * size  # the MLP's activation, made again
    in_attention = (
        (hidden + query + o) * size  # gradients of what the MLP read, and of what attention returned
        + (query + 2 * key_value) * size  # of query, key and value
        + query * 4 + heads * 4  # FlashAttention adds up query's in fp32,
        + (2 * query * size if key_value < query else 0)  # and key's and value's for each head of query
        - (2 * inner + gate_up) * size  # gate and up are gone by then
    )  # fmt: skip
    learnt = supervised_share * tokens
    states = learnt * hidden * size
    logits = min(learnt * shape.vocabulary * size, LOGITS_BYTES)  # their gradient takes their place
    loss = tokens * hidden * size + 2 * states + max(logits, tokens * gradient + states)
    return PassBytes(
        layer=round(tokens * layer),
        layer_input=tokens * hidden * size,
        around=tokens * (2 * shape.head_dim * size + 2 * 8),  # cosines and sines of the positions; ids
        working=round(tokens * (gradient + max(in_mlp, in_attention))),
        loss=round(loss),
        buffers=max((_matrix_bytes(group, size) for group, n in zip(groups, packed, strict=True) if n), default=0),
        copies=sum(
            (shape.layer_count - n) * _beside_bytes(group, size) for group, n in zip(groups, packed, strict=True)
        ),
    )


def columns(targeted: Sequence[Layer], config: TrainConfig, shape: Architecture, names: Sequence[str]) -> int:
    """Ranks of a layer's adapters on these modules, which share an input."""
    modules = sum(layer.last_name in names for layer in targeted)
    return -(-modules * config.rank // (max(1, shape.layer_count) * ALIGNED)) * ALIGNED


Group = tuple[int, int, int]


def _matrix_bytes(group: Group, size: int) -> int:
    """Weights that share an input (inputs, outputs, ranks), dequantised, with A below them and B beside."""
    inputs, outputs, ranks = group
    return size * (inputs + ranks) * (outputs + ranks)


def _beside_bytes(group: Group, size: int) -> int:
    """Of that matrix what is not weights."""
    return _matrix_bytes(group, size) - size * group[0] * group[1]


def plain_pass(
    shape: Architecture,
    config: TrainConfig,
    targeted: Sequence[Layer],
    tokens: int,
    supervised_share: float,
    size: int,
    *,
    masked: int,
    is_gpu: bool,
) -> PassBytes:
    """transformers' layers with PEFT's adapters, autocast to 16 bits or all in fp32; `size` bytes a number. `masked`: columns
    of the mask that keeps rows apart, 0 without one. Each term was checked against what autograd saves."""
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, max(1, shape.layer_count)
    query = shape.attention_heads * shape.head_dim
    key_value = (
        query if masked else shape.key_value_heads * shape.head_dim
    )  # with a mask repeated for each head of query
    bits = precision.bits_held(shape.layers, config)
    layer = (
        2 * (hidden * 4 + 4)  # the input of each norm, in fp32, and its scale
        + 2 * (query + key_value) * size  # query, key and value, and what attention returns
        + masked * size + shape.attention_heads * 4
        + 3 * inner * size  # gate, up and the activated gate
        + _adapter_inputs(targeted, config, size, bits, is_gpu=is_gpu) / layers
        + len(targeted) / layers * config.rank * size  # x·A^T
    )  # fmt: skip
    outputs, squares = sum(layer.out_features for layer in targeted), sum(layer.in_features**2 for layer in targeted)
    dora = (
        size * (2 * tokens * outputs + squares) / layers if config.use_dora else 0
    )  # PEFT gets B·A from a unit matrix
    gradients = 3 * inner * size + inner * (4 + size) + 3 * hidden * 4  # PEFT casts to fp32 and back
    weights = size * max(
        (layer.elements for layer in shape.layers if layer.name in bits), default=0
    )  # dequantised, one at a time
    learnt = supervised_share * tokens
    # In fp32 the log-probabilities of all tokens and two gradients of them.
    loss = learnt * shape.vocabulary * 3 * 4 + 2 * learnt * hidden * size
    return PassBytes(
        layer=round(tokens * layer + dora),
        layer_input=tokens * hidden * size,
        around=tokens
        * (hidden * (4 + size) + 2 * shape.head_dim * size),  # the last norm's input and output; positions
        working=round(tokens * gradients + weights),
        loss=round(loss),
    )


def _adapter_inputs(
    targeted: Sequence[Layer], config: TrainConfig, size: int, quantised: Collection[str], *, is_gpu: bool
) -> int:
    """Bytes a token that adapters keep of their inputs. The layers of a block share one; but in 16 bits PEFT casts each its own,
    beside quantised layers on a CPU only, and so does dropout, with a mask beside it."""
    if config.lora_dropout > 0:
        return sum(layer.in_features * (size + (1 if is_gpu else 4)) for layer in targeted)
    alone, shared = 0, {}
    for layer in targeted:
        if size == 2 and not (is_gpu and layer.name in quantised):
            alone += layer.in_features
        else:
            shared[layer.name.rpartition(".")[0], layer.in_features] = layer.in_features
    return size * (alone + sum(shared.values()))
