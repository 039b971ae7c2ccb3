"""`python -m qlora_core …`: the same core as the page, for scripts. Prints; decides nothing."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_token

from qlora_core import cli_compare, cli_data, cli_estimate, cli_hub, cli_runs, combining, drift, jobs
from qlora_core.cli_follow import queue_and_follow
from qlora_core.cli_options import add_options, print_json, run_config
from qlora_core.config import TrainConfig
from qlora_core.errors import LabError, RunError
from qlora_core.gguf_export import export_gguf
from qlora_core.merging import EXPORTS, merge
from qlora_core.runs import RunStore
from qlora_core.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with the problem on standard error where a person can mend it, 1 where a run crashed."""
    options = parser().parse_args(arguments)
    try:
        settings = Settings.from_environment()
        if getattr(options, "home", None):
            settings = Settings(**{**vars(settings), "home": Path(os.path.expanduser(options.home)).resolve()})
        return options.command(options, settings) or 0
    except LabError as error:
        return _told(error, error.problems)
    except BrokenPipeError:  # `… | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        return _told(error, (f"{error.filename or settings.home}: {error.strerror or error}",))


def _told(error: Exception, problems: Sequence[str]) -> int:
    jobs.end_with(error, problems)
    print("\n".join(problems), file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m qlora_core", description="Fine-tune with LoRA or QLoRA, measured.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object, and only it")
    common.add_argument("--home", help="folder of runs and queue (QLORA_LAB_HOME)")

    cli_data.add_commands(commands, common)
    cli_estimate.add_commands(commands, common)
    cli_compare.add_commands(commands, common)
    cli_hub.add_commands(commands, common)

    command = commands.add_parser("train", parents=[common], help="train a run and follow it; Ctrl-C stops and saves")
    command.add_argument("--config", type=Path, help="YAML of settings; options win over it")
    command.add_argument("--detach", action="store_true", help="queue the run and return at once")
    add_options(command, TrainConfig)
    command.set_defaults(command=_train)

    command = commands.add_parser("merge", parents=[common], help="merge a run's adapter into its base model")
    command.add_argument("run")
    command.add_argument(
        "--onto", choices=("original", "dequantized"), help="default: dequantized for qlora, else and for nf4 original"
    )
    command.add_argument(
        "--export",
        choices=(*EXPORTS, "gguf"),
        default="16bit",
        help="nf4: the merged model in 4 bits, a quarter of the size; gguf: a file for llama.cpp, by its converter",
    )
    command.set_defaults(command=_merge)

    command = commands.add_parser(
        "drift", parents=[common], help="measure how far each way of merging a run is from what was trained"
    )
    command.add_argument("run")
    command.set_defaults(command=_drift)

    command = commands.add_parser("combine", parents=[common], help="add the adapters of several runs into a new one")
    _add_combine_options(command)

    cli_runs.add_commands(commands, common)
    return root


def _add_combine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="id of a run, or its beginning")
    command.add_argument("--weights", required=True, help="one a run: 0.5,0.5 (or --weights=-1,1)")
    methods = "; ".join(f"{name}: {method.help}" for name, method in combining.METHODS.items())
    command.add_argument("--method", default="svd", metavar="METHOD", help=f"default svd. {methods}")
    command.add_argument("--out", required=True, metavar="NAME", help="name of the new run")
    command.add_argument("--density", type=float, help="share of entries kept by methods that drop some, default 0.5")
    command.add_argument(
        "--rank", type=int, help="rank of the result, for svd methods; default: the highest of the runs"
    )
    command.add_argument("--detach", action="store_true", help="queue the run and return at once")
    command.set_defaults(command=_combine)


def _train(options: argparse.Namespace, settings: Settings) -> int:
    # The token of `hf auth login` or HF_TOKEN fetches private and gated bases; the run itself never sees it.
    return queue_and_follow(RunStore(settings).create(run_config(options), token=get_token()), options, settings)


def _combine(options: argparse.Namespace, settings: Settings) -> int:
    store, runs, problems = RunStore(settings), [], []
    for run_id in options.runs:
        try:
            runs.append(store.get(run_id))
        except RunError as error:
            problems.extend(error.problems)
    try:
        weights = [float(weight) for weight in options.weights.split(",")]
    except ValueError:
        problems.append(f"weights is {options.weights!r}; write one number a run, with commas between them: 0.5,0.5")
    if problems:
        raise RunError(*problems)
    how = {"method": options.method, "name": options.out, "density": options.density, "rank": options.rank}
    return queue_and_follow(combining.create_combined(runs, weights, **how), options, settings)


def _merge(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    how = {"onto": options.onto, "report": lambda text: print(text, file=sys.stderr)}
    gguf = options.export == "gguf"
    found = export_gguf(run, **how) if gguf else merge(run, export=options.export, **how)
    print_json({"file" if gguf else "folder": str(found)}) if options.json else print(found)
    return 0


def _drift(options: argparse.Namespace, settings: Settings) -> int:
    reporter = jobs.Reporter(
        lambda p: print(p.doing + (f" ({p.done}/{p.total} {p.unit})" if p.total else ""), file=sys.stderr)
    )
    found = drift.measure(RunStore(settings).get(options.run), report=reporter)
    reporter.end(jobs.DONE, result=found)
    if options.json:
        print_json(found)
        return 0
    for name, *values in (drift.HEADER, *drift.table(found)):
        print(f"{name:38}", *(f"{value:>22}" for value in values))
    print(drift.basis(found))
    return 0
