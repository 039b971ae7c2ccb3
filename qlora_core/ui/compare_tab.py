"""The Compare tab: studies are made here, watched live, and judged. A timer compares a cursor and sends only what changed."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, LabError, RunError
from qlora_core.options import converted
from qlora_core.planner.studying import StudyEstimate, estimate_study
from qlora_core.run_status import ACTIVE, FINISHED
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.studies import GRID, PICKED, Study, StudyStore, measured_paces
from qlora_core.study_charts import AXES, SMOOTHINGS, loss_curves, sections
from qlora_core.study_grid import KINDS, Cell, cells, filled
from qlora_core.study_status import StudyStatus
from qlora_core.ui import run_view, study_view
from qlora_core.ui.downloads import link, study_zip
from qlora_core.ui.plots import gallery
from qlora_core.ui.runs_tab import SELECT
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.words import problems_panel
from qlora_core.verdicts import verdicts

LORA_VS_QLORA, LADDER = "lora-vs-qlora", "rank-ladder"
OTHER = "anything else"
RANKS = "2, 4, 8, 16, 32, 64"
SHOW_IN_URL = """(study) => {
  const url = new URL(window.location);
  if (study.length > 1) { url.searchParams.set('study', study); } else { url.searchParams.delete('study'); }
  window.history.replaceState(window.history.state, '', url);
}"""
# Before the page has asked which study its address names, a tick must not choose one.
NOT_ATTACHED = "?"


class CompareTab:
    """Builds the tab. `selected` holds the id of the study that is shown; it lives in the browser, not here."""

    def __init__(self, settings: Settings, train: TrainTab) -> None:
        self.settings, self.train = settings, train
        self.selected = gr.Textbox(NOT_ATTACHED, visible="hidden", elem_id="selected-study", label="selected study")
        self.cursor = gr.State({})
        gr.HTML(study_view.INTRODUCTION)
        with gr.Row(elem_id="study-kinds"):
            self.pair = gr.Button("LoRA vs QLoRA", variant="primary", size="lg", elem_id="study-pair")
            self.ladder = gr.Button("Rank ladder", variant="primary", size="lg", elem_id="study-ladder")
        with gr.Accordion("Other studies, and how they are made", open=False, elem_id="study-more"):
            self._build_choices()
        with gr.Column(visible=False, elem_id="study-plan") as self.plan_part:
            self.plan = gr.HTML("", css_template=study_view.PLAN_CSS, elem_id="study-plan-text")
            with gr.Row():
                self.start = gr.Button("Start the study", variant="primary", elem_id="study-start")
                self.leave = gr.Button("Leave it", elem_id="study-leave")
        self.problem = gr.HTML("", elem_id="study-problem")
        self.table = gr.HTML(study_view.NO_STUDIES, js_on_load=SELECT, elem_id="studies-table")
        with gr.Accordion(
            "Compare runs that have finished", open=False, visible=False, elem_id="study-pick"
        ) as self.picking:
            self.picked = gr.Dropdown([], multiselect=True, label="Finished runs", elem_id="study-picked")
            self.pick = gr.Button("Compare these", elem_id="study-pick-go")
        with gr.Column(visible=False, elem_id="study-page") as self.page:
            self._build_page()

    def _build_choices(self) -> None:
        kinds = [(kind.title, name) for name, kind in KINDS.items()] + [("Anything else, by settings", OTHER)]
        with gr.Row():
            self.kind = gr.Dropdown(kinds, value=LORA_VS_QLORA, label="Study", elem_id="study-kind")
            self.ranks = gr.Textbox(RANKS, label="Ranks of the ladder", elem_id="study-ranks")
        with gr.Row():
            self.seeds = gr.Textbox(
                "", label="Seeds (each arm once for each; empty: the form's seed)", elem_id="study-seeds"
            )
            self.floor = gr.Checkbox(
                True,
                label="Noise floor: LoRA once more with another seed, and another row order",
                elem_id="study-floor",
            )
        self.vary = gr.Textbox(
            "", lines=3, label="Also vary (a setting a line: learning_rate = 1e-4, 2e-4)", elem_id="study-vary"
        )
        with gr.Row():
            self.skip = gr.Checkbox(
                False, label="Train what fits the memory, leave a gap for the rest", elem_id="study-skip"
            )
            self.look = gr.Button("Look at this study", elem_id="study-look")

    def _build_page(self) -> None:
        self.head = gr.HTML("", min_height=112, elem_id="study-head")
        with gr.Row(elem_id="study-buttons"):
            self.stop = _button("Stop and save", "study-stop")
            self.resume = _button("Resume", "study-resume", variant="primary")
            self.again = _button("Analyse again", "study-again")
            self.report = _button("Download report", "study-report", variant="primary")
            self.delete = _button("Delete", "study-delete")
        with gr.Row(visible=False, elem_id="study-confirm", elem_classes="lab-ask") as self.confirm:
            gr.HTML('<p class="lab-warn">Forget this study? Its runs stay.</p>', min_width=280)
            self.really = _button("Delete for good", "study-really", variant="stop", visible=True)
            self.keep = _button("Keep it", "study-keep", visible=True)
        self.page_problem = gr.HTML("", elem_id="study-page-problem")
        self.verdicts = gr.HTML("", css_template=study_view.VERDICTS_CSS, elem_id="study-verdicts")
        self.figures = gallery(elem_id="study-figures")
        with gr.Accordion("Loss curves by step, token, epoch or time", open=False, elem_id="study-curves"):
            with gr.Row():
                self.axis = gr.Radio(list(AXES), value=next(iter(AXES)), label="Axis", elem_id="study-axis")
                self.smoothing = gr.Radio(
                    list(SMOOTHINGS), value=next(iter(SMOOTHINGS)), label="Smoothing", elem_id="study-smooth"
                )
            self.curves = gallery(elem_id="study-curve")
        with gr.Accordion("Runs", open=True, elem_id="study-runs-part"):
            self.runs = gr.HTML("", js_on_load=SELECT, elem_id="study-runs")
        with gr.Accordion("Answers side by side", open=False, elem_id="study-answers-part"):
            self.answers = gr.HTML("", css_template=study_view.ANSWERS_CSS, elem_id="study-answers")

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [
            self.cursor, self.selected, self.table, self.picking, self.picked, self.page, self.head, self.stop, self.resume,
            self.again, self.report, self.delete, self.verdicts, self.figures, self.curves, self.runs, self.answers,
        ]  # fmt: skip

    @property
    def choices(self) -> list[gr.components.Component]:
        return [self.kind, self.ranks, self.seeds, self.floor, self.vary, self.skip]

    def connect(self, chosen: gr.State, hidden: dict[str, Any]) -> None:
        made_of = [chosen, *self.choices, *self.train.inputs]
        shown = [self.plan_part, self.plan, self.problem]
        state = [self.selected, self.cursor]
        for button, kind in ((self.pair, LORA_VS_QLORA), (self.ladder, LADDER)):
            button.click(
                lambda kind=kind: (kind, KINDS[kind].noise_floor), None, [self.kind, self.floor], **hidden
            ).then(self.look_at, made_of, shown, **hidden)
        self.kind.input(self.floor_of, self.kind, self.floor, **hidden)
        self.look.click(self.look_at, made_of, shown, **hidden)
        self.leave.click(lambda: (gr.Column(visible=False), ""), None, [self.plan_part, self.problem], **hidden)
        self.start.click(self.begin, made_of, [self.plan_part, self.problem, self.selected], **hidden)
        self.table.select(self.choose, None, [self.selected, self.page_problem], **hidden)
        self.pick.click(self.compare_picked, self.picked, [self.selected, self.problem], **hidden)
        self.selected.change(None, self.selected, None, js=SHOW_IN_URL, **hidden).then(
            self.tick, state, self.outputs, **hidden
        )
        self.selected.change(lambda: gr.Row(visible=False), None, self.confirm, **hidden)
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
        self.really.click(self.forget, self.selected, [self.selected, self.page_problem, self.confirm], **hidden)
        self.report.click(self.write_report, self.selected, self.page_problem, **hidden)
        for control in (self.axis, self.smoothing):
            control.input(self.draw_curves, [self.selected, self.axis, self.smoothing], self.curves, **hidden)
        gr.Timer(1).tick(self.tick, state, self.outputs, queue=False, **hidden)

    # -- a study before it starts

    def floor_of(self, kind: str) -> bool:
        return kind in KINDS and KINDS[kind].noise_floor

    def look_at(self, chosen: Any, *values: Any) -> tuple[Any, str, str]:
        """(the part with Start, what the study will be, problems)"""
        try:
            config, how, made, estimate = self._planned(chosen, values)
        except LabError as error:
            return gr.Column(visible=False), "", problems_panel(error.problems, title="This study cannot be made yet")
        return gr.Column(visible=True), study_view.plan_html(config, how, made, estimate), ""

    def begin(self, chosen: Any, *values: Any) -> Iterator[tuple[Any, str, Any]]:
        """Answers at once, then makes the study and shows it."""
        yield gr.skip(), study_view.CHECKING, gr.skip()
        try:
            config, how, _, estimate = self._planned(chosen, values)
            unfitting = estimate.problems()
            if unfitting and not values[len(self.choices) - 1]:
                raise ConfigError(
                    *unfitting, "lower what they need, or train what fits and leave a gap (Other studies)"
                )
            if not estimate.fitting:
                raise ConfigError("no run of the study fits the memory", *unfitting)
            study = StudyStore(self.settings).create(config, **how, only=estimate.fitting)
            study.start()
        except LabError as error:
            yield gr.skip(), problems_panel(error.problems, title="The study was not started"), gr.skip()
            return
        yield gr.Column(visible=False), "", study.study_id

    def _planned(
        self, chosen: Any, values: Sequence[Any]
    ) -> tuple[TrainConfig, dict[str, Any], list[Cell], StudyEstimate]:
        """Raises LabError with all that is wrong."""
        kind, ranks, seeds, floor, vary, _ = values[: len(self.choices)]
        config, facts = self.train.settings_and_facts(chosen, *values[len(self.choices) :])
        given = dict(KINDS[kind].vary) if kind in KINDS else {}
        if kind == LADDER:
            given["rank"] = _numbers("Ranks of the ladder", ranks)
        given |= _lines(vary)
        if facts.architecture:
            given = filled(given, facts.architecture)
        how = {
            "vary": given,
            "seeds": _numbers("Seeds", seeds),
            "noise_floor": bool(floor),
            "kind": kind if kind in KINDS else GRID,
            "name": study_view.default_name(kind, config),
        }
        made = cells(config, given, seeds=how["seeds"], noise_floor=how["noise_floor"], name=how["name"])
        return config, how, made, estimate_study(facts, made, measured_paces(self.settings))

    def compare_picked(self, run_ids: list[str]) -> tuple[Any, str]:
        try:
            store = RunStore(self.settings)
            study = StudyStore(self.settings).of_runs([store.get(run_id) for run_id in run_ids or []])
            study.start()
        except LabError as error:
            return gr.skip(), problems_panel(error.problems, title="These cannot be compared")
        return study.study_id, ""

    # -- the study that is shown

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        return event.run, ""

    def tick(self, selected: str, cursor: dict[str, Any]) -> Any:
        """Outputs that changed since `cursor`; gr.skip() when none did."""
        if selected == NOT_ATTACHED:
            return gr.skip()
        studies = study_view.statuses(self.settings)
        status = next((s for s in studies if s.study_id == selected), None) or next(iter(studies), None)
        now = status.study_id if status else ""
        parts: dict[Any, Any] = {self.table: study_view.table_html(studies, now)}
        if status:
            parts |= {self.head: study_view.head_html(status), self.runs: study_view.runs_html(status)}
        changed = {part: value for part, value in parts.items() if cursor.get(str(part._id)) != hash(value)}
        seen = {str(part._id): hash(value) for part, value in parts.items()}
        finished = self._finished_runs()
        if finished != cursor.get("finished"):
            seen["finished"] = finished
            changed |= {
                self.picking: gr.Accordion(visible=len(finished) > 1),
                self.picked: gr.Dropdown(choices=finished),
            }
        if (marker := _marker(status)) != cursor.get("marker"):
            seen["marker"] = marker
            changed |= {self.page: gr.Column(visible=status is not None), **self._buttons(status)}
        if status and (drawn := study_view.drawn(status)) != cursor.get("drawn"):
            seen["drawn"] = drawn
            changed |= self._drawn_parts(status)
        if now != selected:
            changed[self.selected] = now
        return {**changed, self.cursor: {**cursor, **seen}} if changed else gr.skip()

    def _drawn_parts(self, status: StudyStatus) -> dict[Any, Any]:
        results = StudyStore(self.settings).get(status.study_id).results()
        return {
            self.verdicts: study_view.verdicts_html(verdicts(results) if status.done else []),
            self.figures: study_view.gallery_json(sections(results)),
            self.curves: study_view.gallery_json({"": {"Loss": loss_curves(results)}}) if status.done else "",
            self.answers: study_view.answers_html(results),
        }

    def draw_curves(self, selected: str, axis: str, smoothing: str) -> Any:
        try:
            results = StudyStore(self.settings).get(selected).results()
        except LabError:
            return gr.skip()
        return study_view.gallery_json({"": {"Loss": loss_curves(results, axis=axis, smoothing=SMOOTHINGS[smoothing])}})

    def _finished_runs(self) -> list[tuple[str, str]]:
        found = run_view.statuses(self.settings)
        kept = [s for s in found if s.state == FINISHED and Run(self.settings.runs / s.run_id, self.settings).trains]
        return run_view.with_adapter(kept, self.settings)

    def _buttons(self, status: StudyStatus | None) -> dict[Any, Any]:
        if status is None:
            return {}
        active = status.state in ACTIVE
        whole = status.done == status.total
        return {
            self.stop: gr.Button(visible=active),
            self.resume: gr.Button(visible=not active and not whole and status.kind != PICKED),
            self.again: gr.Button(visible=not active and status.done > 0),
            self.report: gr.Button(visible=status.done > 0),
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

    def forget(self, selected: str) -> tuple[str, str, Any]:
        problem = self.acting(StudyStore(self.settings).delete)(selected)
        return (selected if problem else ""), problem, gr.Row(visible=False)

    def write_report(self, selected: str) -> Iterator[str]:
        yield study_view.WRITING
        try:
            yield link(study_zip(StudyStore(self.settings).get(selected), self.settings))
        except LabError as error:
            yield problems_panel(error.problems, title="No report")


def _marker(status: StudyStatus | None) -> str:
    """Changes when other buttons fit."""
    return f"{status.study_id} {status.state} {status.done}" if status else "none"


def _numbers(what: str, text: str) -> list[int]:
    parts = [part.strip() for part in (text or "").replace(";", ",").split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdigit()]:
        raise ConfigError(f"{what}: {', '.join(wrong)} is no whole number; write them with commas between: 2, 4, 8")
    return [int(part) for part in parts]


def _lines(text: str) -> dict[str, list[Any]]:
    """ "rank = 4, 8" a line; in one value, + joins several names. Raises ConfigError with all that is wrong."""
    found, problems = {}, []
    for line in filter(None, map(str.strip, (text or "").splitlines())):
        field, equals, values = line.partition("=")
        options = [part.strip() for part in values.split(",") if part.strip()]
        if not equals or not options:
            problems.append(f"Also vary: {line!r} has no values; write rank = 4, 8")
            continue
        try:
            name = field.strip()
            found[name] = [converted(TrainConfig, name, part.split("+") if "+" in part else part) for part in options]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return found


def _button(label: str, elem_id: str, *, variant: str = "secondary", visible: bool = False) -> gr.Button:
    return gr.Button(label, variant=variant, min_width=110, size="md", visible=visible, elem_id=elem_id)


def study_named(settings: Settings, study_id: str) -> bool:
    try:
        return bool(study_id) and StudyStore(settings).get(study_id).study_id == study_id
    except RunError:
        return False
