"""`python -m qlora_core.worker RUN_DIR [LOCK_DESCRIPTOR …]`: train, combine or compare, then let the queue go on."""

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from qlora_core import events, queue
from qlora_core.errors import LabError
from qlora_core.runs import Run
from qlora_core.settings import Settings


class StopRequest:
    """True once a person asked the run to stop: a file in its directory, or SIGTERM."""

    def __init__(self, run: Run) -> None:
        self._file = run.path / "stop"
        self._signalled = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._file.exists()


def main(run_directory: str, *locks: str) -> None:
    """An error that a person can mend ends the run as failed; any other leaves its traceback in the log, as a crash."""
    settings = Settings.from_environment()
    run = Run(Path(run_directory), settings)
    stop = StopRequest(run)
    failed = False
    try:
        if run.analysis():
            from qlora_core.worker.analysing import analyse as work
        elif run.combination():
            from qlora_core.worker.combining import combine as work
        else:
            from qlora_core.worker.training import train as work

        work(run, stop)
    except LabError as error:
        failed = True
        steps = [event.step for event in run.history() if isinstance(event, events.Step)]
        events.append(run.events_path, events.Failed(step=max(steps, default=0), reason=str(error)))
        print(f"failed: {error}", flush=True)
    except Exception:
        failed = True
        traceback.print_exc()
    (run.path / "stop").unlink(missing_ok=True)
    for descriptor in locks:
        os.close(int(descriptor))
    if queue.waiting(settings):
        # A fresh program image, so that this one's GPU memory is free before the next worker looks for it.
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "qlora_core", "runs", "start-next"])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
