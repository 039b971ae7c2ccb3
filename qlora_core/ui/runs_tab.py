"""The Runs tab: all runs, and one of them live. A timer compares a cursor and sends only what changed."""

from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core import queue
from qlora_core.charts import HEIGHT, run_charts
from qlora_core.config import TrainConfig
from qlora_core.errors import LabError
from qlora_core.events import Evaluation, Resumed, Step, effective, read_all
from qlora_core.runs import ACTIVE, CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, Run, RunStatus, RunStore
from qlora_core.settings import Settings
from qlora_core.ui import run_view
from qlora_core.ui.data_tab import Chosen
from qlora_core.ui.plots import plot
from qlora_core.ui.status import status_html
from qlora_core.ui.words import problems_panel

# Before the page has asked which run its address names, a tick must not choose one.
NOT_ATTACHED = "?"
SELECT = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('tr[data-run]');
  if (row) trigger('select', { run: row.dataset.run });
});
"""
SHOW_IN_URL = """(run) => {
  const url = new URL(window.location);
  if (run.length > 1) { url.searchParams.set('run', run); } else { url.searchParams.delete('run'); }
  window.history.replaceState(window.history.state, '', url);
}"""


class RunsTab:
    """Builds the tab. `selected` holds the id of the run that is shown; it lives in the browser, not here."""

    def __init__(self, settings: Settings, status: gr.HTML) -> None:
        self.settings, self.status = settings, status
        self.selected = gr.Textbox(NOT_ATTACHED, visible="hidden", elem_id="selected-run", label="selected run")
        self.cursor = gr.State({})
        self.table = gr.HTML(run_view.NO_RUNS, js_on_load=SELECT, elem_id="runs-table")
        with gr.Column(visible=False, elem_id="run-page") as self.page:
            self.head = gr.HTML("", min_height=112, elem_id="run-head")
            with gr.Row(elem_id="run-buttons"):
                self.stop = gr.Button("Stop and save", min_width=130, size="md", visible=False, elem_id="stop")
                self.resume = gr.Button(
                    "Resume", variant="primary", min_width=130, size="md", visible=False, elem_id="resume"
                )
                self.download = gr.Button(
                    "Download adapter",
                    variant="primary",
                    min_width=130,
                    size="md",
                    visible=False,
                    elem_id="run-download",
                )
                self.publish = gr.Button("Merge …", min_width=110, size="md", visible=False, elem_id="run-publish")
                self.copy = gr.Button("Copy settings", min_width=130, size="md", elem_id="copy")
                self.delete = gr.Button("Delete", min_width=100, size="md", visible=False, elem_id="delete")
            with gr.Row(visible=False) as self.confirm:
                gr.HTML('<p class="lab-warn" style="padding-top:8px">Delete this run with its adapter for good?</p>')
                self.really = gr.Button(
                    "Delete for good", variant="stop", min_width=130, size="md", elem_id="really-delete"
                )
                self.keep = gr.Button("Keep it", min_width=100, size="md")
            self.problem = gr.HTML("", elem_id="run-problem")
            with gr.Row():
                self.charts = [_chart(0), _chart(1)]
            with gr.Row():
                self.charts += [_chart(2), _chart(3)]
            with gr.Row():
                with gr.Column(min_width=320):
                    gr.HTML('<div class="lab-step">What happened</div>')
                    self.log = gr.HTML("", min_height=302, elem_id="run-log")
                with gr.Column(min_width=320):
                    gr.HTML('<div class="lab-step">What came out</div>')
                    self.result = gr.HTML("", min_height=302, elem_id="run-result")
            with gr.Accordion("Sample answers", open=False, elem_id="answers"):
                self.answers = gr.HTML("")
            with gr.Accordion("Raw log of the worker", open=False, elem_id="raw-log") as self.raw_log:
                self.raw = gr.HTML("")

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [
            self.cursor, self.selected, self.status, self.table, self.page, self.head, self.stop, self.resume,
            self.download, self.publish, self.delete, *self.charts, self.log, self.result, self.answers, self.raw,
            self.raw_log,
        ]  # fmt: skip

    def connect(self, hidden: dict[str, Any]) -> None:
        state = [self.selected, self.cursor]
        self.table.select(self.choose, None, [self.selected, self.problem, self.confirm], **hidden)
        # The address names the run, so that a reload and a shared link show it again.
        self.selected.change(None, self.selected, None, js=SHOW_IN_URL, **hidden).then(
            self.tick, state, self.outputs, **hidden
        )
        for button, action in ((self.stop, self.stop_chosen), (self.resume, self.resume_chosen)):
            button.click(action, self.selected, self.problem, **hidden).then(self.tick, state, self.outputs, **hidden)
        self.delete.click(lambda: gr.Row(visible=True), None, self.confirm, **hidden)
        self.keep.click(lambda: gr.Row(visible=False), None, self.confirm, **hidden)
        self.really.click(self.delete_run, self.selected, [self.selected, self.problem, self.confirm], **hidden)
        gr.Timer(1).tick(self.tick, state, self.outputs, queue=False, **hidden)

    def choose(self, event: gr.EventData) -> tuple[str, str, Any]:
        return event.run, "", gr.Row(visible=False)

    def tick(self, selected: str, cursor: dict[str, Any]) -> Any:
        """Outputs that changed since `cursor`; gr.skip() when none did. Also keeps the queue going."""
        if selected == NOT_ATTACHED:
            return gr.skip()
        if queue.waiting(self.settings):
            queue.start_next(self.settings)
        found = run_view.statuses(self.settings)
        status = next((s for s in found if s.run_id == selected), None) or default_run(found)
        selected_now = status.run_id if status else ""
        parts: dict[Any, Any] = {
            self.status: status_html(found),
            self.table: run_view.table_html(found, selected_now),
        }
        parts |= self._page_parts(status, cursor)
        # Only strings are compared; components and figures come with a marker of their own.
        changed = {part: value for part, value in parts.items() if not _same(part, value, cursor)}
        if selected_now != selected:
            changed[self.selected] = selected_now
        if not changed:
            return gr.skip()
        seen = {str(part._id): hash(value) for part, value in parts.items() if isinstance(value, str)}
        return {**changed, self.cursor: {**cursor, **seen, "run": _marker(status), "drawn": self._drawn(status)}}

    def _page_parts(self, status: RunStatus | None, cursor: dict[str, Any]) -> dict[Any, Any]:
        if status is None:
            return {self.page: gr.Column(visible=False)} if cursor.get("run") != _marker(None) else {}
        run = Run(self.settings.runs / status.run_id, self.settings)
        parts: dict[Any, Any] = {self.head: run_view.head_html(status)}
        if cursor.get("run") != _marker(status):
            parts |= {self.page: gr.Column(visible=True), **self._buttons(status, run)}
            parts[self.result] = run_view.result_html(run, status)
            # A crash has no reason but what the worker printed last.
            parts[self.raw_log] = gr.Accordion(open=status.state == CRASHED)
        if cursor.get("drawn") != self._drawn(status) or cursor.get("run") != _marker(status):
            told = read_all(run.events_path)
            history = effective(told)
            parts |= {self.log: run_view.log_html(told), self.raw: run_view.raw_log_html(run)}
            parts[self.answers] = run_view.answers_html(run, history)
            if self._charted(history) != cursor.get("charted") or not cursor.get("run", "").startswith(run.run_id):
                figures = run_charts(history, method=status.method, revision=run.run_id)
                parts |= {chart: figure.to_json() for chart, figure in zip(self.charts, figures, strict=True)}
                cursor["charted"] = self._charted(history)
        return parts

    def _buttons(self, status: RunStatus, run: Run) -> dict[Any, Any]:
        ended = status.state not in ACTIVE
        has_adapter = ended and (run.adapter / "adapter_model.safetensors").exists()
        stop_label = "Take out of the queue" if status.state == QUEUED else "Stop and save"
        return {
            self.stop: gr.Button(stop_label, visible=status.state in (RUNNING, QUEUED)),
            self.resume: gr.Button(visible=status.state in (STOPPED, FAILED, CRASHED)),
            self.download: gr.Button(
                visible=has_adapter, variant="primary" if status.state == FINISHED else "secondary"
            ),
            self.publish: gr.Button(visible=has_adapter),
            self.delete: gr.Button(visible=ended),
        }

    def _drawn(self, status: RunStatus | None) -> Any:
        if status is None:
            return None
        path = self.settings.runs / status.run_id / "events.jsonl"
        return (status.run_id, path.stat().st_size if path.exists() else 0)

    @staticmethod
    def _charted(history: list[Any]) -> int:
        return sum(isinstance(event, (Step, Evaluation, Resumed)) for event in history)

    def stop_chosen(self, selected: str) -> str:
        return self._try(lambda run: run.request_stop(), selected)

    def resume_chosen(self, selected: str) -> str:
        def again(run: Run) -> None:
            queue.resume(run)
            queue.start_next(self.settings)

        return self._try(again, selected)

    def delete_run(self, selected: str) -> tuple[str, str, Any]:
        problem = self._try(lambda run: RunStore(self.settings).delete(run), selected)
        return (selected if problem else ""), problem, gr.Row(visible=False)

    def _try(self, action: Any, selected: str) -> str:
        """Do it; a problem is told beside the buttons."""
        try:
            action(RunStore(self.settings).get(selected))
        except LabError as error:
            return problems_panel(error.problems, title="That does not work")
        return ""

    def settings_of(self, selected: str) -> tuple[Chosen | None, TrainConfig] | None:
        """(dataset, config) of a run for the Train form; no dataset when its file is gone. None without a run."""
        try:
            config = RunStore(self.settings).get(selected).config()
        except LabError:
            return None
        rows = RunStore(self.settings).get(selected).dataset()
        if not Path(config.data).is_file():
            return None, config
        total = rows.train_rows if config.eval_data else rows.train_rows + rows.eval_rows
        return Chosen(config.data, config.eval_data, total, False, config.skip_bad_rows), config


def _chart(number: int) -> gr.HTML:
    name = ("loss", "rate", "time", "memory")[number]
    empty = run_charts((), method="lora", revision="")[number]
    return plot(empty, height=HEIGHT, elem_id=f"chart-{name}", label=empty.layout.title.text)


def default_run(found: list[RunStatus]) -> RunStatus | None:
    """The run that runs, else the next in the queue, else the newest."""
    running = [status for status in found if status.state == RUNNING]
    waiting = sorted((s for s in found if s.state == QUEUED), key=lambda s: s.queue_place or 0)
    return next(iter(running or waiting or found), None)


def _marker(status: RunStatus | None) -> str:
    """Changes when other buttons fit."""
    return f"{status.run_id} {status.state}" if status else "none"


def _same(part: Any, value: Any, cursor: dict[str, Any]) -> bool:
    return isinstance(value, str) and cursor.get(str(part._id)) == hash(value)
