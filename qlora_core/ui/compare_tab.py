"""The Compare tab: studies are made here, watched live, and judged. A timer compares a cursor and sends only what changed."""

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from qlora_core.errors import LabError
from qlora_core.run_status import ACTIVE, FINISHED
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study import Study
from qlora_core.study_charts import AXES, SMOOTHINGS
from qlora_core.study_status import StudyStatus
from qlora_core.ui import run_view, study_found, study_view
from qlora_core.ui.address import NOT_ATTACHED, in_address
from qlora_core.ui.downloads import follow, link, study_zip
from qlora_core.ui.identity import Identity
from qlora_core.ui.plots import gallery
from qlora_core.ui.runs_tab import SELECT, small_button
from qlora_core.ui.study_form import StudyForm
from qlora_core.ui.study_push import StudyPush
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.words import problems_panel

WAITING = "Memory, step time and loss stand here when the first run has finished."
READING = '<div class="verdicts"><p class="verdict unclear first" role="status">Reading the runs …</p></div>'
WRITING = '<p class="lab-hint" role="status">Writing the report …</p>'
# The address names the study while this tab is open.
SHOW_IN_URL = in_address("study", "selected", only_if="document.querySelector('#study-kinds')?.offsetParent")
LEAVE_URL = in_address("study", "''")


