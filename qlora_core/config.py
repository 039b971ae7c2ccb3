"""TrainConfig: every setting of a run, validated as a whole, to and from YAML and JSON. Knows no model and no file."""

import difflib
import json
import math
import os
import reprlib
from dataclasses import asdict, dataclass, field, fields
from dataclasses import replace as replace  # re-exported: config.replace(run_config, rank=16)
from pathlib import Path
from typing import Any

import yaml

from qlora_core.errors import ConfigError

TARGET_PRESETS = ("all-linear", "attention", "query-value")
# A few hundred bytes of YAML can stand for a list of billions, which a message must not write out.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
# Starts of the adapter that take their part out of the base weights.
MUTATED_BASE = ("pissa", "olora")


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field with what the command line and the form say of it and the limits that validation holds it to.

    Limits: `choices`, `least`, `most`, `above` (exclusive), `optional` (None allowed), `group` (of the form).
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of one run. Frozen: derive with `replace(config, rank=16)`.

    Raises ConfigError naming every wrong field at once.
    """

    data: str = _option("", "JSONL file to train on", group="data")
    eval_data: str | None = _option(
        None, "JSONL file to evaluate on; else rows are held out", optional=True, group="data"
    )
    eval_fraction: float = _option(
        0.1, "share of rows held out for evaluation when no evaluation file is given", above=0, most=0.5, group="data"
    )
    skip_bad_rows: bool = _option(
        False, "train without the rows that have problems (they are listed) instead of refusing", group="data"
    )
    dataset_license: str | None = _option(
        None,
        "licence of the training rows by its SPDX id, such as cc-by-4.0; stays with the run",
        optional=True,
        group="data",
    )
    max_seq_length: int = _option(
        512, "tokens a row may have; longer rows are cut", least=8, most=131_072, group="data"
    )
    name: str = _option("", "name of the run; empty: made from dataset, method and rank", group="data")

    base_model: str = _option(
        "bundled",
        "'bundled', a local folder, run:RUN (its merged model), or a Hub id, also id@revision",
        group="adapter",
    )
    method: str = _option(
        "qlora", "lora: 16-bit base weights; qlora: base weights in 4 bits", choices=("lora", "qlora"), group="adapter"
    )
    rank: int = _option(8, "rank r of the update B·A", least=1, most=1024, group="adapter")
    lora_alpha: float | None = _option(
        None,
        "scale of the update is lora_alpha / rank (rsLoRA: / square root of rank); default 2 x rank, with rsLoRA 16",
        optional=True,
        above=0,
        most=4096,
        group="adapter",
    )
    lora_dropout: float = _option(0.0, "dropout before the adapter", least=0, most=0.5, group="adapter")
    target_modules: str | tuple[str, ...] = _option(
        "all-linear",
        f"which linear layers get an adapter: {', '.join(TARGET_PRESETS)}, or module names",
        group="adapter",
    )
    use_rslora: bool = _option(False, "rsLoRA: divide by the square root of the rank, for high ranks", group="adapter")
    use_dora: bool = _option(False, "DoRA: learn magnitude and direction apart; slower", group="adapter")
    init_lora_weights: str = _option(
        "default",
        "start of the adapter. default, gaussian and orthogonal add nothing at first; pissa and olora (lora only) take over "
        "the main part of the base weights; loftq (qlora only) begins with what 4 bits lost",
        choices=("default", "gaussian", "orthogonal", "pissa", "olora", "loftq"),
        group="adapter",
    )

    quant_type: str = _option("nf4", "4-bit type of qlora", choices=("nf4", "fp4"), group="quantisation")
    double_quant: bool = _option(True, "quantise the quantisation constants too (qlora)", group="quantisation")
    compute_dtype: str = _option(
        "auto",
        "number type of matrix products; auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
        group="quantisation",
    )

    optimizer: str = _option(
        "adamw_torch_fused",
        "adamw_torch_fused is the fastest; 8-bit and paged states are for memory",
        choices=("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
        group="optimizer",
    )
    learning_rate: float = _option(2e-4, "peak learning rate", above=0, most=0.1, group="optimizer")
    lr_schedule: str = _option(
        "cosine",
        "course of the learning rate after warm-up",
        choices=("cosine", "linear", "constant"),
        group="optimizer",
    )
    warmup_fraction: float = _option(0.03, "share of the steps that warm up", least=0, most=0.5, group="optimizer")
    weight_decay: float = _option(0.0, "AdamW weight decay", least=0, most=1, group="optimizer")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm", above=0, most=1000, group="optimizer")
    loraplus_lr_ratio: float | None = _option(
        None,
        "LoRA+: B learns at learning_rate times this (often 16)",
        optional=True,
        least=1,
        most=1000,
        group="optimizer",
    )
    neftune_noise_alpha: float | None = _option(
        None,
        "NEFTune: noise on the embeddings while training (5 to 15)",
        optional=True,
        above=0,
        most=100,
        group="optimizer",
    )
    num_epochs: float = _option(3.0, "passes over the training rows", above=0, most=1000, group="optimizer")
    max_steps: int | None = _option(
        None, "optimizer steps; overrides num_epochs", optional=True, least=1, most=10_000_000, group="optimizer"
    )
    rows_per_step: int = _option(8, "rows that one optimizer step learns from", least=1, most=4096, group="optimizer")
    seed: int = _option(42, "seed of adapter, row order, split and dropout", least=0, most=2**31 - 1, group="optimizer")

    token_budget: int | None = _option(
        None,
        "tokens a forward pass may hold; speed and memory, never the result",
        optional=True,
        least=8,
        most=10_000_000,
        group="memory",
    )
    packing: str = _option(
        "auto",
        "auto: several rows a pass without padding where the model is proven to keep them apart",
        choices=("auto", "off"),
        group="memory",
    )
    activation_checkpointing: bool = _option(
        False, "recompute activations in the backward pass: less memory, slower", group="memory"
    )
    compile: str = _option(
        "auto",
        "auto: compile decoder layers on a GPU when the run is long enough to win it back",
        choices=("auto", "on", "off"),
        group="memory",
    )
    device: str = _option("auto", "auto: the GPU where there is one", choices=("auto", "cuda", "cpu"), group="memory")

    eval_steps: int | None = _option(
        None,
        "steps between evaluations; default: five in a run",
        optional=True,
        least=1,
        most=10_000_000,
        group="evaluation",
    )
    save_steps: int | None = _option(
        None,
        "steps between checkpoints; default: as eval_steps",
        optional=True,
        least=1,
        most=10_000_000,
        group="evaluation",
    )
    keep_checkpoints: int = _option(
        2, "newest checkpoints that are kept, beside that of the best evaluation", least=1, most=100, group="evaluation"
    )
    final_adapter: str = _option(
        "last",
        "the adapter that the run ends with: of its last step, or of the lowest evaluation loss",
        choices=("last", "best"),
        group="evaluation",
    )
    early_stopping_patience: int | None = _option(
        None,
        "end the run after this many evaluations in a row without a lower loss",
        optional=True,
        least=1,
        most=10_000,
        group="evaluation",
    )
    score: str = _option(
        "none",
        "task score on generated answers, before and after; exact: equals the response; json: valid JSON with the same "
        "keys and equal score_fields",
        choices=("none", "exact", "json"),
        group="evaluation",
    )
    score_fields: tuple[str, ...] = _option(
        (), "JSON fields whose values must be equal; used by score json alone", group="evaluation"
    )
    score_rows: int = _option(
        48, "evaluation rows that are answered for the score", least=1, most=100_000, group="evaluation"
    )
    score_max_new_tokens: int = _option(
        96, "longest answer generated for the score", least=1, most=4096, group="evaluation"
    )

    tracker: str = _option(
        "none",
        "where losses are logged too; each but none needs its package, and its keys in the environment",
        choices=("none", "trackio", "wandb", "mlflow", "tensorboard"),
        group="tracking",
    )
    tracker_project: str = _option("qlora-lab", "project that the tracker files the run under", group="tracking")

    def __post_init__(self) -> None:
        problems = [problem for spec in fields(self) if (problem := self._problem(spec))]
        if not problems:
            problems = self._combination_problems()
        if problems:
            raise ConfigError(*problems)

    def _problem(self, spec: Any) -> str | None:
        """Why the field's value cannot be used, or None; a value of another notation ("2e-4", 8.0) is converted."""
        value, limits = getattr(self, spec.name), spec.metadata
        if value is None and limits.get("optional"):
            return None
        try:
            value = _converted(value, spec.type)
        except (TypeError, ValueError, OverflowError):
            return f"{spec.name} is {_SHORT.repr(value)}; it must be {_described(spec.type)} ({limits['help']})"
        object.__setattr__(self, spec.name, value)
        if "choices" in limits and value not in limits["choices"]:
            return f"{spec.name} is {_SHORT.repr(value)}; choose one of {', '.join(limits['choices'])}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _range_problem(spec.name, value, limits)
        return None

    def _combination_problems(self) -> list[str]:
        """Settings that are each possible, but not together (PEFT refuses them, or saves what cannot be loaded)."""
        init, problems = self.init_lora_weights, []
        if self.method == "qlora" and init in MUTATED_BASE:
            problems.append(
                f"init_lora_weights is {init!r} with method qlora: it moves part of the base weights into the adapter, and "
                "4-bit weights cannot give it up exactly; choose method lora, or init_lora_weights loftq, which is made for "
                "4 bits"
            )
        if self.method == "lora" and init == "loftq":
            problems.append(
                "init_lora_weights is 'loftq' with method lora: it begins with what 4 bits lost, and nothing is lost here; "
                "choose method qlora, or init_lora_weights pissa"
            )
        if init == "loftq" and self.quant_type != "nf4":
            problems.append(f"init_lora_weights is 'loftq' with quant_type {self.quant_type}; set quant_type to nf4")
        if init == "orthogonal" and self.method == "qlora":
            problems.append(
                "init_lora_weights is 'orthogonal' with method qlora: PEFT would give the adapter the 4-bit number type; choose "
                "gaussian, or method lora"
            )
        if init == "orthogonal" and self.rank % 2:
            problems.append(f"init_lora_weights is 'orthogonal' with rank {self.rank}; it needs an even rank")
        if self.use_dora and init in MUTATED_BASE:
            problems.append(
                f"use_dora with init_lora_weights {init!r}: PEFT cannot turn such an adapter back into one for the original "
                "base; choose one of the two"
            )
        return problems

    @property
    def alpha(self) -> float:
        if self.lora_alpha is not None:
            return self.lora_alpha
        return 16.0 if self.use_rslora else 2.0 * self.rank

    @property
    def adapter_scale(self) -> float:
        """What B·A is multiplied by (rsLoRA: https://arxiv.org/abs/2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def run_name(self) -> str:
        return self.name or f"{Path(self.data).stem or 'run'}-{self.method}-r{self.rank}"

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_yaml(self) -> str:
        """Only what differs from the defaults: short to read, complete to run."""
        default = TrainConfig().to_json()
        changed = {name: value for name, value in self.to_json().items() if value != default[name]}
        return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, values: Any, *, where: str = "the settings") -> "TrainConfig":
        """Raises ConfigError that names every unknown field, with the nearest known one, and every wrong value."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected fields and values, found {type(values).__name__}")
        known = {spec.name for spec in fields(cls)}
        problems = []
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                problems.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        config = None
        try:
            config = cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            problems.extend(error.problems)
        if config is None or problems:
            raise ConfigError(*(f"{where}: {problem}" for problem in problems))
        return config

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> "TrainConfig":
        """Read a run's YAML; its data files are named relative to itself. `overrides` win over the file."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file") from None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if isinstance(values, dict):
            for name in ("data", "eval_data"):
                if isinstance(values.get(name), str) and values[name]:
                    values[name] = str((path.parent / os.path.expanduser(values[name])).resolve())
            values = {**values, **overrides}
        return cls.from_mapping(values, where=str(path))

    @classmethod
    def from_json_file(cls, path: Path) -> "TrainConfig":
        return cls.from_mapping(json.loads(path.read_text()), where=str(path))


def _converted(value: Any, kind: Any) -> Any:
    """`value` as the field's type. Raises TypeError or ValueError where that would change its meaning."""
    wanted = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    if (wanted == "bool") != isinstance(value, bool):
        raise TypeError
    if wanted == "bool":
        return value
    if "tuple" in wanted:
        if isinstance(value, str) and wanted.startswith("str"):
            return _names(value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
            raise TypeError
        if not value and wanted.startswith("str"):
            raise ValueError
        return tuple(value)
    if "int" in wanted:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if "float" in wanted:
        return float(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _names(text: str) -> str | tuple[str, ...]:
    """A preset as it is, else comma-separated module names."""
    if text in TARGET_PRESETS:
        return text
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError
    return names


def _described(kind: Any) -> str:
    text = str(kind)
    for part, words in (
        ("bool", "true or false"),
        ("tuple", "a list of names"),
        ("int", "a whole number"),
        ("float", "a number"),
    ):
        if part in text:
            return words
    return "a text"


def _range_problem(name: str, value: float, limits: Any) -> str | None:
    least, above, most = limits.get("least"), limits.get("above"), limits.get("most")
    fits = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    if fits and (most is None or value <= most):
        return None
    lower = f"at least {least}" if least is not None else f"above {above}"
    return f"{name} is {value}; it must be {lower} and at most {most} ({limits['help']})"
