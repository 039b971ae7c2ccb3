"""target_modules -> the linear layers that get an adapter, and its size. The same in the page and in the worker; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qlora_core import selectors
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.selectors import FUSED_QKV, QUERY, VALUE

SHOWN_NAMES = 4


@dataclass(frozen=True)
class Layer:
    """A linear layer by its full name. A group leaves the head alone (the output embedding), and what PEFT cannot adapt:
    Mamba's `out_proj`, whose kernel bypasses the layer, and layers that it takes for experts. `is_quantisable`: bitsandbytes
    can hold it in 4 or 8 bits, and transformers lets it."""

    name: str
    in_features: int
    out_features: int
    is_head: bool = False
    is_adaptable: bool = True
    is_quantisable: bool = True

    @property
    def elements(self) -> int:
        return self.in_features * self.out_features

    @property
    def last_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a base model consists of. Tied embeddings count once.

    `fusable`: the worker has decoder layers of its own for it. Sizes that an architecture does not have are told as those
    of a usual one of its width.
    """

    model_type: str
    layers: tuple[Layer, ...]
    parameters: int
    vocabulary: int
    hidden_size: int
    layer_count: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    fusable: bool

    @property
    def quantised_parameters(self) -> int:
        """Weights that qlora holds in 4 bits unless it is told otherwise."""
        return sum(layer.elements for layer in self.layers if layer.is_quantisable and not layer.is_head)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Architecture":
        """Raises KeyError, TypeError or ValueError for anything but what a worker wrote."""
        layers = tuple(Layer(str(n), int(i), int(o), *map(bool, flags)) for n, i, o, *flags in values["layers"])
        numbers = {spec.name: int(values[spec.name]) for spec in fields(cls) if spec.type is int}
        flags = {spec.name: bool(values[spec.name]) for spec in fields(cls) if spec.type is bool}
        return cls(model_type=str(values["model_type"]), layers=layers, **numbers, **flags)


def resolve(layers: Sequence[Layer], target_modules: str | Sequence[str]) -> list[Layer]:
    """The layers that get an adapter. Raises ConfigError naming what the model has instead."""
    body = [layer.name for layer in layers if layer.is_adaptable and not layer.is_head]
    found, problems = selectors.find(target_modules, [layer.name for layer in layers], body)
    if refused := selectors.last_names(
        layer.name for layer in layers if layer.name in found and not layer.is_adaptable
    ):
        problems.append(f"PEFT cannot adapt {', '.join(refused)} of this model by itself")
    if problems:
        raise ConfigError(
            f"target_modules is {', '.join(selectors.as_list(target_modules))!r}: {'; '.join(problems)}; name other layers "
            f"of {', '.join(last_names(layers))}"
        )
    return [layer for layer in layers if layer.name in found]


def last_names(layers: Sequence[Layer]) -> list[str]:
    """The last parts of the names of layers that can get an adapter, each once."""
    return selectors.last_names(layer.name for layer in layers if layer.is_adaptable)


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


def not_apart(layers: Sequence[Layer], given: str | Sequence[str]) -> str:
    """Of groups that ask for less than query, key and value where these are one matrix: its name; else empty."""
    asked = {selectors.parse(text).what for text in selectors.as_list(given)} & {"query-value", "key-value"}
    return selectors.fused_names([layer.name for layer in layers]) if asked else ""


def _blocks(layers: Sequence[Layer]) -> str:
    """How many decoder layers they lie in."""
    numbers = {selectors.layer_number(layer.name) for layer in layers}
    return f"{len(numbers):,} layer{'' if len(numbers) == 1 else 's'}"