class CompareTab:
    """Builds the tab. `selected` holds the id of the study that is shown; it lives in the browser, not here."""

    def __init__(self, settings: Settings, train: TrainTab) -> None:
        self.settings = settings
        self.selected = gr.Textbox(NOT_ATTACHED, visible="hidden", elem_id="selected-study", label="selected study")
        # What the page shows. It lives in the browser and comes with what it tells of, so that an answer that is late, and shows
        # what was, is seen as such by the next tick; a gr.State would know better than the page.
        self.cursor = gr.Textbox("", visible="hidden", elem_id="study-cursor", label="study cursor")
        self.form = StudyForm(settings, train)
        with gr.Accordion("Compare runs that have finished", open=False, elem_id="study-pick"):
            # Custom values: a run that was deleted meanwhile stays chosen, and Compare says so.
            self.picked = gr.Dropdown(
                [],
                multiselect=True,
                allow_custom_value=True,
                label="Runs",
                info="Two or more on the same base model and the same rows. What else differs is said with every figure.",
                elem_id="study-picked",
            )
            self.pick = gr.Button("Compare these", variant="primary", size="md", elem_id="study-pick-go")
            self.pick_problem = gr.HTML("", elem_id="study-pick-problem")
        self.table = gr.HTML(study_view.NO_STUDIES, js_on_load=SELECT, elem_id="studies-table")
        with gr.Column(visible=False, elem_id="study-page") as self.page:
            self._build_page()

    def _build_page(self) -> None:
        # Heights come from style sheets: gradio drops its own while an answer is on its way, which is every second.
        self.head = gr.HTML("", elem_id="study-head")
        self.strip = gr.HTML("", css_template=study_view.STRIP_CSS, js_on_load=study_view.PICK, elem_id="study-strip")
        with gr.Row(elem_id="study-buttons"):
            self.stop = small_button("Stop and save", "study-stop")
            self.resume = small_button("Resume", "study-resume", variant="primary")
            self.report = small_button("Download report", "study-report", variant="primary")
            self.again = small_button("Analyse again", "study-again")
            self.delete = small_button("Delete", "study-delete")
        with gr.Row(visible=False, elem_id="study-confirm", elem_classes="lab-ask") as self.confirm:
            gr.HTML('<p class="lab-warn">Delete this study for good?</p>', min_width=220)
            self.really = small_button("Delete, keep its runs", "study-really", variant="stop", visible=True)
            self.with_runs = small_button("Delete with its runs", "study-really-runs", variant="stop", visible=True)
            self.keep = small_button("Keep it", "study-keep", visible=True)
        self.page_problem = gr.HTML("", elem_id="study-page-problem")
        self.verdict = gr.HTML("", css_template=study_found.VERDICTS_CSS, elem_id="study-verdict")
        self.first = gallery(elem_id="study-first", empty=WAITING)
        self.others = gr.HTML("", css_template=study_found.VERDICTS_CSS, elem_id="study-verdicts")
        with gr.Accordion("Runs", open=False, elem_id="study-runs-part"):
            self.runs = gr.HTML("", js_on_load=SELECT, elem_id="study-runs")
        with gr.Accordion("Loss curves", open=False, elem_id="study-curves-part") as self.curves_part:
            with gr.Row():
                self.axis = gr.Radio(list(AXES), value=next(iter(AXES)), label="Along", elem_id="study-axis")
                self.smoothing = gr.Radio(
                    [study_found.AUTOMATIC, *SMOOTHINGS],
                    value=study_found.AUTOMATIC,
                    label="Smoothing of the training loss",
                    elem_id="study-smooth",
                )
            self.curves = gallery(elem_id="study-curves", least=480)
        with gr.Accordion("More on memory, time and loss", open=False, elem_id="study-more-part") as self.more_part:
            self.more = gallery(elem_id="study-more-figures")
        with gr.Accordion("Weights", open=False, elem_id="study-weights-part") as self.weights_part:
            self.weights = gallery(elem_id="study-weights")
        with gr.Accordion("Answers", open=False, elem_id="study-answers-part") as self.answers_part:
            self.behaviour = gallery(elem_id="study-behaviour")
            self.answers = gr.HTML("", css_template=study_found.ANSWERS_CSS, elem_id="study-answers")
        self.push = StudyPush(self.settings)

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [
            self.cursor, self.selected, self.table, self.picked, self.page, self.head, self.strip, self.stop,
            self.resume, self.report, self.again, self.delete, self.verdict, self.first, self.others, self.runs, self.curves_part,
            self.curves, self.more_part, self.more, self.weights_part, self.weights, self.answers_part, self.behaviour,
            self.answers,
        ]  # fmt: skip

    def connect(
        self, tab: gr.Tab, others: list[gr.Tab], chosen: gr.State, identity: Identity, hidden: dict[str, Any]
    ) -> None:
        """`tab` holds all this; on the selection of one of the `others` the address no longer names a study."""
        state = [self.selected, self.cursor, self.axis, self.smoothing]
        self.form.connect(tab, chosen, self.selected, identity, hidden)
        tab.select(None, self.selected, None, js=SHOW_IN_URL, **hidden)
        for other in others:
            other.select(None, self.selected, None, js=LEAVE_URL, **hidden)
        self.table.select(self.choose, None, [self.selected, self.page_problem], trigger_mode="always_last", **hidden)
        self.pick.click(self.compare_picked, self.picked, [self.pick_problem, self.selected, self.picked], **hidden)
        self.selected.change(None, self.selected, None, js=SHOW_IN_URL, **hidden).then(
            self.tick, state, self.outputs, **hidden
        ).then(self.tick, state, self.outputs, **hidden)
        self.selected.change(lambda: gr.Row(visible=False), None, self.confirm, **hidden)
        self.push.connect(self.selected, identity, hidden)
        for button, action in (
            (self.stop, Study.stop),
            (self.resume, Study.start),
            (self.again, Study.analyse_again),
        ):
            button.click(self.acting(action), self.selected, self.page_problem, **hidden).then(
                self.tick, state, self.outputs, **hidden
            )
        self.delete.click(lambda: gr.Row(visible=True), None, self.confirm, **hidden)
        self.keep.click(lambda: gr.Row(visible=False), None, self.confirm, **hidden)
        forgotten = [self.selected, self.page_problem, self.confirm]
        self.really.click(self.forget, self.selected, forgotten, **hidden)
        self.with_runs.click(self.forget_with_runs, self.selected, forgotten, **hidden)
        self.report.click(self.write_report, self.selected, self.page_problem, **hidden).then(
            None, None, None, js=follow("study-page-problem"), **hidden
        )
        for control in (self.axis, self.smoothing):
            control.input(self.tick, state, self.outputs, **hidden)
        gr.Timer(1).tick(self.tick, state, self.outputs, queue=False, **hidden)

    def compare_picked(self, run_ids: list[str] | None) -> tuple[str, Any, Any]:
        """(problems, id of the study, what is picked)"""
        try:
            study = StudyStore(self.settings).of_runs(RunStore(self.settings).get_all(run_ids or []))
            study.start()
        except LabError as error:
            return problems_panel(error.problems, title="These cannot be compared"), gr.skip(), gr.skip()
        return "", study.study_id, []

    # -- the study that is shown

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        return event.run, ""

    def tick(self, selected: str, cursor: str, axis: str, smoothing: str) -> Any:
        """Outputs that changed since `cursor`; gr.skip() when none did."""
        if selected == NOT_ATTACHED:
            return gr.skip()
        before = json.loads(cursor or "{}")
        studies = study_view.statuses(self.settings)
        status = next((s for s in studies if s.study_id == selected), None) or next(iter(studies), None)
        now, finished = status.study_id if status else "", self._finished_runs()
        marks = {"of": now, "picked": hash(str(finished)), "page": _buttons_marker(status)}
        parts: dict[Any, Any] = {self.table: study_view.table_html(studies, now, study_view.unreadable(self.settings))}
        if status:
            parts |= {self.head: study_view.head_html(status), self.strip: study_view.strip_html(status)}
            parts[self.runs] = study_view.runs_html(status)
            marks["results"] = hash(study_view.results_marker(status))
            marks["curves"] = hash((study_view.curves_marker(status), axis, smoothing))
        seen = {str(part._id): hash(value) for part, value in parts.items()}
        changed = {part: value for part, value in parts.items() if before.get(str(part._id)) != seen[str(part._id)]}
        new = {name for name, mark in marks.items() if before.get(name, "" if name == "of" else None) != mark}
        if "picked" in new:
            changed[self.picked] = gr.Dropdown(choices=finished)
        if "page" in new:
            changed |= {self.page: gr.Column(visible=status is not None), **self._buttons(status)}
        if "of" in new:
            # Where it stands comes at once; what it found takes a second, and comes with the next tick.
            changed |= self._emptied()
            marks |= {"results": None, "curves": None}
        try:
            if "results" in new and "of" not in new:
                changed |= self._results(status)
            if "curves" in new and "of" not in new:
                changed |= self._curves(status, axis, smoothing)
        except (LabError, OSError):  # deleted just now: the next tick shows another
            return gr.skip()
        if now != selected:
            changed[self.selected] = now
        return {**changed, self.cursor: json.dumps(seen | marks)} if changed else gr.skip()

    def _emptied(self) -> dict[Any, Any]:
        figures = (self.first, self.others, self.curves, self.more, self.weights, self.behaviour, self.answers)
        return {self.verdict: READING} | dict.fromkeys(figures, "")

    def _results(self, status: StudyStatus) -> dict[Any, Any]:
        found = study_found.found(self._study(status), study_view.results_marker(status))
        return {
            self.verdict: found.verdict,
            self.others: found.others,
            self.first: found.first,
            self.more: found.more,
            self.more_part: gr.Accordion(visible=bool(found.more)),
            self.weights: found.weights,
            self.weights_part: gr.Accordion(visible=bool(found.weights)),
            self.behaviour: found.behaviour,
            self.answers: found.answers,
            self.answers_part: gr.Accordion(visible=found.has_answers),
        }

    def _curves(self, status: StudyStatus, axis: str, smoothing: str) -> dict[Any, Any]:
        drawn = study_found.curves(self._study(status), study_view.curves_marker(status), axis, smoothing)
        return {self.curves: drawn, self.curves_part: gr.Accordion(visible=bool(drawn))}

    def _study(self, status: StudyStatus) -> Study:
        return Study(StudyStore(self.settings).folder / status.study_id, self.settings)

    def _finished_runs(self) -> list[tuple[str, str]]:
        kept = [status for status in run_view.statuses(self.settings) if status.state == FINISHED]
        return [
            (label, run_id)
            for label, run_id in run_view.with_adapter(kept, self.settings)
            if Run(self.settings.runs / run_id, self.settings).trains
        ]

    def _buttons(self, status: StudyStatus | None) -> dict[Any, Any]:
        if status is None:
            return {}
        active, resumes = status.state in ACTIVE, study_view.can_resume(status)
        analysed = status.analysis is not None and status.analysis.state == FINISHED
        return {
            self.stop: gr.Button(visible=active),
            self.resume: gr.Button(visible=resumes),
            self.report: gr.Button(visible=status.done > 0, variant="secondary" if resumes or active else "primary"),
            self.again: gr.Button("Analyse again" if analysed else "Analyse", visible=not active and status.done > 0),
            self.delete: gr.Button(visible=not active),
        }

    def acting(self, action: Any) -> Any:
        """A handler that does it with the chosen study; a problem is told beside the buttons."""

        def act(selected: str) -> str:
            try:
                action(StudyStore(self.settings).get(selected))
            except LabError as error:
                return problems_panel(error.problems, title="That does not work")
            return ""

        return act

    def forget(self, selected: str, *, with_runs: bool = False) -> tuple[str, str, Any]:
        """(selected study, problem, the question, which is answered)"""
        store = StudyStore(self.settings)
        problem = self.acting(lambda study: store.delete(study, with_runs=with_runs))(selected)
        return (selected if problem else ""), problem, gr.Row(visible=False)

    def forget_with_runs(self, selected: str) -> tuple[str, str, Any]:
        return self.forget(selected, with_runs=True)

    def write_report(self, selected: str) -> Iterator[str]:
        yield WRITING
        try:
            yield link(study_zip(StudyStore(self.settings).get(selected), self.settings))
        except LabError as error:
            yield problems_panel(error.problems, title="No report")


def _buttons_marker(status: StudyStatus | None) -> str:
    """Changes when other buttons fit."""
    analysis = status.analysis.state if status and status.analysis else ""
    return f"{status.study_id} {status.state} {status.done} {analysis}" if status else "none"


def study_named(settings: Settings, study_id: str) -> bool:
    """Whether there is a study of this id."""
    return any(study.study_id == study_id for study in StudyStore(settings).list())
