"""A run on the command line from its start to its end: a bar, its events as lines, Ctrl-C saves and stops."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from qlora_core import events, queue
from qlora_core.cli_options import print_json
from qlora_core.run_status import ACTIVE, CRASHED, FAILED
from qlora_core.runs import Run
from qlora_core.settings import Settings

POLL_SECONDS = 0.5


def queue_and_follow(run: Run, options: argparse.Namespace, settings: Settings) -> int:
    queue.add(run)
    queue.start_next(settings)
    if options.detach:
        print_json(run.status().to_json()) if options.json else print(run.run_id)
        return 0
    return follow(run, settings, as_json=options.json)


def follow(run: Run, settings: Settings, *, as_json: bool) -> int:
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
