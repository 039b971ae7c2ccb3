"""target_modules -> the linear layers that get an adapter, and its size. The same in the page and in the worker; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError

QUERY = ("q_proj", "query", "q", "q_lin")
VALUE = ("v_proj", "value", "v", "v_lin")
# Layers in which query, key and value are one matrix: they cannot be targeted apart.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")
SHOWN_NAMES = 4


@dataclass(frozen=True)
class Layer:
    """A linear layer by its full name. A preset leaves the head alone (the output embedding), and what PEFT cannot adapt:
    Mamba's `out_proj`, whose kernel bypasses the layer, and layers that it takes for experts."""

    name: str
    in_features: int
    out_features: int
    is_head: bool = False
    is_adaptable: bool = True

    @property
    def last_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a base model consists of. Tied embeddings count once; `quantised_parameters` are what qlora holds in 4 bits.

    `fusable`: the worker has decoder layers of its own for it. Sizes that an architecture does not have are told as those
    of a usual one of its width.
    """

    model_type: str
    layers: tuple[Layer, ...]
    parameters: int
    quantised_parameters: int
    vocabulary: int
    hidden_size: int
    layer_count: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    fusable: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Architecture":
        """Raises KeyError, TypeError or ValueError for anything but what a worker wrote."""
        layers = tuple(Layer(str(n), int(i), int(o), bool(h), bool(a)) for n, i, o, h, a in values["layers"])
        numbers = {spec.name: int(values[spec.name]) for spec in fields(cls) if spec.type is int}
        flags = {spec.name: bool(values[spec.name]) for spec in fields(cls) if spec.type is bool}
        return cls(model_type=str(values["model_type"]), layers=layers, **numbers, **flags)


def resolve(layers: Sequence[Layer], target_modules: str | tuple[str, ...]) -> list[Layer]:
    """The layers that get an adapter. Raises ConfigError naming what the model has instead."""
    body = [layer for layer in layers if layer.is_adaptable and not layer.is_head]
    if target_modules == "all-linear":
        found = body
    elif target_modules == "attention":
        found = [
            layer for layer in body if any("attn" in part or "attention" in part for part in layer.name.split(".")[:-1])
        ]
    elif target_modules == "query-value":
        found = [layer for layer in body if layer.last_name in (*QUERY, *VALUE, *FUSED_QKV)]
    else:
        found = _named(layers, tuple(target_modules))
    if not found:
        raise ConfigError(
            f"target_modules is {target_modules!r}, which fits none of the model's linear layers "
            f"({', '.join(last_names(layers))}); choose all-linear, or name layers"
        )
    return found


def _named(layers: Sequence[Layer], names: tuple[str, ...]) -> list[Layer]:
    """Layers whose name is one of the names or ends with it at a dot, as PEFT has it."""

    def fits(layer: Layer, name: str) -> bool:
        return layer.name == name or layer.name.endswith(f".{name}")

    missing = [name for name in names if not any(fits(layer, name) for layer in layers)]
    found = [layer for layer in layers if any(fits(layer, name) for name in names)]
    refused = sorted({layer.last_name for layer in found if not layer.is_adaptable})
    problems = [f"the model has no linear layer {', '.join(missing)}"] if missing else []
    problems += [f"PEFT cannot adapt {', '.join(refused)} of this model by itself"] if refused else []
    if problems:
        raise ConfigError(
            f"target_modules is {', '.join(names)!r}: {' and '.join(problems)}; name other layers of "
            f"{', '.join(last_names(layers))}"
        )
    return found


def last_names(layers: Sequence[Layer]) -> list[str]:
    """The last parts of the names of layers that can get an adapter, each once."""
    return sorted({layer.last_name for layer in layers if layer.is_adaptable})


def trainable_parameters(layers: Sequence[Layer], config: TrainConfig) -> int:
    """Weights of A and B; DoRA adds a magnitude for each output."""
    return sum(
        config.rank * (layer.in_features + layer.out_features) + (layer.out_features if config.use_dora else 0)
        for layer in layers
    )


def misses_query_or_value(layers: Sequence[Layer], targeted: Sequence[Layer]) -> bool:
    """True where the model has query and value layers and not both kinds are targeted."""
    has, gets = {layer.last_name for layer in layers}, {layer.last_name for layer in targeted}
    if gets & set(FUSED_QKV):
        return False
    return any(has & set(kind) and not gets & set(kind) for kind in (QUERY, VALUE))


def sentence(architecture: Architecture, config: TrainConfig) -> str:
    """ "q_proj, k_proj, … in 30 layers: 210 modules, 2,442,240 trainable weights (1.8 %)". Raises ConfigError."""
    targeted = resolve(architecture.layers, config.target_modules)
    weights = trainable_parameters(targeted, config)
    names = list(dict.fromkeys(layer.last_name for layer in targeted))
    shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
    modules = f"{len(targeted):,} module{'' if len(targeted) == 1 else 's'}"
    share = 100 * weights / architecture.parameters
    return f"{shown} in {_blocks(targeted)}: {modules}, {weights:,} trainable weights ({share:.2g} %)"


def _blocks(layers: Sequence[Layer]) -> str:
    """How many decoder layers they lie in: the first number in a name counts them."""
    numbers = {next((part for part in layer.name.split(".") if part.isdigit()), "") for layer in layers}
    return f"{len(numbers):,} layer{'' if len(numbers) == 1 else 's'}"
