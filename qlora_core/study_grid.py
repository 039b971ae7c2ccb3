"""What a study varies -> the runs it consists of, each with its settings; and the kinds of studies. Starts nothing."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qlora_core import selectors
from qlora_core.config import TrainConfig, replace
from qlora_core.data.rows import counted
from qlora_core.differences import NOT_USED, effective
from qlora_core.errors import ConfigError
from qlora_core.study_results import ARM, OTHER_ORDER, OTHER_SEED, label
from qlora_core.targets import Architecture

MOST_RUNS, MOST_COMBINATIONS = 200, 2000
METHODS = ["lora", "qlora"]
# In a kind's `vary`: values that the model's layers decide.
MATRICES, LAYER_GROUPS = "each matrix by itself", "each quarter of the layers by itself"
GROUPS = 4
# Settings that name layers, and what of a layer lets them.
LAYER_FIELDS = {
    "target_modules": "is_adaptable",
    "quantize_modules": "is_quantisable",
    "int8_modules": "is_quantisable",
}
# What would make runs no longer comparable, and why.
FIXED = {
    **dict.fromkeys(
        ("data", "eval_data", "columns", "eval_fraction", "skip_bad_rows", "dataset_license"),
        "runs on other rows cannot be compared",
    ),
    **dict.fromkeys(
        ("template", "loss_on", "max_seq_length"),
        "it changes which tokens the loss is of, so losses cannot be compared",
    ),
    "base_model": "runs of other bases cannot be compared",
    "device": "memory and time of different devices cannot be compared",
    "name": "runs are named for what is varied",
    "seed": "give several seeds instead (seeds)",
    "row_order_seed": "the noise floor does that",
    "max_steps": "runs of other lengths cannot be compared",
    "num_epochs": "runs of other lengths cannot be compared",
}


@dataclass(frozen=True)
class Kind:
    """A study that one click makes: what it varies, and whether it measures its noise floor unasked."""

    title: str
    about: str
    vary: dict[str, list[Any]]
    noise_floor: bool = False


KINDS: dict[str, Kind] = {
    "lora-vs-qlora": Kind(
        "LoRA against QLoRA",
        "the same run with the base in 16 bits and in 4: memory, time, quality, and how alike the adapters are",
        {"method": METHODS},
        noise_floor=True,
    ),
    "rank-ladder": Kind(
        "Rank ladder",
        "the lowest rank that is enough, with both methods",
        {"method": METHODS, "rank": [2, 4, 8, 16, 32, 64]},
    ),
    "four-bit-type": Kind(
        "NF4 against FP4", "which 4-bit type loses less", {"method": METHODS, "quant_type": ["nf4", "fp4"]}
    ),
    "double-quantisation": Kind(
        "Double quantisation",
        "what quantising the constants too costs and saves",
        {"method": METHODS, "double_quant": [True, False]},
    ),
    "compute-dtype": Kind(
        "Number type of products", "bf16 against fp32", {"method": METHODS, "compute_dtype": ["bf16", "fp32"]}
    ),
    "adapted-matrices": Kind(
        "Which matrices get an adapter",
        "query and value, key and value, attention, the MLP, all",
        {"target_modules": ["query-value", "key-value", "attention", "mlp", "all-linear"]},
    ),
    "adapted-layers": Kind(
        "Which layers get an adapter",
        "all, and each quarter of the layers",
        {"target_modules": ["all-linear", LAYER_GROUPS]},
    ),
    "quantised-matrices": Kind(
        "Which matrices bear 4 bits",
        "each matrix by itself in 4 bits, beside none and all of them; adapters stay where they are",
        {"method": METHODS, "quantize_modules": ["all", MATRICES]},
    ),
    "quantised-layers": Kind(
        "Which layers bear 4 bits",
        "each quarter of the layers by itself in 4 bits, beside none and all of them",
        {"method": METHODS, "quantize_modules": ["all", LAYER_GROUPS]},
    ),
    "mixed-precision": Kind(
        "8 bits for some, 4 for the rest",
        "attention or the MLP in int8, the rest in 4 bits, beside 16 and 4 bits throughout",
        {"method": METHODS, "int8_modules": [(), "attention", "mlp"]},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run of a study before it is made."""

    role: str
    varied: dict[str, Any]
    seed: int
    config: TrainConfig

    @property
    def label(self) -> str:
        return run_label(self.role, self.varied)


