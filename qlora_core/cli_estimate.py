"""`estimate` of the command line: how much memory a run would need, part by part, before it starts. Loads no model."""

import argparse
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from qlora_core import architecture, devices, precision
from qlora_core.cli_options import add_options, print_json, run_config
from qlora_core.config import TrainConfig
from qlora_core.data.formats import read_rows
from qlora_core.data.locate import locate
from qlora_core.data.rows import Example, counted
from qlora_core.data.sample import RowFacts, sample
from qlora_core.errors import ConfigError
from qlora_core.memory import GIB, MIB
from qlora_core.planner import fitting
from qlora_core.planner.device import card_of, device_for
from qlora_core.planner.facts import Facts, held_out_rows
from qlora_core.settings import Settings
from qlora_core.tokens import load_tokenizer
from qlora_core.wording import MEMORY_PARTS

# What each part is, beside its bytes.


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "estimate", parents=[common], help="memory that a run would need, part by part; no model is loaded"
    )
    command.add_argument("--config", type=Path, help="YAML of settings; options win over it")
    command.add_argument(
        "--gpu-memory-gib", type=float, metavar="GIB", help="plan for a card of so much memory; default: what is here"
    )
    add_options(command, TrainConfig)
    command.set_defaults(command=_estimate)


def _estimate(options: argparse.Namespace, settings: Settings) -> int:
    facts = facts_for(run_config(options), options.gpu_memory_gib, settings)
    found = report(facts)
    print_json(found) if options.json else _print(found)
    return 0


def facts_for(config: TrainConfig, gpu_memory_gib: float | None, settings: Settings) -> Facts:
    """Raises LabError where the model, the rows or the settings are not usable."""
    if gpu_memory_gib is not None and not gpu_memory_gib > 0:
        raise ConfigError(f"--gpu-memory-gib is {gpu_memory_gib:g}; it must be above 0")
    shape = architecture.read(config.base_model, settings)
    precision.check(shape.layers, config)
    rows, train_rows, eval_rows = _rows(config, settings) if config.data else (None, 0, 0)
    return Facts(
        config=config,
        device=card_of(gpu_memory_gib) if gpu_memory_gib is not None else device_for(config),
        train_rows=train_rows,
        eval_rows=eval_rows,
        free_disk_bytes=devices.free_disk_bytes(settings.home),
        rows=rows,
        architecture=shape,
    )


def _rows(config: TrainConfig, settings: Settings) -> tuple[RowFacts, int, int]:
    """(a sample of the rows, how many are trained on, how many of them are held out)"""
    located = locate(config, settings, token=get_token())
    tokenizer = load_tokenizer(architecture.tokenizer_folder(config.base_model, settings), config.template)
    found = read_rows(located.data, limits=settings.limits, columns=config.columns)[1]
    examples = (row for row in found if isinstance(row, Example))
    rows = sample(examples, tokenizer, loss_on=config.loss_on)
    usable = len(rows.lines) + len(rows.refused) + sum(1 for _ in examples)
    held_out = 0 if located.eval_data else held_out_rows(usable, config)
    return rows, usable - held_out, held_out


def report(facts: Facts) -> dict[str, Any]:
    """Everything that `estimate` prints; bytes throughout."""
    found, config, shape = fitting.planned(facts), facts.config, facts.architecture
    estimate, ranks = found.estimate, fitting.rank_for_memory(facts)
    return {
        "base_model": config.base_model,
        "method": config.method,
        "rank": config.rank,
        "device": facts.device.name,
        "kind_of_memory": "GPU" if estimate.is_gpu else "host",
        "rows": len(facts.rows.lines) if facts.rows else 0,
        "tokens_of_largest_pass": estimate.tokens,
        "parts": {name: size for name, size in estimate.parts().items() if size},
        "total_bytes": estimate.total_bytes,
        "context_bytes": estimate.context_bytes,
        "needed_bytes": estimate.needed_bytes,
        "usable_bytes": fitting.usable_bytes(facts),
        "host_bytes": estimate.host_bytes,
        "fits": found.fits,
        "plan": vars(found.plan),
        "reason": found.reason,
        "largest_rank": ranks.largest,
        "rank_for_rows": ranks.for_rows if facts.rows else None,
        "for_comparison": {
            "full_fine_tuning_bytes": fitting.full_fine_tuning_bytes(shape),
            "rule_of_thumb_bytes": fitting.rule_of_thumb_bytes(shape, config),
        },
    }


def _print(found: dict[str, Any]) -> None:
    gpu = found["kind_of_memory"] == "GPU"
    rows = (
        f"{counted(found['rows'], 'row')} looked at" if found["rows"] else "no data named: rows as long as they may be"
    )
    print(f"{found['base_model']}, {found['method']}, rank {found['rank']}, on {found['device']} (an estimate; {rows})")
    for name, size in found["parts"].items():
        _line(name, size, MEMORY_PARTS[name][1])
    _line(
        "peak",
        found["total_bytes"],
        f"of {'allocated GPU' if gpu else 'host'} memory, in passes of {found['tokens_of_largest_pass']:,} tokens",
    )
    if gpu:
        _line("context", found["context_bytes"], "and fragmentation, on top")
    if found["host_bytes"]:
        _line("host", found["host_bytes"], "in host memory instead")
    needed, usable = (found[name] / GIB for name in ("needed_bytes", "usable_bytes"))
    fits = f"Fits: {needed:.2f} GiB of the {usable:.2f} that may be used. " if found["fits"] else ""
    print(f"{fits}{found['reason'][0].upper()}{found['reason'][1:]}.")
    if found["largest_rank"]:
        enough = f"; {found['rank_for_rows']} is enough for these rows" if found["rank_for_rows"] else ""
        print(f"Highest rank that fits: {found['largest_rank']}{enough}.")
    print("For comparison, without activations and logits:")
    thumb = fitting.rule_of_thumb(found["method"])
    others = found["for_comparison"]
    _line(
        "rule of thumb",
        others["rule_of_thumb_bytes"],
        f"{thumb}: weights and optimizer states, as if matrices were square",
    )
    _line(
        "full fine-tuning", others["full_fine_tuning_bytes"], "12 bytes a weight: weights, gradients, optimizer states"
    )


def _line(name: str, size: int, what: str) -> None:
    amount = f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"
    print(f"  {name:<24}{amount:>11}   {what}")
