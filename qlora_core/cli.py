"""`python -m qlora_core …`: the same core as the page, for scripts. Prints; decides nothing."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import get_token
from tqdm import tqdm

from qlora_core import cli_compare, cli_data, cli_estimate, cli_hub, combining, drift, events, jobs, queue
from qlora_core.cli_options import add_options, print_json, run_config
from qlora_core.config import TrainConfig
from qlora_core.differences import run_differences
from qlora_core.errors import LabError, RunError
from qlora_core.gguf_export import export_gguf
from qlora_core.merging import EXPORTS, merge
from qlora_core.run_status import ACTIVE, CRASHED, FAILED
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings

POLL_SECONDS = 0.5


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

    _add_runs_commands(commands.add_parser("runs", help="list, show, stop, resume, delete, reorder runs"), common)
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


def _add_runs_commands(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="ACTION")
    for name, function, help_text in (
        ("list", _list, "all runs, newest first"),
        ("queue", _queue, "waiting runs in order"),
        ("start-next", _start_next, "start what waits, where a device is free"),
    ):
        commands.add_parser(name, parents=[common], help=help_text).set_defaults(command=function)
    for name, function, help_text in (
        ("show", _show, "state, settings and results of a run"),
        ("stop", _stop, "save and stop a run, or take it out of the queue"),
        ("resume", _resume, "go on from the newest checkpoint, or for more steps, and follow"),
        ("delete", _delete, "remove a run and its files"),
        ("move", _move, "give a waiting run another place"),
    ):
        command = commands.add_parser(name, parents=[common], help=help_text)
        command.add_argument("run", help="id of the run, or its beginning")
        if name == "move":
            command.add_argument("place", type=int)
        if name == "resume":
            command.add_argument(
                "--max-steps", type=int, metavar="N", help="steps in all: continues a finished run, or changes the end"
            )
        command.set_defaults(command=function)
    command = commands.add_parser("diff", parents=[common], help="settings, rows, device and versions that differ")
    command.add_argument("run", help="id of a run, or its beginning")
    command.add_argument("other", help="id of another")
    command.set_defaults(command=_diff)


def _train(options: argparse.Namespace, settings: Settings) -> int:
    # The token of `hf auth login` or HF_TOKEN fetches private and gated bases; the run itself never sees it.
    return _queue_and_follow(RunStore(settings).create(run_config(options), token=get_token()), options, settings)


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
    return _queue_and_follow(combining.create_combined(runs, weights, **how), options, settings)


def _queue_and_follow(run: Run, options: argparse.Namespace, settings: Settings) -> int:
    queue.add(run)
    queue.start_next(settings)
    if options.detach:
        print_json(run.status().to_json()) if options.json else print(run.run_id)
        return 0
    return _follow(run, settings, as_json=options.json)


def _follow(run: Run, settings: Settings, *, as_json: bool) -> int:
    """Show the run until it ends. Ctrl-C asks it to save and stop; a second one leaves it running."""
    with _stopping_on_interrupt(run):
        _watch(run, settings)
    status, result = run.status(), run.result()
    if as_json:
        print_json({"status": status.to_json(), "result": result})
    if status.state in (FAILED, CRASHED):
        print(status.detail, file=sys.stderr)
        if status.state == CRASHED:
            print(f"end of {run.path / 'log.txt'}:\n{run.log_tail(20)}", file=sys.stderr)
            return 1
        return 2
    if not as_json:
        print(f"{run.run_id}: {status.detail}" + (f"\nadapter: {run.adapter}" if run.adapter.exists() else ""))
    return 0


@contextlib.contextmanager
def _stopping_on_interrupt(run: Run) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{run.run_id}: {run.request_stop()}; Ctrl-C again leaves it to itself", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            while run.status().state in ACTIVE:
                time.sleep(POLL_SECONDS)


def _watch(run: Run, settings: Settings) -> None:
    """A progress bar on standard error until the run is no longer queued or running."""
    offset, bar, place = 0, None, None
    while True:
        status = run.status()
        active = status.state in ACTIVE
        if status.queue_place != place and (place := status.queue_place):
            tqdm.write(status.detail, file=sys.stderr)
        found, offset = run.events(offset)
        for event in found:
            if isinstance(event, events.Started):
                bar = bar or tqdm(total=event.total_steps, unit="step", dynamic_ncols=True, file=sys.stderr)
                for line in (f"{event.device}, {event.compute_dtype}", *event.path):
                    tqdm.write(line, file=sys.stderr)
            elif isinstance(event, events.Step) and bar is not None:
                bar.update(event.step - bar.n)
                bar.set_postfix_str(f"loss {event.loss:.3f}")
            elif (line := _line(event)) is not None:
                tqdm.write(line, file=sys.stderr)
        if not active:
            if bar is not None:
                bar.close()
            return
        queue.start_next(settings)
        time.sleep(POLL_SECONDS)


def _line(event: events.Event) -> str | None:
    if isinstance(event, events.Evaluation):
        return f"step {event.step}: evaluation loss {event.loss:.4f} ({event.seconds:.1f} s)"
    if isinstance(event, events.Score):
        return f"step {event.step}: score {event.correct}/{event.total} ({event.seconds:.0f} s)"
    if isinstance(event, events.Note):
        return event.text
    if isinstance(event, events.Resumed):
        return "; ".join([f"goes on after step {event.from_step}", *event.skipped])
    if isinstance(event, events.Phase) and event.done == 0:
        return event.name
    return None


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


def _list(options: argparse.Namespace, settings: Settings) -> int:
    statuses = []
    for run in RunStore(settings).list():
        try:
            statuses.append(run.status())
        except RunError as error:
            print(error, file=sys.stderr)
    if options.json:
        print_json({"runs": [status.to_json() for status in statuses]})
        return 0
    if not statuses:
        print(f"no runs in {settings.runs} yet; `make demo`, or `python -m qlora_core train --data FILE`")
    for status in statuses:
        loss = f"{status.eval_loss:.4f}" if status.eval_loss is not None else "-"
        print(f"{status.run_id:60} {status.state:9} {status.step:>6} steps  eval loss {loss:>8}  {status.detail}")
    return 0


def _queue(options: argparse.Namespace, settings: Settings) -> int:
    waiting = sorted(
        (s for run in RunStore(settings).list() if (s := run.status()).queue_place), key=lambda s: s.queue_place
    )
    if options.json:
        print_json({"queue": [status.to_json() for status in waiting]})
        return 0
    for status in waiting:
        print(f"{status.queue_place}. {status.run_id}")
    if not waiting:
        print("nothing waits")
    return 0


def _start_next(options: argparse.Namespace, settings: Settings) -> int:
    started = [run.run_id for run in queue.start_next(settings)]
    print_json({"started": started}) if options.json else print("\n".join(started))
    return 0


def _show(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    status = run.status()
    if options.json:
        print_json({"status": status.to_json(), "config": run.config().to_json(), "result": run.result()})
        return 0
    print(f"{status.run_id}\n{status.state}: {status.detail}\n\n{run.config().to_yaml()}")
    result = run.result()
    if result is not None:
        print(json.dumps(result["train_info"], indent=1))
    if status.state == CRASHED:
        print(f"end of the log:\n{run.log_tail(20)}")
    return 0


def _diff(options: argparse.Namespace, settings: Settings) -> int:
    runs = [RunStore(settings).get(name) for name in (options.run, options.other)]
    found = run_differences(*runs)
    if options.json:
        print_json({"runs": [run.run_id for run in runs], "differences": [entry._asdict() for entry in found]})
        return 0
    for entry in found:
        first, second = entry.words()
        print(f"{entry.field}\n  {first}\n  {second}")
    if not found:
        print("no setting differs")
    return 0


def _stop(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    what = run.request_stop()
    print_json({"run_id": run.run_id, "detail": what}) if options.json else print(f"{run.run_id}: {what}")
    return 0


def _resume(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    queue.resume(run, max_steps=options.max_steps)
    queue.start_next(settings)
    return _follow(run, settings, as_json=options.json)


def _delete(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    RunStore(settings).delete(run)
    print_json({"deleted": run.run_id}) if options.json else print(f"{run.run_id}: deleted")
    return 0


def _move(options: argparse.Namespace, settings: Settings) -> int:
    run = RunStore(settings).get(options.run)
    if options.place < 1:
        raise RunError(f"place is {options.place}; 1 is the next to start")
    queue.move(run, options.place)
    return _queue(options, settings)