def run_label(role: str, varied: Mapping[str, Any]) -> str:
    return (label(varied) or "as set") + ("" if role == ARM else f", {role}")


def filled(vary: Mapping[str, Sequence[Any]], shape: Architecture) -> dict[str, list[Any]]:
    """`vary` with what the model's layers decide, and without groups that it has not and values that mean the layers of an
    earlier one; `fill_notes` says which those are."""
    return {name: _distinct(name, options, shape)[0] for name, options in vary.items()}


def fill_notes(vary: Mapping[str, Sequence[Any]], shape: Architecture) -> list[str]:
    """What `filled` leaves out and why, each a sentence; empty for most models."""
    return [note for name, options in vary.items() for note in _distinct(name, options, shape)[1]]


def _distinct(field: str, options: Sequence[Any], shape: Architecture) -> tuple[list[Any], list[str]]:
    values = {MATRICES: matrices(shape), LAYER_GROUPS: layer_groups(shape)}
    given = [v for option in options for v in (values.get(option, [option]) if isinstance(option, str) else [option])]
    if field not in LAYER_FIELDS:
        return given, []
    names = [layer.name for layer in shape.layers]
    able = [layer.name for layer in shape.layers if not layer.is_head and getattr(layer, LAYER_FIELDS[field])]
    fused = selectors.fused_names(names)
    why = f", as query, key and value are one matrix, {fused}" if fused else ""
    known: dict[frozenset[str], Any] = {}
    kept, notes = [], []
    for value in given:
        layers, problems = selectors.find(value, names, able)
        same = known.get(frozenset(layers))
        if same is not None and not problems:
            notes.append(
                f"{field} {_told(value)} means the same layers as {_told(same)} here{why}: one run stands for both"
            )
        elif not layers and value in selectors.GROUPS:
            notes.append(f"{field} {_told(value)} is left out: the model has no such layers")
        else:
            known.setdefault(frozenset(layers), value)
            kept.append(value)
    return kept, notes


def _told(value: str | Sequence[str]) -> str:
    return ", ".join(selectors.as_list(value)) or "none"


def matrices(shape: Architecture) -> list[tuple[str, ...]]:
    """Selectors of the matrices of attention, each by itself, and of the MLP as one. Where query, key and value are one matrix,
    that one stands for the three."""
    names = [layer.name for layer in shape.layers if layer.is_quantisable]
    attention = [name for name in names if selectors.in_group(name, "attention")]
    elsewhere = {name.rpartition(".")[2] for name in names if name not in attention}
    found = {}
    for name in attention:
        parent, last = name.rpartition(".")[0].rpartition(".")[2], name.rpartition(".")[2]
        found[f"{parent}.{last}" if last in elsewhere else last] = None
    has_mlp = any(selectors.in_group(name, "mlp") for name in names)
    return [(name,) for name in found] + ([("mlp",)] if has_mlp else [])


def layer_groups(shape: Architecture) -> list[tuple[str, ...]]:
    """Selectors of up to four runs of decoder layers, of about equal number."""
    count = max(1, shape.layer_count)
    bounds = [round(count * i / min(GROUPS, count)) for i in range(min(GROUPS, count) + 1)]
    return [(f"all@{first}-{end - 1}",) for first, end in itertools.pairwise(bounds)]


