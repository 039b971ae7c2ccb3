"""What makes a study, on the Compare tab: two big buttons, and folded below them every other study. Each tells what it will be."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from qlora_core.errors import LabError
from qlora_core.planner.studying import Pace
from qlora_core.settings import Settings
from qlora_core.studies import measured_paces
from qlora_core.study_grid import KINDS
from qlora_core.study_plan import LORA_VS_QLORA, StudyPlan
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.identity import Identity, acting
from qlora_core.ui.study_asked import (
    ANYTHING,
    LADDER,
    PLAN_CSS,
    Asked,
    plan_html,
    plan_of_form,
    refused_html,
    start_study,
    waiting_html,
)
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.words import METHOD_NAMES, hint, problems_panel

INTRODUCTION = hint(
    "A study trains runs that differ in one thing on the same rows, and says what it cost and what it saved. It takes the "
    "dataset and the settings of the Train tab."
)
LOOKING = "Looking at the rows and at the model’s layers …"
MAKING = '<p class="lab-hint" role="status">Checking the dataset and making the runs …</p>'
ANYTHING_ABOUT = "every combination of the settings that you write below, one run each"
# A study that was made stands further down the page.
TO_THE_STUDY = """() => {
  if (!document.querySelector('#study-problem .lab-problems')) setTimeout(() =>
    document.querySelector('#study-head')?.scrollIntoView({ block: 'center' }), 300);
}"""


class StudyForm:
    """The upper part of the Compare tab."""

    def __init__(self, settings: Settings, train: TrainTab) -> None:
        self.settings, self.train = settings, train
        gr.HTML(INTRODUCTION)
        with gr.Row(elem_id="study-kinds"):
            with gr.Column(min_width=300):
                self.pair = gr.Button("LoRA vs QLoRA", variant="primary", size="lg", elem_id="study-pair")
                self.pair_plan = _plan_box("study-pair-plan")
            with gr.Column(min_width=300):
                self.ladder = gr.Button("Rank ladder", variant="primary", size="lg", elem_id="study-ladder")
                self.ladder_plan = _plan_box("study-ladder-plan")
        self.skip = gr.Checkbox(
            False,
            label="Go on without runs that do not fit",
            info="The others are trained and compared; what is missing is named.",
            visible=False,
            elem_id="study-skip",
        )
        with gr.Accordion("Other studies", open=False, elem_id="study-more") as self.more:
            self._build_choices()
        self.problem = gr.HTML("", elem_id="study-problem")

    def _build_choices(self) -> None:
        kinds = [(kind.title, name) for name, kind in KINDS.items()] + [("Anything else", ANYTHING)]
        with gr.Row():
            with gr.Column(min_width=300):
                self.kind = gr.Dropdown(
                    kinds, value=LADDER, label="What is compared", info=about(LADDER), elem_id="study-kind"
                )
                self.methods = gr.CheckboxGroup(
                    [(name, method) for method, name in METHOD_NAMES.items()],
                    value=list(METHOD_NAMES),
                    label="Methods",
                    elem_id="study-methods",
                )
                self.ranks = gr.Textbox(
                    ", ".join(map(str, KINDS[LADDER].vary["rank"])), label="Ranks", max_lines=1, elem_id="study-ranks"
                )
                self.seeds = gr.Textbox(
                    "",
                    label="Seeds",
                    placeholder="that of the Train tab",
                    info="Each arm is trained once for each. With several, losses get intervals.",
                    max_lines=1,
                    elem_id="study-seeds",
                )
            with gr.Column(min_width=300):
                self.floor = gr.Checkbox(
                    KINDS[LADDER].noise_floor,
                    label="Noise floor",
                    info="Each LoRA arm once more with another seed, and once in another row order: what chance alone changes.",
                    elem_id="study-floor",
                )
                self.vary = gr.Textbox(
                    "",
                    label="Vary also",
                    placeholder="learning_rate = 1e-4, 2e-4\nquant_type = nf4, fp4",
                    info="A setting a line, by its name on the command line.",
                    lines=3,
                    elem_id="study-vary",
                )
                self.name = gr.Textbox(
                    "", label="Name", placeholder="what is compared, and the dataset", max_lines=1, elem_id="study-name"
                )
        self.other_plan = _plan_box("study-other-plan")
        self.start = gr.Button("Start this study", variant="primary", size="md", elem_id="study-start")

    @property
    def choices(self) -> list[gr.components.Component]:
        return [self.kind, self.methods, self.ranks, self.seeds, self.floor, self.vary, self.name]

    @property
    def plans(self) -> list[gr.components.Component]:
        return [self.pair_plan, self.ladder_plan, self.other_plan, self.skip]

    def connect(
        self, tab: gr.Tab, chosen: gr.State, selected: gr.Textbox, identity: Identity, hidden: dict[str, Any]
    ) -> None:
        """`tab`: on whose selection the plans follow the form; `selected` takes the id of the study that was made."""
        made_of = [chosen, *self.choices, *self.train.inputs]
        for happens in (tab.select, self.train.looked.then, self.more.expand):
            happens(self.planned, made_of, self.plans, **hidden)
        # What was wrong may be mended on another tab.
        tab.select(lambda: "", None, self.problem, **hidden)
        self.kind.input(self.fields_of, self.kind, [self.kind, self.methods, self.ranks, self.floor], **hidden)
        gr.on(
            [component.change for component in self.choices],
            self.other_planned,
            made_of,
            [self.other_plan, self.skip],
            trigger_mode="always_last",
            **hidden,
        )
        for button, begin in (
            (self.pair, self.begin_pair),
            (self.ladder, self.begin_ladder),
            (self.start, self.begin_other),
        ):
            button.click(acting(begin), [identity.token, self.skip, *made_of], [self.problem, selected], **hidden).then(
                None, None, None, js=TO_THE_STUDY, **hidden
            )

    def fields_of(self, kind: str) -> tuple[Any, Any, Any, Any]:
        """What the chosen kind can be asked: its meaning, methods, ranks, noise floor."""
        vary = KINDS[kind].vary if kind in KINDS else {}
        return (
            gr.Dropdown(info=about(kind)),
            gr.CheckboxGroup(visible="method" in vary),
            gr.Textbox(visible="rank" in vary),
            kind in KINDS and KINDS[kind].noise_floor,
        )

    # -- before it starts

    def planned(self, chosen: Chosen, *values: Any) -> tuple[str, str, str, Any]:
        """(LoRA vs QLoRA, rank ladder, the other one, whether runs may be left out)"""
        asked, form = self._asked(values), values[len(self.choices) :]
        paces = measured_paces(self.settings)
        found = [self._told(one, chosen, form, paces) for one in (Asked(LORA_VS_QLORA), Asked(LADDER), asked)]
        unfitting = any(plan is not None and plan.estimate.problems() for plan, _ in found)
        pair, ladder, other = (told for _, told in found)
        return pair, ladder, other, gr.Checkbox(visible=unfitting)

    def other_planned(self, chosen: Chosen, *values: Any) -> tuple[str, Any]:
        form, paces = values[len(self.choices) :], measured_paces(self.settings)
        found, told = self._told(self._asked(values), chosen, form, paces)
        # That of another button may need it, so it only comes here.
        return told, gr.Checkbox(visible=True) if found and found.estimate.problems() else gr.skip()

    def _told(
        self, asked: Asked, chosen: Chosen, form: Sequence[Any], paces: Sequence[Pace]
    ) -> tuple[StudyPlan | None, str]:
        try:
            found = self._plan(asked, chosen, form, look=False, paces=paces)
        except LabError as error:
            return None, refused_html(error.problems)
        return found, plan_html(found) if found else waiting_html(LOOKING)

    def _asked(self, values: Sequence[Any]) -> Asked:
        kind, methods, ranks, seeds, floor, vary, name = values[: len(self.choices)]
        return Asked(kind, methods, ranks or "", seeds or "", bool(floor), vary or "", name or "")

    def _plan(
        self, asked: Asked, chosen: Chosen, form: Sequence[Any], *, look: bool, paces: Sequence[Pace] = ()
    ) -> StudyPlan | None:
        """None where rows and layers were not looked at yet, and are not to be now. Raises LabError with all that is wrong."""
        try:
            config, facts = self.train.settings_and_facts(chosen, form, look=look)
        except LabError as error:
            raise type(error)(*error.problems, *asked.problems()) from None
        wanted = asked.wanted()
        return plan_of_form(wanted, config, facts, paces) if facts else None

    # -- and its start

    def begin_pair(self, skip: bool, chosen: Chosen, *values: Any) -> Iterator[tuple[str, Any]]:
        yield from self._begin(Asked(LORA_VS_QLORA), skip, chosen, values)

    def begin_ladder(self, skip: bool, chosen: Chosen, *values: Any) -> Iterator[tuple[str, Any]]:
        yield from self._begin(Asked(LADDER), skip, chosen, values)

    def begin_other(self, skip: bool, chosen: Chosen, *values: Any) -> Iterator[tuple[str, Any]]:
        yield from self._begin(self._asked(values), skip, chosen, values)

    def _begin(self, asked: Asked, skip: bool, chosen: Chosen, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """(problems, id of the study): answers at once, then makes the study and queues its runs."""
        yield MAKING, gr.skip()
        try:
            found = self._plan(asked, chosen, values[len(self.choices) :], look=True)
            assert found is not None
            study = start_study(found, self.settings, skip=skip)
        except LabError as error:
            yield problems_panel(error.problems, title="The study was not started"), gr.skip()
            return
        yield "", study.study_id


def about(kind: str) -> str:
    return KINDS[kind].about if kind in KINDS else ANYTHING_ABOUT


def _plan_box(elem_id: str) -> gr.HTML:
    return gr.HTML(waiting_html(LOOKING), css_template=PLAN_CSS, elem_id=elem_id)
