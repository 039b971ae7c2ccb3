"""The Runs tab: all runs, and one of them live. A timer compares a cursor and sends only what changed."""

from dataclasses import replace
from typing import Any

import gradio as gr

from qlora_core import queue
from qlora_core.charts import HEIGHT, run_charts
from qlora_core.config import TrainConfig
from qlora_core.errors import LabError, RunError
from qlora_core.events import Evaluation, Resumed, Step, effective, read_all
from qlora_core.run_status import ACTIVE, CRASHED, FAILED, FINISHED, QUEUED, RUNNING, STOPPED, RunStatus
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui import run_view
from qlora_core.ui.address import NOT_ATTACHED, in_address
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.combine import CombinePart
from qlora_core.ui.comparing import differences_html
from qlora_core.ui.plots import plot
from qlora_core.ui.result_view import result_html
from qlora_core.ui.status import status_html
from qlora_core.ui.waiting import ACT, act_on, waiting_html
from qlora_core.ui.words import problems_panel, short

SELECT = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('tr[data-run]');
  if (row) trigger('select', { run: row.dataset.run });
});
"""
SHOW_IN_URL = in_address("run", "selected")


class RunsTab:
    """Builds the tab. `selected` holds the id of the run that is shown; it lives in the browser, not here."""

    def __init__(self, settings: Settings, status: gr.HTML) -> None:
        self.settings, self.status = settings, status
        self.selected = gr.Textbox(NOT_ATTACHED, visible="hidden", elem_id="selected-run", label="selected run")
        self.cursor = gr.State({})
        self.waiting = gr.HTML("", js_on_load=ACT, elem_id="waiting")
        self.waiting_problem = gr.HTML("", elem_id="waiting-problem")
        self.table = gr.HTML(run_view.NO_RUNS, js_on_load=SELECT, elem_id="runs-table")
        self.combine = CombinePart(settings)
        with gr.Column(visible=False, elem_id="run-page") as self.page:
            self.head = gr.HTML("", min_height=112, elem_id="run-head")
            self._build_buttons()
            self.problem = gr.HTML("", elem_id="run-problem")
            with gr.Column(elem_id="run-charts") as self.charts_part:
                with gr.Row():
                    self.charts = [_chart(0), _chart(1)]
                with gr.Row():
                    self.charts += [_chart(2), _chart(3)]
            with gr.Row():
                with gr.Column(min_width=320):
                    gr.HTML('<div class="lab-step">What happened</div>')
                    self.log = gr.HTML("", min_height=300, elem_id="run-log")
                with gr.Column(min_width=320):
                    gr.HTML('<div class="lab-step">What came out</div>')
                    self.result = gr.HTML("", min_height=302, elem_id="run-result")
            with gr.Accordion("Compare settings with another run", open=False, elem_id="compare") as self.compare:
                self.other = gr.Dropdown([], label="Compare settings with", value=None, elem_id="compare-with")
                self.differences = gr.HTML("", elem_id="differences")
            with gr.Accordion("Sample answers", open=False, elem_id="answers"):
                self.answers = gr.HTML("")
            with gr.Accordion("Raw log of the worker", open=False, elem_id="raw-log") as self.raw_log:
                self.raw = gr.HTML("")

    def _build_buttons(self) -> None:
        with gr.Row(elem_id="run-buttons"):
            self.stop = small_button("Stop and save", "stop")
            self.resume = small_button("Resume", "resume", variant="primary")
            self.download = small_button("Download adapter", "run-download", variant="primary")
            self.publish = small_button("Publish …", "run-publish")
            self.more = small_button("Continue …", "more")
            self.copy = small_button("Copy settings", "copy", visible=True)
            self.delete = small_button("Delete", "delete")
        with gr.Row(visible=False, elem_id="more-row", elem_classes="lab-ask") as self.more_row:
            self.more_steps = gr.Number(
                label="Continue for more steps", precision=0, step=1, min_width=180, elem_id="more-steps"
            )
            self.go_on = small_button("Continue", "go-on", variant="primary", visible=True)
            self.not_more = small_button("Leave it", "not-more", visible=True)
        with gr.Row(visible=False, elem_id="confirm", elem_classes="lab-ask") as self.confirm:
            gr.HTML('<p class="lab-warn">Delete this run with its adapter for good?</p>', min_width=280)
            self.really = small_button("Delete for good", "really-delete", variant="stop", visible=True)
            self.keep = small_button("Keep it", "keep", visible=True)

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [
            self.cursor, self.selected, self.status, self.waiting, self.table, self.combine.accordion, self.combine.runs,
            self.page, self.head, self.stop, self.resume, self.download, self.publish, self.more, self.delete,
            self.charts_part, *self.charts, self.log, self.result, self.other, self.answers, self.raw, self.raw_log,
        ]  # fmt: skip

    def connect(self, hidden: dict[str, Any]) -> None:
        state = [self.selected, self.cursor]
        asked = [self.more_row, self.confirm]
        # A press while another is under way would be dropped: the last run chosen counts, and every move does.
        self.table.select(self.choose, None, [self.selected, self.problem], trigger_mode="always_last", **hidden)
        self.waiting.select(self.move, None, self.waiting_problem, trigger_mode="multiple", **hidden).then(
            self.tick, state, self.outputs, **hidden
        )
        # The address names the run, so that a reload and a shared link show it again.
        self.selected.change(None, self.selected, None, js=SHOW_IN_URL, **hidden).then(
            self.tick, state, self.outputs, **hidden
        )
        # What was asked of another run is over.
        self.selected.change(lambda: (*_closed(), ""), None, [*asked, self.differences], **hidden)
        for button, action in ((self.stop, self.stop_chosen), (self.resume, self.resume_chosen)):
            button.click(action, self.selected, self.problem, **hidden).then(self.tick, state, self.outputs, **hidden)
        self.more.click(self.ask_for_more, self.selected, [*asked, self.more_steps], **hidden)
        self.go_on.click(
            self.continue_chosen, [self.selected, self.more_steps], [self.problem, self.more_row], **hidden
        ).then(self.tick, state, self.outputs, **hidden)
        self.delete.click(lambda: (gr.Row(visible=False), gr.Row(visible=True)), None, asked, **hidden)
        for button in (self.keep, self.not_more):
            button.click(_closed, None, asked, **hidden)
        self.really.click(self.delete_run, self.selected, [self.selected, self.problem, self.confirm], **hidden)
        self.other.input(self.compare_with, [self.selected, self.other], self.differences, **hidden)
        self.combine.connect(self.selected, hidden)
        gr.Timer(1).tick(self.tick, state, self.outputs, queue=False, **hidden)

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        return event.run, ""

    def move(self, event: gr.EventData) -> str:
        return act_on(event.run, event.act, self.settings)

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
            self.waiting: waiting_html(found),
            self.table: run_view.table_html(found, selected_now, self.settings),
        }
        listed = self._choices(found, selected_now)
        parts |= self._choice_parts(listed, cursor) | self._page_parts(status, cursor, found)
        # Only strings are compared; components and figures come with a marker of their own.
        changed = {part: value for part, value in parts.items() if not _same(part, value, cursor)}
        if selected_now != selected:
            changed[self.selected] = selected_now
        if not changed:
            return gr.skip()
        seen = {str(part._id): hash(value) for part, value in parts.items() if isinstance(value, str)}
        seen |= {"run": _marker(status), "drawn": self._drawn(status), "listed": listed}
        return {**changed, self.cursor: {**cursor, **seen}}

    def _choices(self, found: list[RunStatus], selected: str) -> dict[str, Any]:
        """What the lists of runs offer: adapters to combine, other runs to compare with."""
        others = [(f"{s.name} · {s.state} · {short(s.run_id)}", s.run_id) for s in found if s.run_id != selected]
        return {"of": selected, "adapters": run_view.with_adapter(found, self.settings), "others": others}

    def _choice_parts(self, listed: dict[str, Any], cursor: dict[str, Any]) -> dict[Any, Any]:
        before = cursor.get("listed", {})
        parts: dict[Any, Any] = {}
        if listed["adapters"] != before.get("adapters"):
            parts[self.combine.accordion] = gr.Accordion(visible=len(listed["adapters"]) > 1)
            parts[self.combine.runs] = gr.Dropdown(choices=listed["adapters"])
        if listed["of"] != before.get("of"):
            parts[self.other] = gr.Dropdown(choices=listed["others"], value=None)
        elif listed["others"] != before.get("others"):
            parts[self.other] = gr.Dropdown(choices=listed["others"])
        return parts

    def _page_parts(self, status: RunStatus | None, cursor: dict[str, Any], found: list[RunStatus]) -> dict[Any, Any]:
        if status is None:
            return {self.page: gr.Column(visible=False)} if cursor.get("run") != _marker(None) else {}
        run = Run(self.settings.runs / status.run_id, self.settings)
        parts: dict[Any, Any] = {self.head: run_view.head_html(status, run, found)}
        if cursor.get("run") != _marker(status):
            parts |= {self.page: gr.Column(visible=True), **self._buttons(status, run)}
            parts[self.charts_part] = gr.Column(visible=run.trains)
            parts[self.result] = result_html(run, status)
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
        has_adapter = ended and run_view.has_adapter(run)
        stop_label = "Take out of the queue" if status.state == QUEUED else "Stop and save"
        return {
            self.stop: gr.Button(stop_label, visible=status.state in (RUNNING, QUEUED)),
            self.resume: gr.Button(
                "Resume" if status.checkpoint_step is not None else "Start again",
                visible=status.state in (STOPPED, FAILED, CRASHED),
            ),
            self.download: gr.Button(
                visible=has_adapter, variant="primary" if status.state == FINISHED else "secondary"
            ),
            self.publish: gr.Button(visible=has_adapter),
            self.more: gr.Button(visible=status.state == FINISHED and run.trains),
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

    def ask_for_more(self, selected: str) -> tuple[Any, Any, Any]:
        """Opens with as many steps again as the run has made."""
        try:
            made = RunStore(self.settings).get(selected).status().step
        except LabError:  # deleted meanwhile: the next tick shows another run
            return gr.skip(), gr.skip(), gr.skip()
        return gr.Row(visible=True), gr.Row(visible=False), gr.Number(made, info=f"{made:,} made so far")

    def continue_chosen(self, selected: str, more_steps: float | None) -> tuple[str, Any]:
        def go_on(run: Run) -> None:
            if not more_steps or more_steps < 1:
                raise RunError(f"more steps: {more_steps or 0:g}; write how many, at least 1")
            queue.resume(run, max_steps=run.status().step + int(more_steps))
            queue.start_next(self.settings)

        problem = self._try(go_on, selected)
        return problem, gr.Row(visible=bool(problem))

    def compare_with(self, selected: str, other: str | None) -> str:
        return differences_html(selected, other, self.settings)

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
        chosen = Chosen(config.data, config.eval_data, 0, False, config.skip_bad_rows, columns=config.columns)
        if not chosen.file.is_file():
            return None, config
        total = rows.train_rows if chosen.eval_file else rows.train_rows + rows.eval_rows
        return replace(chosen, rows=total), config


def _closed() -> tuple[Any, Any]:
    """Nothing is asked: neither for how many steps nor whether to delete."""
    return gr.Row(visible=False), gr.Row(visible=False)


def small_button(label: str, elem_id: str, *, variant: str = "secondary", visible: bool = False) -> gr.Button:
    return gr.Button(label, variant=variant, min_width=110, size="md", visible=visible, elem_id=elem_id)


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
