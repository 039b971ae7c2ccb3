"""What lies in memory whatever the rows are: weights, adapters, states of the optimizer. In bytes; knows no torch."""

from collections.abc import Sequence

from qlora_core import targets
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.targets import Architecture, Layer

# bitsandbytes: weights that share a constant, constants that share one of the second level; of its 8-bit optimizers the
# numbers that share one, and the elements below which a tensor keeps 32 bits, and from which on it is paged.
NF4_BLOCK, CONSTANTS_BLOCK = 64, 256
OPTIMIZER_BLOCK, OPTIMIZER_32_BIT_BELOW, PAGED_FROM = 256, 4096, 100_000
# torch's allocator gives a tensor a multiple of this.
ALLOCATION = 512


def targeted_layers(shape: Architecture, config: TrainConfig) -> list[Layer]:
    """Layers with an adapter; none where target_modules fits none."""
    try:
        return targets.resolve(shape.layers, config.target_modules)
    except ConfigError:
        return []


def weight_bytes(shape: Architecture, config: TrainConfig, dtype_bytes: int) -> tuple[int, int]:
    """(weights, quantisation constants) of the frozen base."""
    if config.method != "qlora":
        return shape.parameters * dtype_bytes, 0
    quantised = shape.quantised_parameters
    # Each matrix has a table of 16 values and, where its constants are quantised too, their mean.
    tables = sum(not layer.is_head for layer in shape.layers) * ALLOCATION * (2 if config.double_quant else 1)
    constants = nf4_bytes(quantised, double_quant=config.double_quant) - quantised // 2
    return (shape.parameters - quantised) * dtype_bytes + quantised // 2, constants + tables


def nf4_bytes(quantised: int, *, double_quant: bool = True) -> int:
    """4 bits a weight and an fp32 constant for each block; double-quantised, 8 bits and an fp32 constant for each block of
    those: 4.127 bits a weight (https://arxiv.org/abs/2305.14314)."""
    blocks = quantised // NF4_BLOCK
    return quantised // 2 + (blocks + 4 * (blocks // CONSTANTS_BLOCK) if double_quant else 4 * blocks)


def adapter_bytes(
    shape: Architecture, config: TrainConfig, targeted: Sequence[Layer], dtype_bytes: int, *, fused: bool
) -> int:
    """The adapter in fp32, the copy in 16 bits that products are made with, and, fused with 16-bit weights, A below them."""
    trainable = targets.trainable_parameters(targeted, config)
    below = fused and config.method == "lora"
    a = sum(config.rank * layer.in_features for layer in targeted) if below else 0
    return 4 * trainable + (trainable if fused or dtype_bytes == 2 else 0) * dtype_bytes + a * dtype_bytes


def optimizer_bytes(targeted: Sequence[Layer], config: TrainConfig, *, is_gpu: bool) -> tuple[int, int]:
    """(on the device, paged to the host) for the two moments of AdamW, tensor by tensor."""
    device, paged = 0, 0
    for elements in adapter_tensors(targeted, config):
        if "8bit" in config.optimizer and elements >= OPTIMIZER_32_BIT_BELOW:
            states, constants = 2 * elements, 2 * 4 * -(-elements // OPTIMIZER_BLOCK)
        else:
            states, constants = 8 * elements, ALLOCATION  # a counter of its steps
        pages = is_gpu and config.optimizer.startswith("paged") and elements >= PAGED_FROM
        device += constants + (0 if pages else states)
        paged += states if pages else 0
    return device, paged


def adapter_tensors(targeted: Sequence[Layer], config: TrainConfig) -> list[int]:
    """Elements of each tensor that learns: A and B of a layer, with DoRA its magnitudes."""
    return [
        elements
        for layer in targeted
        for elements in (
            config.rank * layer.in_features,
            config.rank * layer.out_features,
            *([layer.out_features] if config.use_dora else []),
        )
    ]
