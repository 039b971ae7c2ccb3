"""Endpoints of datasets and runs for gradio_client. Each calls the core once; a LabError tells the client all its problems."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core.config import TrainConfig
from qlora_core.data.inspection import inspect
from qlora_core.errors import ConfigError, LabError
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.ui import run_view
from qlora_core.ui.form import EXAMPLES, example_config
from qlora_core.ui.push_endpoints import add_push_endpoint
from qlora_core.ui.study_endpoints import add_study_endpoints
from qlora_core.ui.train_tab import start_run as begin
from qlora_core.ui.uploads import keep_upload


def add_endpoints(settings: Settings) -> None:
    """Inside a Blocks context. Files come through gr.File, which takes only what was uploaded, never a server's path."""

    @_told
    def inspect_dataset(file: str) -> dict[str, Any]:
        """Check a dataset (JSONL, JSON, CSV, TSV, Parquet, also .gz): form, counts, bad rows with their reasons, duplicates."""
        if not file:
            raise ConfigError("file is missing; pass handle_file('rows.jsonl')")
        return inspect(Path(file), limits=settings.limits).to_json()

    @_told
    def start_run(config: dict[str, Any], file: str | None = None) -> dict[str, Any]:
        """Start or queue a run. `config` holds settings by name (method, rank, max_steps …), `file` is the dataset;
        without a file the example dataset is trained on. The same call while the run is active returns the same run."""
        return begin(_config(config or {}, file, settings), settings).status().to_json()

    @_told
    def run_status(run_id: str) -> dict[str, Any]:
        """Where a run stands: state, step, losses, step time, time left, memory, and one sentence in `detail`."""
        return RunStore(settings).get(run_id).status().to_json()

    @_told
    def stop_run(run_id: str) -> dict[str, Any]:
        """Save and stop a run, or take it out of the queue."""
        detail = RunStore(settings).get(run_id).request_stop()
        return {"run_id": run_id, "detail": detail}

    @_told
    def list_runs() -> dict[str, Any]:
        """All runs, newest first, each as run_status tells it."""
        return {"runs": [status.to_json() for status in run_view.statuses(settings)]}

    _file_endpoints(inspect_dataset, start_run)
    for function in (run_status, stop_run, list_runs):
        gr.api(function, api_name=function.__name__, concurrency_limit=None)
    add_push_endpoint(settings, _told)
    add_study_endpoints(settings, _told, lambda config, file: _config(config, file, settings))


def _file_endpoints(inspect_dataset: Callable[..., Any], start_run: Callable[..., Any]) -> None:
    """gr.api takes no files, so these two have components that are never shown."""
    with gr.Column(visible=False):
        file, optional_file = gr.File(label="file"), gr.File(label="file")
        config, report, status = gr.JSON(label="config"), gr.JSON(label="report"), gr.JSON(label="status")
        trigger = gr.Button()
    trigger.click(inspect_dataset, file, report, api_name="inspect_dataset", concurrency_limit=None)
    trigger.click(start_run, [config, optional_file], status, api_name="start_run", concurrency_limit=None)


def _config(values: dict[str, Any], file: str | None, settings: Settings) -> TrainConfig:
    """Data comes as the upload or is the example: a caller from outside names no file of this machine."""
    if not isinstance(values, dict):
        raise ConfigError(f"config is {type(values).__name__}; expected settings by name, such as {{'rank': 8}}")
    named = [name for name in ("data", "eval_data") if values.get(name)]
    if named:
        raise ConfigError(*(f"{name} names a file on the server; pass the dataset as `file` instead" for name in named))
    if file:
        data = {"data": str(keep_upload(Path(file), settings))}
    else:
        example = example_config()
        data = {"data": example.data, "eval_data": example.eval_data}
        assert Path(example.data).is_relative_to(EXAMPLES)
    return TrainConfig.from_mapping({**values, **data}, where="config")


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A person's mistake as the client's error message, without a traceback."""

    @wraps(function)
    def telling(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LabError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return telling
