"""What a forward and backward pass keeps and needs, term by term, in bytes. Pure sums over a model's sizes; knows no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_core.config import TrainConfig
from qlora_core.targets import Architecture, Layer

# Rows of logits that the fused loss makes at a time.
LOSS_ROWS = 2048


@dataclass(frozen=True)
class PassBytes:
    layer: int  # what a layer that is not recomputed keeps for its backward pass
    around: int  # kept outside the layers
    working: int  # of the one layer whose backward pass runs
    logits: int  # of the loss, when every layer's activations are there


def fused_pass(
    shape: Architecture, config: TrainConfig, targeted: Sequence[Layer], tokens: int, supervised_share: float, size: int
) -> PassBytes:
    """Our own decoder layers; `size` bytes a number."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    modules = len(targeted) / max(1, shape.layer_count)
    layer = (
        hidden * size  # its input
        + (query + 2 * key_value) * size  # query, key and value, after their rotation
        + query * size  # what attention returns
        + shape.attention_heads * 4  # and the logarithms of its sums
        + hidden * size  # the residual between attention and MLP
        + 2 * inner * size  # gate and up
        + modules * config.rank * size  # X·A of each module with an adapter
        + 2 * 4  # the scales of both norms
    )
    gradients = (
        2 * inner * size  # gate's and up's
        + 2 * inner * size  # the MLP's activation, made again, and its gradient
        + 3 * hidden * size  # the layer's input's, output's, and one between
    )
    weights = 0
    if config.method == "qlora":  # matrices that share an input are dequantised together
        weights = size * hidden * max(2 * inner, query + 2 * key_value)
    learnt = supervised_share * tokens
    logits = (
        min(learnt, LOSS_ROWS) * shape.vocabulary * size  # their gradient takes their place
        + 2 * learnt * hidden * size  # the hidden states that are learnt from, and their gradient
        + learnt * 8
    )
    around = 2 * tokens * hidden * size  # the last layer's output, before and after its norm
    return PassBytes(round(tokens * layer), around, round(tokens * gradients + weights), round(logits))


def plain_pass(
    shape: Architecture, config: TrainConfig, targeted: Sequence[Layer], tokens: int, supervised_share: float, size: int
) -> PassBytes:
    """transformers' layers with PEFT's adapters, autocast to 16 bits or all in fp32; `size` bytes a number."""
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, max(1, shape.layer_count)
    query = shape.attention_heads * shape.head_dim
    layer = (
        2 * hidden * 4  # the input of each norm, in fp32
        + 4 * query * size  # query, key and value, repeated for each head, and what attention returns
        + shape.attention_heads * 4
        + 3 * inner * size  # gate, up and the activated gate
        + _adapter_inputs(targeted, config, size) / layers
        + len(targeted) / layers * config.rank * size  # X·A
    )
    gradients = 3 * inner * size + inner * (4 + size) + 3 * hidden * 4  # PEFT casts to fp32 and back
    largest = max((layer.in_features * layer.out_features for layer in shape.layers if not layer.is_head), default=0)
    weights = largest * size if config.method == "qlora" else 0
    learnt = supervised_share * tokens
    logits = (
        learnt * shape.vocabulary * 12 + 2 * learnt * hidden * size
    )  # log-probabilities, and two gradients, in fp32
    return PassBytes(
        round(tokens * layer), tokens * hidden * (4 + size), round(tokens * gradients + weights), round(logits)
    )


def _adapter_inputs(targeted: Sequence[Layer], config: TrainConfig, size: int) -> int:
    """Bytes a token that adapters keep of their inputs: in 16 bits PEFT's cast makes each its own copy, in fp32 the layers
    of one block share one, but for the last, which reads what the others made."""
    if size == 2 or config.lora_dropout > 0:
        mask = 1 if config.lora_dropout > 0 else 0
        return sum(layer.in_features * (size + mask) for layer in targeted)
    last = {layer.name.rpartition(".")[0]: layer.name for layer in targeted}
    inputs = {
        (block := layer.name.rpartition(".")[0], last[block] == layer.name): layer.in_features for layer in targeted
    }
    return size * sum(inputs.values())
