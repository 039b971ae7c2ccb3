"""The Train form as data: fields of TrainConfig <-> values of components <-> the equal command line. Builds no page."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, LabError
from qlora_core.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE_CONFIG = EXAMPLES / "qlora.yaml"
# Chosen on the Data tab, not in the form.
ELSEWHERE = ("data", "eval_data", "skip_bad_rows", "columns")
# Fields of a run that stand beside the preview they change, on the Data tab.
BESIDE_PREVIEW = ("template", "loss_on")
SIMPLE = ("base_model", "method", "rank", "num_epochs", "max_steps", "name")
# A person's own choice, whatever the data; the others follow the dataset while nobody has changed them.
KEPT = ("base_model", "method", "rank")
SPECS = {spec.name: spec for spec in fields(TrainConfig) if spec.name not in ELSEWHERE}
GROUPS = {
    "data": "Rows",
    "adapter": "Adapter",
    "quantisation": "Quantisation",
    "optimizer": "Optimizer",
    "memory": "Memory and speed",
    "evaluation": "Evaluation and checkpoints",
    "tracking": "Tracking",
}
LABELS = {
    "base_model": "Base model",
    "loss_on": "Loss on",
    "num_epochs": "Epochs",
    "max_steps": "Steps",
    "name": "Name of the run",
    "dataset_license": "Licence of the dataset",
    "max_seq_length": "Longest row, tokens",
    "eval_fraction": "Held-out share",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lr_schedule": "Learning-rate schedule",
    "token_budget": "Token budget a pass",
    "memory_budget_gib": "Memory budget, GiB",
    "eval_steps": "Steps between evaluations",
    "save_steps": "Steps between checkpoints",
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
    "init_lora_weights": "Start of the adapter",
    "quantize_modules": "Layers in 4 bits",
    "int8_modules": "Layers in int8",
    "row_order_seed": "Seed of the row order",
    "loraplus_lr_ratio": "LoRA+ learning-rate ratio",
    "neftune_noise_alpha": "NEFTune noise",
    "keep_checkpoints": "Checkpoints kept",
    "final_adapter": "Adapter at the end",
    "early_stopping_patience": "Early stopping, evaluations",
}
CHOICE_LABELS = {
    "method": [("QLoRA", "qlora"), ("LoRA", "lora")],
    "loss_on": [
        ("all responses", "all_responses"),
        ("the last response", "last_response"),
        ("everything, prompts too", "everything"),
    ],
    "base_model": [("bundled: SmolLM2-135M-Instruct", "bundled")],
}
# What an empty field stands for, where it is not chosen by itself.
EMPTY_MEANS = {
    "row_order_seed": "the seed",
    "loraplus_lr_ratio": "off",
    "neftune_noise_alpha": "off",
    "early_stopping_patience": "off",
    "dataset_license": "unknown",
}
STEPS = {"learning_rate": 0.0001, "warmup_fraction": 0.01, "eval_fraction": 0.05, "lora_dropout": 0.05}


def example_config() -> TrainConfig:
    """The recommended, working choice that the page opens with."""
    return TrainConfig.from_yaml(EXAMPLE_CONFIG)


def bases(settings: Settings) -> list[tuple[str, str]]:
    """(label, value) of base models to choose: the bundled one, and the merged models of runs, newest first."""
    found = [*CHOICE_LABELS["base_model"]]
    for path in sorted(settings.runs.glob("*/merged-*/config.json"), reverse=True):
        try:
            name = TrainConfig.from_json_file(path.parents[1] / "config.json").run_name()
            quantised = "quantization_config" in json.loads(path.read_text())
        except (LabError, OSError, ValueError):  # of another version, or being written or deleted just now
            continue
        if not quantised:  # an export in 4 bits is no base to train on
            found.append((f"{name}, merged onto the {path.parent.name.split('-')[1]} base", str(path.parent)))
    return found


def component(name: str, value: Any) -> gr.components.Component:
    """The input of one field, from its type, limits and help text."""
    spec, label = SPECS[name], LABELS.get(name, name.replace("_", " ").capitalize())
    common = {"label": label, "info": spec.metadata["help"], "elem_id": f"field-{name}", "interactive": True}
    choices = CHOICE_LABELS.get(name) or list(spec.metadata.get("choices", ()))
    if name == "base_model" or "presets" in spec.metadata:
        named = [*spec.metadata.get("presets", ()), *(["none"] if spec.metadata.get("may_be_empty") else [])]
        return gr.Dropdown(choices or named, value=to_form(name, value), allow_custom_value=True, **common)
    if name == "template":  # filled by the choice beside it; a template may have many lines
        common["info"] = "A Jinja chat template; it begins as the model's own."
        return gr.Textbox(value=value, lines=6, max_lines=16, elem_classes="lab-code", **common)
    if choices:
        return gr.Radio(choices, value=value, **common)
    if spec.type is bool:
        return gr.Checkbox(value=value, **common)
    optional = _optional(name) or name == "name"
    # gr.Number shows and sends an empty field as 0, so a number that may be empty is a text.
    if not optional and any(kind in str(spec.type) for kind in ("int", "float")):
        return gr.Number(value=value, step=STEPS.get(name, 1), **common)
    placeholder = EMPTY_MEANS.get(name, "automatic") if optional else None
    return gr.Textbox(value=to_form(name, value), max_lines=1, placeholder=placeholder, **common)


def to_form(name: str, value: Any) -> Any:
    """A field's value as its component holds it."""
    if _optional(name):
        return "" if value is None else str(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(value) or ("none" if SPECS[name].metadata.get("may_be_empty") else "")
    return value


def to_config(values: dict[str, Any], dataset: dict[str, Any]) -> TrainConfig:
    """The form's values and the chosen dataset as a config. Raises ConfigError naming every wrong field."""
    names = [part.strip() for part in (values.get("score_fields") or "").split(",") if part.strip()]
    cleaned = {name: value.strip() or None if _optional(name) else value for name, value in values.items()}
    cleaned |= {"score_fields": names, "name": (values.get("name") or "").strip()}
    problems = [f"{name} is empty; {SPECS[name].metadata['help']}" for name in SPECS if _missing(name, cleaned)]
    try:
        config = TrainConfig.from_mapping(
            {name: value for name, value in cleaned.items() if not _missing(name, cleaned)} | dataset,
            where="Train",
        )
    except ConfigError as error:
        problems += [problem.removeprefix("Train: ") for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    return config


def _optional(name: str) -> bool:
    return bool(SPECS[name].metadata.get("optional"))


def _missing(name: str, values: dict[str, Any]) -> bool:
    return values.get(name) in (None, "") and not _optional(name) and name not in ("name", "score_fields")


def wrong_fields(problems: Iterable[str]) -> list[str]:
    """The fields that problems begin with, so that the page can mark them."""
    found = (re.match(r"[a-z0-9_]+", problem) for problem in problems)
    return [match[0] for match in found if match and match[0] in SPECS]


def command_line(config: TrainConfig, command: str = "train", *words: str) -> str:
    """What does the same in a shell: only options that differ from the defaults, quoted, one a line, after `words` of the
    command's own."""
    default, parts = TrainConfig(), []
    for spec in fields(TrainConfig):
        value, option = getattr(config, spec.name), spec.name.replace("_", "-")
        if value == getattr(default, spec.name):
            continue
        if isinstance(value, bool):
            parts.append(f"--{option}" if value else f"--no-{option}")
        else:
            text = (",".join(value) or "none") if isinstance(value, tuple) else str(value)
            parts.append(f"--{option} {shlex.quote(_short(text) if spec.name in ('data', 'eval_data') else text)}")
    return " \\\n  ".join([f"python -m qlora_core {command}", *words, *parts])


def _short(path: str) -> str:
    """Relative to where the app was started, when it lies below."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def planned_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps that the run will take on that many training rows."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(-(-rows // config.rows_per_step) * config.num_epochs))
