"""TrainConfig: every setting of a run, validated as a whole, to and from YAML and JSON. Knows no model and no file."""

import json
import math
import os
from dataclasses import dataclass
from dataclasses import replace as replace  # re-exported: config.replace(run_config, rank=16)
from pathlib import Path
from typing import Any

from qlora_core import selectors
from qlora_core.options import SHORT, Options, option, read_yaml

TEMPLATES = ("model", "alpaca", "chatml", "llama3", "mistral", "zephyr")
TARGET_PRESETS = ("all-linear", "attention", "mlp", "query-value", "key-value")
QUANTISE_PRESETS = ("all", *TARGET_PRESETS[1:])
# Starts of the adapter that take their part out of the base weights.
MUTATED_BASE = ("pissa", "olora")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """All settings of one run. Frozen: derive with `replace(config, rank=16)`.

    Raises ConfigError naming every wrong field at once.
    """

    data: str = option(
        "",
        "what to train on: a file (JSONL, JSON, CSV, TSV, Parquet, each also .gz), a prepared folder, or "
        "hub:OWNER/NAME[:CONFIG[:SPLIT]][@REVISION]",
        group="data",
    )
    eval_data: str | None = option(None, "file to evaluate on; else rows are held out", optional=True, group="data")
    columns: str = option(
        "",
        'which columns are read where the names are others: prompt=question, response="the answer, in full"',
        group="data",
    )
    eval_fraction: float = option(
        0.1, "share of rows held out for evaluation when no evaluation file is given", above=0, most=0.5, group="data"
    )
    skip_bad_rows: bool = option(
        False, "train without the rows that have problems (they are listed) instead of refusing", group="data"
    )
    dataset_license: str | None = option(
        None,
        "licence of the training rows by its SPDX id, such as cc-by-4.0; stays with the run",
        optional=True,
        group="data",
    )
    template: str = option(
        "model",
        f"how rows are written: {', '.join(TEMPLATES)}, or a Jinja chat template; model: the model's own, else Alpaca",
        group="data",
    )
    loss_on: str = option(
        "all_responses",
        "tokens that are learnt: all responses of a conversation, the last one, or everything, prompts too",
        choices=("all_responses", "last_response", "everything"),
        group="data",
    )
    max_seq_length: int = option(512, "tokens a row may have; longer rows are cut", least=8, most=131_072, group="data")
    name: str = option("", "name of the run; empty: made from dataset, method and rank", group="data")

    base_model: str = option(
        "bundled",
        "'bundled', a local folder, run:RUN (its merged model), or a Hub id, also id@revision",
        group="adapter",
    )
    method: str = option(
        "qlora", "lora: 16-bit base weights; qlora: base weights in 4 bits", choices=("lora", "qlora"), group="adapter"
    )
    rank: int = option(8, "rank r of the update B·A", least=1, most=1024, group="adapter")
    lora_alpha: float | None = option(
        None,
        "scale of the update is lora_alpha / rank (rsLoRA: / square root of rank); default 2 x rank, with rsLoRA 16",
        optional=True,
        above=0,
        most=4096,
        group="adapter",
    )
    lora_dropout: float = option(0.0, "dropout before the adapter", least=0, most=0.5, group="adapter")
    target_modules: str | tuple[str, ...] = option(
        "all-linear",
        f"which linear layers get an adapter: {', '.join(TARGET_PRESETS)}, module names, each also in some decoder layers: "
        "q_proj@0-7, attention@8-15",
        presets=TARGET_PRESETS,
        check=selectors.syntax_problem,
        group="adapter",
    )
    use_rslora: bool = option(False, "rsLoRA: divide by the square root of the rank, for high ranks", group="adapter")
    use_dora: bool = option(False, "DoRA: learn magnitude and direction apart; slower", group="adapter")
    init_lora_weights: str = option(
        "default",
        "start of the adapter. default, gaussian and orthogonal add nothing at first; pissa and olora (lora only) take over "
        "the main part of the base weights; loftq (qlora only) begins with what 4 bits lost",
        choices=("default", "gaussian", "orthogonal", "pissa", "olora", "loftq"),
        group="adapter",
    )

    quant_type: str = option("nf4", "4-bit type of qlora", choices=("nf4", "fp4"), group="quantisation")
    double_quant: bool = option(True, "quantise the quantisation constants too (qlora)", group="quantisation")
    quantize_modules: str | tuple[str, ...] = option(
        "all",
        "which linear layers qlora holds in 4 bits, named as target_modules are, or none; the others stay in 16 bits",
        presets=QUANTISE_PRESETS,
        may_be_empty=True,
        check=selectors.syntax_problem,
        group="quantisation",
    )
    int8_modules: str | tuple[str, ...] = option(
        (),
        "which linear layers qlora holds in int8 instead, for sensitive ones: named likewise, or none",
        presets=QUANTISE_PRESETS,
        may_be_empty=True,
        check=selectors.syntax_problem,
        group="quantisation",
    )
    compute_dtype: str = option(
        "auto",
        "number type of matrix products; auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
        group="quantisation",
    )

    optimizer: str = option(
        "adamw_torch_fused",
        "adamw_torch_fused is the fastest; 8-bit and paged states are for memory",
        choices=("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
        group="optimizer",
    )
    learning_rate: float = option(2e-4, "peak learning rate", above=0, most=0.1, group="optimizer")
    lr_schedule: str = option(
        "cosine",
        "course of the learning rate after warm-up",
        choices=("cosine", "linear", "constant"),
        group="optimizer",
    )
    warmup_fraction: float = option(0.03, "share of the steps that warm up", least=0, most=0.5, group="optimizer")
    weight_decay: float = option(0.0, "AdamW weight decay", least=0, most=1, group="optimizer")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0, most=1000, group="optimizer")
    loraplus_lr_ratio: float | None = option(
        None,
        "LoRA+: B learns at learning_rate times this (often 16)",
        optional=True,
        least=1,
        most=1000,
        group="optimizer",
    )
    neftune_noise_alpha: float | None = option(
        None,
        "NEFTune: noise on the embeddings while training (5 to 15)",
        optional=True,
        above=0,
        most=100,
        group="optimizer",
    )
    num_epochs: float = option(3.0, "passes over the training rows", above=0, most=1000, group="optimizer")
    max_steps: int | None = option(
        None, "optimizer steps; overrides num_epochs", optional=True, least=1, most=10_000_000, group="optimizer"
    )
    rows_per_step: int = option(8, "rows that one optimizer step learns from", least=1, most=4096, group="optimizer")
    seed: int = option(42, "seed of adapter, row order, split and dropout", least=0, most=2**31 - 1, group="optimizer")
    row_order_seed: int | None = option(
        None,
        "seed of the row order alone, so that equal adapters see the rows in another order; default: seed",
        optional=True,
        least=0,
        most=2**31 - 1,
        group="optimizer",
    )

    token_budget: int | None = option(
        None,
        "tokens a forward pass may hold; speed and memory, never the result",
        optional=True,
        least=8,
        most=10_000_000,
        group="memory",
    )
    packing: str = option(
        "auto",
        "auto: several rows a pass without padding where the model is proven to keep them apart",
        choices=("auto", "off"),
        group="memory",
    )
    memory_budget_gib: float | None = option(
        None,
        "GiB of the device's memory that the run may fill; automatic: what is free",
        optional=True,
        above=0,
        most=10_000,
        group="memory",
    )
    activation_checkpointing: str = option(
        "auto",
        "activations recomputed in the backward pass: less memory, slower. auto: in as few layers as fit the memory; "
        "offloaded: what is kept goes to the host too",
        choices=("auto", "none", "full", "offloaded"),
        group="memory",
    )
    fused_layers: str = option(
        "auto",
        "auto: decoder layers with few, large kernels on a GPU, where the model is proven to compute the same with them",
        choices=("auto", "off"),
        group="memory",
    )
    compile: str = option(
        "auto",
        "auto: compile decoder layers that are not fused on a GPU when the run is long enough to win it back",
        choices=("auto", "on", "off"),
        group="memory",
    )
    device: str = option("auto", "auto: the GPU where there is one", choices=("auto", "cuda", "cpu"), group="memory")

    eval_steps: int | None = option(
        None,
        "steps between evaluations; default: five in a run",
        optional=True,
        least=1,
        most=10_000_000,
        group="evaluation",
    )
    save_steps: int | None = option(
        None,
        "steps between checkpoints; default: as eval_steps",
        optional=True,
        least=1,
        most=10_000_000,
        group="evaluation",
    )
    keep_checkpoints: int = option(
        2, "newest checkpoints that are kept, beside that of the best evaluation", least=1, most=100, group="evaluation"
    )
    final_adapter: str = option(
        "last",
        "the adapter that the run ends with: of its last step, or of the lowest evaluation loss",
        choices=("last", "best"),
        group="evaluation",
    )
    early_stopping_patience: int | None = option(
        None,
        "end the run after this many evaluations in a row without a lower loss",
        optional=True,
        least=1,
        most=10_000,
        group="evaluation",
    )
    score: str = option(
        "none",
        "task score on generated answers, before and after; exact: equals the response; json: valid JSON with the same "
        "keys and equal score_fields",
        choices=("none", "exact", "json"),
        group="evaluation",
    )
    score_fields: tuple[str, ...] = option(
        (), "JSON fields whose values must be equal; used by score json alone", group="evaluation"
    )
    score_rows: int = option(
        48, "evaluation rows that are answered for the score", least=1, most=100_000, group="evaluation"
    )
    score_max_new_tokens: int = option(
        96, "longest answer generated for the score", least=1, most=4096, group="evaluation"
    )

    tracker: str = option(
        "none",
        "where losses are logged too; each but none needs its package, and its keys in the environment",
        choices=("none", "trackio", "wandb", "mlflow", "tensorboard"),
        group="tracking",
    )
    tracker_project: str = option("qlora-lab", "project that the tracker files the run under", group="tracking")

    def _combination_problems(self) -> list[str]:
        """PEFT refuses these together, or saves what cannot be loaded."""
        init, problems = self.init_lora_weights, []
        if self.template not in TEMPLATES and "{" not in self.template:
            problems.append(
                f"template is {SHORT.repr(self.template)}; choose one of {', '.join(TEMPLATES)}, or write a Jinja template"
            )
        if self.method == "qlora" and init in MUTATED_BASE:
            problems.append(
                f"init_lora_weights is {init!r} with method qlora: it moves part of the base weights into the adapter, and "
                "4-bit weights cannot give it up exactly; choose method lora, or init_lora_weights loftq, which is made for "
                "4 bits"
            )
        if not self.quantize_modules and not self.int8_modules:  # whatever the method: a remedy may be to choose qlora
            problems.append(
                "quantize_modules is none, and so is int8_modules: method qlora would quantise nothing; name layers in one of "
                "them, or leave both out and choose method lora"
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
    def order_seed(self) -> int:
        """What the row order is made from."""
        return self.seed if self.row_order_seed is None else self.row_order_seed

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

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> "TrainConfig":
        """Read a run's YAML; its data files are named relative to itself. `overrides` win over the file."""
        values = read_yaml(path)
        if isinstance(values, dict):
            for name in ("data", "eval_data"):
                if isinstance(values.get(name), str) and values[name] and not values[name].startswith("hub:"):
                    values[name] = str((path.parent / os.path.expanduser(values[name])).resolve())
            values = {**values, **overrides}
        return cls.from_mapping(values, where=str(path))

    @classmethod
    def from_json_file(cls, path: Path) -> "TrainConfig":
        return cls.from_mapping(json.loads(path.read_text()), where=str(path))
