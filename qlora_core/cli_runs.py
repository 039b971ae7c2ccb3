"""`runs …` of the command line: what runs there are, and what is done with one of them. Prints; decides nothing."""

import argparse
import json
import sys
from typing import Any

from qlora_core import queue
from qlora_core.cli_follow import follow
from qlora_core.cli_options import print_json
from qlora_core.differences import run_differences
from qlora_core.errors import RunError
from qlora_core.run_status import CRASHED
from qlora_core.runs import RunStore
from qlora_core.settings import Settings


def add_commands(above: Any, common: argparse.ArgumentParser) -> None:
    parser = above.add_parser("runs", help="list, show, stop, resume, delete, reorder runs")
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
    return follow(run, settings, as_json=options.json)


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
