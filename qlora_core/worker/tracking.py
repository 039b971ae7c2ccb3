"""A run's losses in a tracker (trackio, wandb, mlflow, tensorboard), told what the run says; never a reason for it to end."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from qlora_core import events
from qlora_core.runs import Run

# A tracker that waits for its server, at first or at the end, must not keep the device.
PATIENCE_SECONDS = 30.0
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
# (name, step) of values that a tracker holds already.
Held = set[tuple[str, int]]


class Tracking:
    """What the run says goes to the tracker that its config names; with tracker "none", nowhere.

    The tracker is opened with the first value. One that has the run from an earlier attempt goes on in it: it gets what it
    lacks of the run's history, and no value of a step twice. A value that it has stays as it was first told.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.is_on = run.config().tracker != "none"
        self.tracker: GeneralTracker | None = None
        self.held: Held = set()
        self.read_held: Callable[[], Held] | None = None

    def log(self, event: events.Event) -> None:
        """Pass the event on; it stands in the run's history already."""
        if self.is_on and values_of(event):
            self._guarded("logging", lambda: self._send(*self._untold(event)))

    def finish(self) -> None:
        """Let the tracker write what it still holds back. May be called twice."""
        if self.is_on and self.tracker is not None:
            self._guarded("finishing", self._finish)
        self.is_on = False

    def _finish(self) -> None:
        self.tracker.finish()
        # trackio only warns, in the worker's log, when its disk is full; but it can be asked what it has.
        if self.read_held and (lost := self.held - self.read_held()):
            self._note(f"{len(lost):,} of {len(self.held):,} values did not arrive; the worker's log says why")

    def _untold(self, event: events.Event) -> list[events.Event]:
        """The event itself; with the first, all that the run has said before it too."""
        if self.tracker is not None:
            return [event]
        self.tracker, self.held, self.read_held = OPEN[self.run.config().tracker](self.run)
        return self.run.history()

    def _send(self, *history: events.Event) -> None:
        for event in history:
            values = {name: v for name, v in values_of(event).items() if (name, event.step) not in self.held}
            if values:
                self.tracker.log(values, step=event.step)
                self.held |= {(name, event.step) for name in values}

    def _guarded(self, doing: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, network or disk or the tracker itself: the training goes on
            self.is_on = False
            reason = without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")
            self._note(f"{doing} failed: {reason}; tracking is off from here")

    def _note(self, text: str) -> None:
        name = self.run.config().tracker
        events.append(
            self.run.events_path, events.Note(text=f"tracker {name}: {text}. The run's own record is complete")
        )


def without_secrets(text: str) -> str:
    """A server's error may quote the key, or an address with name and password in it."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s]+@", "//***@", text)


def values_of(event: events.Event) -> dict[str, float]:
    """Name -> number, for the events that have numbers to track; what was not measured is left out."""
    if isinstance(event, events.Evaluation):
        return {"eval_loss": event.loss}
    if isinstance(event, events.Score):
        return {f"score_{event.name}": event.correct / event.total} if event.total else {}
    if not isinstance(event, events.Step):
        return {}
    names = ("epoch", "loss", "learning_rate", "grad_norm", "step_seconds", "supervised_tokens")
    memory = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes")
    values = {name: getattr(event, name) for name in (*names, *memory)}
    values["tokens_per_second"] = event.tokens / event.step_seconds
    return {name: value for name, value in values.items() if value is not None}


def hyperparameters(run: Run) -> dict[str, bool | int | float | str]:
    """The run's config as trackers take it: lists as text, and nothing where nothing was chosen."""
    values = {name: ",".join(v) if isinstance(v, list) else v for name, v in run.config().to_json().items()}
    return {name: value for name, value in values.items() if value not in (None, "")}


Opened = tuple[GeneralTracker, Held, Callable[[], Held] | None]


def _open_tensorboard(run: Run) -> Opened:
    """Below `<run>/tensorboard`. An earlier attempt's values are purged (`purge_step`), and the history written again."""
    tracker = TensorBoardTracker("tensorboard", run.path, purge_step=0)
    tracker.start()
    from torch.utils.tensorboard.summary import hparams

    # `store_init_configuration` would make two more folders, apart from the curves.
    for summary in hparams(hyperparameters(run), {}):
        tracker.writer.file_writer.add_summary(summary)
    return tracker, set(), None


def _open_trackio(run: Run) -> Opened:
    """Below `<home>/trackio`, unless TRACKIO_DIR says where."""
    os.environ.setdefault("TRACKIO_DIR", str(run.settings.home / "trackio"))
    project = run.config().tracker_project
    tracker = TrackioTracker(
        project,
        name=run.run_id,
        config=hyperparameters(run),
        resume="allow",
        embed=False,
        auto_log_gpu=False,  # the run's own figures are what it measures
        auto_log_cpu=False,
    )
    tracker.start()
    from trackio.sqlite_storage import SQLiteStorage

    def held() -> Held:
        logs = SQLiteStorage.get_logs(project, run.run_id, run_id=tracker.run.id)
        return {(name, entry["step"]) for entry in logs for name in entry}

    return tracker, held(), held


def _open_wandb(run: Run) -> Opened:
    """Files below `<run>/wandb`; key and mode come from the environment. Nothing of machine, git or code is sent."""
    import wandb

    private = {
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
        "host": "qlora-lab",
    }
    tracker = WandBTracker(
        run.config().tracker_project,
        id=run.run_id,
        name=run.run_id,
        dir=str(run.path),
        config=hyperparameters(run),
        resume="allow",
        allow_val_change=True,
        settings=wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            init_timeout=PATIENCE_SECONDS,
            finish_timeout=PATIENCE_SECONDS,
            finish_timeout_raises=True,
            **private,
        ),
    )
    tracker.start()
    # Its server cannot be asked when offline. What earlier attempts said has been told; it takes no step twice itself.
    said = run.events()[0]
    launched = max((i for i, event in enumerate(said) if isinstance(event, events.Launched)), default=0)
    return tracker, {(name, event.step) for event in said[:launched] for name in values_of(event)}, None


def _open_mlflow(run: Run) -> Opened:
    """In `<home>/mlflow`, unless MLFLOW_TRACKING_URI says where."""
    folder = run.settings.home / "mlflow"
    is_ours = "MLFLOW_TRACKING_URI" not in os.environ
    if is_ours:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    # Its own limits would hold up each step for many minutes when a server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    client, project = mlflow.MlflowClient(), run.config().tracker_project
    experiment = client.get_experiment_by_name(project)
    named = f"attributes.run_name = '{run.run_id}'"
    found = client.search_runs([experiment.experiment_id], named) if experiment else []
    tracker = MLflowTracker(
        project,
        logging_dir=Path(folder / "artifacts").as_uri() if is_ours else None,
        run_id=found[0].info.run_id if found else None,
        run_name=run.run_id,
        # mlflow would take the name of the person and the path of the program.
        tags={"mlflow.user": "", "mlflow.source.name": "qlora-lab"},
    )
    tracker.start()
    if not found:
        tracker.store_init_configuration(hyperparameters(run))
    names = found[0].data.metrics if found else ()
    held = {(name, m.step) for name in names for m in client.get_metric_history(found[0].info.run_id, name)}
    return tracker, held, None


OPEN: dict[str, Callable[[Run], Opened]] = {
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