def cells(
    config: TrainConfig,
    vary: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] = (),
    noise_floor: bool = False,
    name: str = "study",
) -> list[Cell]:
    """Every combination of the values, once for each seed; those that differ in nothing that counts are one run.

    With `noise_floor`, each LoRA arm (each arm, where none is LoRA) is trained once more with another seed and once with
    another row order: what differs between equal settings. Raises ConfigError with all problems.
    """
    seeds = list(seeds) or [config.seed]
    problems = grid_problems(vary, seeds)
    if config.early_stopping_patience is not None:
        problems.append(
            f"early_stopping_patience is {config.early_stopping_patience}: runs that end at other steps cannot be compared; leave "
            "it empty for a study"
        )
    if problems:
        raise ConfigError(*problems)
    if (combinations := math.prod(map(len, vary.values())) * len(seeds)) > MOST_COMBINATIONS:
        raise ConfigError(
            f"the study would combine {combinations:,} values and seeds; vary less: at most {MOST_COMBINATIONS:,}"
        )
    found, known = [], set()
    for values in itertools.product(*vary.values()):
        varied = dict(zip(vary, values, strict=True))
        try:
            arm = replace(config, **varied, name="arm")
        except ConfigError as error:
            problems += [f"{label(varied)}: {problem}" for problem in error.problems]
            continue
        counts = {field: effective(arm, field) for field in vary}
        key = repr(sorted(counts.items()))
        if key not in known:
            known.add(key)
            used = {field: getattr(arm, field) for field in vary if counts[field] != NOT_USED}
            found.append((used, arm))
    if problems:
        raise ConfigError(*problems)
    made = [_cell(ARM, used, arm, name, seed=seed) for used, arm in found for seed in seeds]
    if noise_floor:
        lora = [pair for pair in found if pair[1].method == "lora"] or found
        other = max(*seeds, *(arm.order_seed for _, arm in lora)) + 1
        made += [_cell(OTHER_SEED, used, arm, name, seed=other) for used, arm in lora]
        made += [_cell(OTHER_ORDER, used, arm, name, seed=seeds[0], row_order_seed=other) for used, arm in lora]
    if len(made) > MOST_RUNS:
        raise ConfigError(
            f"the study would have {len(made):,} runs; vary less, or use fewer seeds: at most {MOST_RUNS}"
        )
    if len(made) < 2:
        raise ConfigError(
            "the study would have one run, so there is nothing to compare: vary a setting, or give two seeds"
        )
    return made


def _cell(role: str, varied: dict[str, Any], arm: TrainConfig, name: str, **seeds: int) -> Cell:
    beside = f", {role}" if role != ARM else f", seed {seeds['seed']}" if seeds["seed"] != arm.seed else ""
    title = f"{name}: {label(varied) or 'as set'}{beside}"
    return Cell(role, varied, seeds["seed"], replace(arm, **seeds, name=title))


def grid_problems(vary: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[str]:
    """A sentence for each setting that cannot be varied, or not so."""
    known, problems = {spec.name for spec in fields(TrainConfig)}, []
    for field, values in vary.items():
        if field not in known:
            problems.append(f"{field} is not a setting, so it cannot be varied")
        elif field in FIXED:
            problems.append(f"{field} cannot be varied: {FIXED[field]}")
        elif not values:
            problems.append(f"{field} has no values to vary; name at least one")
    if len(set(seeds)) < len(seeds):
        problems.append(f"seeds are {', '.join(map(str, seeds))}: one is named twice; name each once")
    return problems


def sentence(made: Sequence[Cell]) -> str:
    """ "6 runs: 4 arms, 1 seed, and 2 for the noise floor"."""
    arms = {repr(sorted(cell.varied.items())) for cell in made if cell.role == ARM}
    seeds = {cell.seed for cell in made if cell.role == ARM}
    floor = sum(cell.role != ARM for cell in made)
    text = f"{counted(len(made), 'run')}: {counted(len(arms), 'arm')}, {counted(len(seeds), 'seed')}"
    return text + (f", and {floor} for the noise floor" if floor else "")
