"""Settings as options of the command line, in kebab case. The settings themselves check the values."""

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig
from qlora_core.data.hub_source import PREFIX
from qlora_core.options import Options


def add_options(command: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Every field as an option of the same name."""
    for spec in fields(kind):  # type: ignore[arg-type]
        option = f"--{spec.name.replace('_', '-')}"
        choices = spec.metadata.get("choices", ())
        told = [
            *([", ".join(choices)] if choices else []),
            *([f"default {spec.default}"] if spec.default not in (None, "", ()) else []),
        ]
        help_text = (spec.metadata["help"] + (f" ({'; '.join(told)})" if told else "")).replace("%", "%%")
        if spec.type is bool:
            command.add_argument(
                option, dest=f"config_{spec.name}", action=argparse.BooleanOptionalAction, default=None, help=help_text
            )
        else:
            command.add_argument(option, dest=f"config_{spec.name}", metavar="VALUE", help=help_text)


def given_options(options: argparse.Namespace, kind: type[Options]) -> dict[str, Any]:
    """The fields that were given, by name; a list of names is split at its commas."""
    given = {spec.name: getattr(options, f"config_{spec.name}") for spec in fields(kind)}  # type: ignore[arg-type]
    lists = {spec.name for spec in fields(kind) if spec.type == tuple[str, ...]}  # type: ignore[arg-type]
    return {
        name: [part.strip() for part in value.split(",") if part.strip()] if name in lists else value
        for name, value in given.items()
        if value is not None
    }


def run_config(options: argparse.Namespace) -> TrainConfig:
    """The settings of a run: `--config`, and the options, which win over it. Raises ConfigError."""
    values = given_options(options, TrainConfig)
    for name in ("data", "eval_data"):
        if name in values and not values[name].startswith(PREFIX):
            values[name] = str(Path(os.path.expanduser(values[name])).resolve())
    if options.config:
        return TrainConfig.from_yaml(options.config, **values)
    return TrainConfig.from_mapping(values, where="the options")


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))
