"""quantize_modules, int8_modules -> how many bits each linear layer of a base is held in; no torch. And all that names layers."""

from collections.abc import Sequence

from qlora_core import selectors
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.targets import Layer, resolve

# In this order: a layer that both name is held in int8.
FIELDS = {"quantize_modules": 4, "int8_modules": 8}
NOTHING_LOST = (
    "init_lora_weights is 'loftq', which begins with what quantising lost, but no layer with an adapter is quantised; name such "
    "ones in quantize_modules, or choose init_lora_weights default"
)


def bits(layers: Sequence[Layer], config: TrainConfig) -> dict[str, int]:
    """4 or 8 by the full names of the layers that are quantised; the others stay in 16 bits.

    A group leaves out what bitsandbytes cannot hold, the output embedding above all. Raises ConfigError with all problems.
    """
    names = [layer.name for layer in layers]
    able = [layer.name for layer in layers if layer.is_quantisable and not layer.is_head]
    chosen: dict[str, int] = {}
    problems = []
    for field, width in FIELDS.items():
        given = getattr(config, field)
        found, wrong = selectors.find(given, names, able)
        if refused := selectors.last_names(found.difference(able)):
            wrong.append(f"{', '.join(refused)} of this model can only be held in 16 bits")
        if wrong:
            remedy = f"name other layers of {', '.join(selectors.last_names(able))}" if able else "choose method lora"
            problems.append(f"{field} is {', '.join(selectors.as_list(given))!r}: {'; '.join(wrong)}; {remedy}")
        chosen |= dict.fromkeys(found, width)
    if problems:
        raise ConfigError(*problems)
    return {name: chosen[name] for name in names if name in chosen}


def check(layers: Sequence[Layer], config: TrainConfig) -> None:
    """Raises ConfigError with everything that a model of these layers has against the settings that name layers."""
    targeted, held, problems = [], {}, []
    try:
        targeted = resolve(layers, config.target_modules)
    except ConfigError as error:
        problems += error.problems
    if config.method == "qlora":
        try:
            held = bits(layers, config)
        except ConfigError as error:
            problems += error.problems
    if config.init_lora_weights == "loftq" and not problems and not any(layer.name in held for layer in targeted):
        problems.append(NOTHING_LOST)
    if problems:
        raise ConfigError(*problems)


def bits_held(layers: Sequence[Layer], config: TrainConfig) -> dict[str, int]:
    """As `bits`, for an estimate: none where the run is no QLoRA, or its settings do not fit the model."""
    if config.method != "qlora":
        return {}
    try:
        return bits(layers, config)
    except ConfigError:
        return {}


def sentence(layers: Sequence[Layer], config: TrainConfig) -> str:
    """ "of 28 linear layers 14 in 4 bits, 2 in int8, the rest in 16"; empty for a base held as its method has it."""
    if config.method != "qlora" or (config.quantize_modules == "all" and not config.int8_modules):
        return ""
    widths = list(bits(layers, config).values())
    body = sum(not layer.is_head for layer in layers)
    counts = [(count, name) for width, name in ((4, "4 bits"), (8, "int8")) if (count := widths.count(width))]
    first, *others = [f"{count:,} in {name}" for count, name in counts]
    rest = ["the rest in 16"] if len(widths) < body else []
    return ", ".join([f"of {body:,} linear layers {first}", *others, *rest])


def has_int8(config: TrainConfig) -> bool:
    return config.method == "qlora" and bool(config.int8_modules)


def words(config: TrainConfig) -> str:
    """ "nf4, double quantisation", and which layers where those are not all: what tells one QLoRA base from another."""
    told = config.quant_type + (", double quantisation" if config.double_quant else "")
    if config.quantize_modules != "all":
        told += f"; in 4 bits {_listed(config.quantize_modules)}"
    if config.int8_modules:
        told += f"; in int8 {_listed(config.int8_modules)}"
    return told


def _listed(given: str | Sequence[str]) -> str:
    return " and ".join(selectors.as_list(given)) or "none"
