"""What lies in memory whatever the rows are: weights, adapters, states of the optimizer. In bytes; knows no torch."""

from collections.abc import Sequence

from qlora_core import precision, targets
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
    bits = precision.bits_held(shape.layers, config)
    weights, constants = shape.parameters * dtype_bytes, 0
    for layer in shape.layers:
        width = bits.get(layer.name)
        if width == 8:  # an fp32 constant for each output
            weights -= layer.elements * (dtype_bytes - 1)
            constants += allocated(4 * layer.out_features)
        elif width == 4:
            weights -= layer.elements * dtype_bytes - -(-layer.elements // 2)
            constants += constants_bytes(layer.elements, double_quant=config.double_quant)
    return weights, constants


def constants_bytes(elements: int, *, double_quant: bool) -> int:
    """Of a matrix in 4 bits, as the allocator gives it: an fp32 constant for each block, or 8 bits with an fp32 constant for each
    block of those and their mean; and the table of the 16 values."""
    blocks = -(-elements // NF4_BLOCK)
    tensors = (blocks, 4 * -(-blocks // CONSTANTS_BLOCK), 4) if double_quant else (4 * blocks,)
    return sum(allocated(size) for size in (*tensors, 4 * 16))


def allocated(size: int) -> int:
    return -(-size // ALLOCATION) * ALLOCATION


def nf4_bytes(quantised: int) -> float:
    """4 bits a weight and its share of double-quantised constants: 4.127 bits (https://arxiv.org/abs/2305.14314)."""
    return quantised * (0.5 + (1 + 4 / CONSTANTS_BLOCK) / NF4_BLOCK)


def adapter_bytes(targeted: Sequence[Layer], config: TrainConfig, dtype_bytes: int, *, fused: bool) -> int:
    """The adapter in fp32, and the copy in 16 bits that products are made with."""
    copy = dtype_bytes if fused or dtype_bytes == 2 else 0
    return targets.trainable_parameters(targeted, config) * (4 + copy)


def optimizer_bytes(targeted: Sequence[Layer], config: TrainConfig, *, is_gpu: bool, fused: bool) -> tuple[int, int]:
    """(on the device, paged to the host) for the two moments of AdamW, tensor by tensor; fused layers have all A in one tensor
    and all B in another."""
    device, paged, tensors = 0, 0, adapter_tensors(targeted, config)
    for elements in (sum(tensors[::2]), sum(tensors[1::2])) if fused else tensors:
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
