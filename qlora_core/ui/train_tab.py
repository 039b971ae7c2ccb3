"""The Train tab: a filled form; beside it Start, every problem and finding, the recommendation, and the equal command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core import precision, queue, targets
from qlora_core.config import TrainConfig
from qlora_core.data.rows import counted
from qlora_core.errors import ConfigError, LabError
from qlora_core.hub import acting_token
from qlora_core.planner.facts import Facts, held_out_rows
from qlora_core.planner.findings import STOP, findings
from qlora_core.planner.recommendation import recommend
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui import advice, form, memory_panel, saved_settings
from qlora_core.ui.advice import Advice, Looked
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.identity import Identity, acting
from qlora_core.ui.preview import How
from qlora_core.ui.probe_part import ProbePart
from qlora_core.ui.words import METHOD_NAMES, esc, problems_panel

LOOKING = "Looking at the rows and at the model’s layers …"
UNKNOWN = "How much memory it needs stands here when nothing is missing."
# As high as what the card ever holds, so that it does not grow.
CARD = '<div class="lab-card" style="min-height:160px">'
NO_PLAN = f'{CARD}<h3>Not ready to start</h3><p class="lab-hint">What is missing stands below Start.</p></div>'
# As high as the findings, which it stands in for.
PROBLEMS_CSS = ".lab-problems { min-height: 196px; }"


class TrainTab:
    """Builds the form from TrainConfig's metadata. `fields` maps each field to its component."""

    def __init__(self, settings: Settings, beside_preview: dict[str, gr.components.Component] | None = None) -> None:
        """`beside_preview`: components of fields that stand on the Data tab."""
        self.settings, self.advice = settings, Advice(settings)
        self.fields: dict[str, gr.components.Component] = dict(beside_preview or {})
        config = form.example_config()
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_classes="lab-dataset"):
                    self.dataset = gr.HTML(dataset_html(None), elem_id="train-dataset")
                    self.change = gr.Button("Change", size="sm", min_width=90, scale=0)
                self._simple(config)
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    self._advanced(config)
            with gr.Column(scale=2, min_width=300, elem_classes="lab-sticky"):
                self._beside(config)

    def _beside(self, config: TrainConfig) -> None:
        self.plan = gr.HTML(plan_html(config, 0, None), min_height=164, elem_id="plan")
        self.start = gr.Button("Start", variant="primary", elem_id="start")
        self.problems = gr.HTML("", css_template=PROBLEMS_CSS, elem_id="train-problems")
        self.memory = gr.HTML(
            memory_panel.waiting_html(LOOKING),
            css_template=memory_panel.MEMORY_CSS,
            js_on_load=advice.REMEDY,
            elem_id="memory",
        )
        self.findings = gr.HTML(
            advice.waiting_html(LOOKING), css_template=advice.FINDINGS_CSS, js_on_load=advice.REMEDY, elem_id="findings"
        )
        self.recommend = gr.Button("Recommended for this dataset and device", size="md", elem_id="recommend")
        self.reasons = gr.HTML("", css_template=advice.REASONS_CSS, elem_id="reasons")
        self.command = gr.Textbox(
            form.command_line(config),
            label="The same on the command line",
            lines=9,
            max_lines=24,
            buttons=["copy"],
            elem_classes="lab-code",
            elem_id="command",
        )
        with gr.Row():
            self.save = gr.Button("Save settings (YAML)", size="md", min_width=130, elem_id="save-settings")
            self.load = gr.UploadButton(
                "Load settings", file_types=[".yaml", ".yml"], size="md", min_width=130, elem_id="load-settings"
            )
        self.saved = gr.Textbox("", visible="hidden", label="saved settings", elem_id="saved-settings")
        self.loaded = gr.HTML("", elem_id="loaded-settings")
        self.probe = ProbePart()

    def _simple(self, config: TrainConfig) -> None:
        self._add("base_model", config)
        with gr.Row():
            self._add("method", config)
            self._add("rank", config)
        with gr.Row():
            self._add("num_epochs", config)
            self._add("max_steps", config)
        self._add("name", config)

    def _advanced(self, config: TrainConfig) -> None:
        for number, (group, title) in enumerate(form.GROUPS.items()):
            names = [
                n
                for n, spec in form.SPECS.items()
                if spec.metadata["group"] == group and n not in (*form.SIMPLE, *self.fields)
            ]
            gr.HTML(f'<div class="lab-group{"" if number else " first"}">{title}</div>')
            for begin in range(0, len(names), 2):
                with gr.Row(equal_height=True):
                    for name in names[begin : begin + 2]:
                        self._add(name, config)

    def _add(self, name: str, config: TrainConfig) -> None:
        self.fields[name] = form.component(name, getattr(config, name))

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.fields[name] for name in form.SPECS]

    def connect(self, chosen: gr.State, picked: Any, identity: Identity, hidden: dict[str, Any]) -> None:
        """Wire the form; `picked` is the trigger after which another dataset is chosen."""
        self.probe.connect(identity, hidden)
        form_now = [chosen, *self.inputs]
        watched = [self.plan, self.command, self.problems, self.dataset, self.findings, self.memory]
        gr.on(
            [component.change for component in self.inputs] + [chosen.change],
            self.check,
            form_now,
            watched,
            trigger_mode="always_last",
            **hidden,
        )
        looked_at = [self.fields[name] for name in ("base_model", *form.BESIDE_PREVIEW)]
        changes = [component.change for component in looked_at]
        # After it, the dataset and the model's layers are known.
        self.looked = gr.on(
            [*changes, chosen.change],
            acting(self.look),
            [identity.token, chosen, *looked_at],
            None,
            trigger_mode="always_last",
            **hidden,
        ).then(self.check, form_now, watched, **hidden)
        picked(self.settle, form_now, self.inputs, **hidden)
        for told in (self.findings, self.memory):
            told.select(self.apply, None, self.inputs, **hidden)
        self.recommend.click(self.recommended, form_now, [self.reasons, *self.inputs], **hidden)
        self.save.click(self.save_settings, form_now, [self.saved, self.loaded], **hidden).then(
            None, self.saved, None, js=saved_settings.DOWNLOAD, **hidden
        )
        self.load.upload(self.load_settings, self.load, [self.loaded, chosen, *self.inputs], **hidden)

    def bases(self) -> gr.Dropdown:
        """The models that can be the base of a run now: merged ones come while the page is open."""
        return gr.Dropdown(choices=form.bases(self.settings))

    def look(self, chosen: Chosen, *how: str) -> None:
        """Find out what the next check wants to know."""
        self.advice.look(chosen, How(*how))

    def check(self, chosen: Chosen, *values: Any) -> tuple[str, Any, str, str, str, str]:
        """(plan, command line, problems, dataset line, findings, memory) for what the form says now."""
        dataset = dataset_html(chosen)
        try:
            config = self._config(chosen, values)
            looked = self.advice.known(chosen, how_of(config))
            layers = layers_text(config, looked)
        except ConfigError as error:
            return NO_PLAN, "", marked_problems(error.problems), dataset, "", memory_panel.waiting_html(UNKNOWN)
        told, memory = advice.waiting_html(LOOKING), memory_panel.waiting_html(LOOKING)
        if looked:
            facts = self.advice.facts(config, chosen, looked)
            told, memory = advice.findings_html(findings(facts)), memory_panel.memory_html(facts)
        apart = chosen.eval_file is not None
        return (
            plan_html(config, chosen.rows, layers, evaluated_apart=apart),
            form.command_line(config),
            "",
            dataset,
            told,
            memory,
        )

    def apply(self, event: gr.EventData) -> list[Any]:
        """The form with the remedy whose button was clicked."""
        remedy = json.loads(str(event.remedy))
        return self._with({name: value for name, value in remedy.items() if name in form.SPECS})

    def recommended(self, chosen: Chosen, *values: Any) -> list[Any]:
        """(reasons, form): what we would choose for this dataset and device."""
        named = dict(zip(form.SPECS, values, strict=True))
        base_model = named["base_model"]
        try:
            if problem := chosen.problem(self.settings):
                raise ConfigError(problem)
            looked = self.advice.look(chosen, How(base_model, named["template"], named["loss_on"]))
            try:
                before = self._config(chosen, values)
            except ConfigError:  # a form with mistakes is filled too
                before = TrainConfig(base_model=base_model, **chosen.config_fields())
            found = recommend(self.advice.facts(before, chosen, looked))
        except LabError as error:
            return [problems_panel(error.problems, title="Nothing to recommend yet"), *self._with({})]
        return [advice.reasons_html(found, before), *self._with(found.values())]

    def _with(self, changed: dict[str, Any]) -> list[Any]:
        return [form.to_form(name, changed[name]) if name in changed else gr.skip() for name in form.SPECS]

    def save_settings(self, chosen: Chosen, *values: Any) -> tuple[str, str]:
        """(file for the browser, problems)."""
        try:
            return saved_settings.save(self._config(chosen, values)), ""
        except ConfigError as error:
            return "", problems_panel(error.problems, title="Not saved: these settings cannot run yet")

    def load_settings(self, file: str) -> list[Any]:
        """(what is told, dataset, form) of an uploaded YAML; the form stays as it is where it cannot be read."""
        try:
            loaded = saved_settings.load(Path(file), self.settings)
        except ConfigError as error:
            panel = problems_panel(error.problems, title="These settings were not loaded")
            return [panel, gr.skip(), *(gr.skip() for _ in self.inputs)]
        told = f"Loaded {Path(file).name}" + "".join(f"; {text}" for text in loaded.told)
        return [
            f'<p class="lab-hint" role="status">{esc(told)}.</p>',
            loaded.chosen or gr.skip(),
            *self.fill(loaded.config),
        ]

    def settle(self, chosen: Chosen, *values: Any) -> list[Any]:
        """After another dataset: the recommended values of the example, or of any data, where nothing was changed."""
        recommended, plain = form.example_config(), TrainConfig()
        before, after = (plain, recommended) if chosen.is_example else (recommended, plain)
        settled = []
        for name, value in zip(form.SPECS, values, strict=True):
            untouched = name not in form.KEPT and value == form.to_form(name, getattr(before, name))
            settled.append(form.to_form(name, getattr(after, name)) if untouched else gr.skip())
        return settled

    def begin(self, chosen: Chosen, *values: Any) -> tuple[str, Run | None]:
        """(problems, run): queue a run and start it when its device is free."""
        try:
            config = self._config(chosen, values)
            self._refuse_what_stops(config, chosen)
            return "", start_run(config, self.settings)
        except LabError as error:
            return marked_problems(error.problems), None

    def settings_and_facts(
        self, chosen: Chosen, values: Sequence[Any], *, look: bool
    ) -> tuple[TrainConfig, Facts | None]:
        """What the form says, and what is known of such a run: None where it was not looked at yet and is not to be now. Raises
        LabError with all that is wrong."""
        config = self._config(chosen, tuple(values))
        looked = self.advice.known(chosen, how_of(config))
        if looked is None and look:
            looked = self.advice.look(chosen, how_of(config))
        return config, self.advice.facts(config, chosen, looked) if looked else None

    def _refuse_what_stops(self, config: TrainConfig, chosen: Chosen) -> None:
        """Raises ConfigError with every finding that must be mended first."""
        looked = self.advice.known(chosen, how_of(config))
        if looked is None or looked.problem:  # somebody may have signed in since
            looked = self.advice.look(chosen, how_of(config))
        layers_text(config, looked)
        if stops := what_stops(self.advice.facts(config, chosen, looked)):
            raise ConfigError(*stops)

    def fill(self, config: TrainConfig) -> list[Any]:
        """The form's values for a config, in the order of `inputs`."""
        return [form.to_form(name, getattr(config, name)) for name in form.SPECS]

    def _config(self, chosen: Chosen, values: tuple[Any, ...]) -> TrainConfig:
        if problem := chosen.problem(self.settings):
            raise ConfigError(problem)
        named = dict(zip(form.SPECS, values, strict=True))
        named["dataset_license"] = named["dataset_license"] or chosen.license()
        return form.to_config(named, chosen.config_fields())


def what_stops(facts: Facts) -> list[str]:
    """A sentence for every finding that must be mended before a start."""
    return [f"{finding.title}. {finding.why}" for finding in findings(facts) if finding.severity == STOP]


def how_of(config: TrainConfig) -> How:
    return How(config.base_model, config.template, config.loss_on)


def start_run(config: TrainConfig, settings: Settings) -> Run:
    """The run of this config: a new one, or the one that is queued or running already. Raises LabError."""
    run = RunStore(settings).create(config, token=acting_token())
    queue.add(run)
    queue.start_next(settings)
    return run


def marked_problems(problems: tuple[str, ...]) -> str:
    """The panel beside Start, and a red frame around each field that a problem names."""
    frames = "".join(
        f"#field-{name} {{ outline: 2px solid var(--failed); outline-offset: -2px; }}"
        for name in form.wrong_fields(problems)
    )
    return problems_panel(problems) + (f"<style>{frames}</style>" if frames else "")


def layers_text(config: TrainConfig, looked: Looked | None) -> str:
    """Which layers get an adapter, how many weights, and how the base is held. Raises ConfigError where layers are none of the
    model's."""
    if looked is None:
        return "Reading the model’s layers …"
    if looked.architecture is None:
        return looked.problem or "The model’s layers are not known."
    precision.check(looked.architecture.layers, config)
    held = precision.sentence(looked.architecture.layers, config)
    return f"Adapter on {targets.sentence(looked.architecture, config)}" + (f". Base: {held}" if held else "")


def plan_html(config: TrainConfig, rows: int, layers: str | None, *, evaluated_apart: bool = False) -> str:
    """What Start will do: method and base, steps, and which layers learn."""
    base = config.base_model if config.base_model != "bundled" else "the bundled model"
    if Path(base).is_absolute():
        base = Path(base).name
    sentence = f"{METHOD_NAMES[config.method]}, rank {config.rank}, on {esc(base)}"
    if rows or config.max_steps:
        train_rows = rows if config.eval_data or evaluated_apart else rows - held_out_rows(rows, config)
        steps = form.planned_steps(config, train_rows)
        detail = f"{counted(steps, 'step')} of {counted(config.rows_per_step, 'row')}"
    else:
        detail = f"{config.num_epochs:g} epochs"
    return (
        f'{CARD}<h3><span class="lab-method lab-method-{config.method}">{sentence}</span></h3>'
        f'<p class="lab-hint">{esc(detail)}; learning rate {config.learning_rate:g}; Start queues the run and shows it.</p>'
        f'<p class="lab-hint" style="margin-top:8px">{esc(layers or "")}</p></div>'
    )


def dataset_html(chosen: Chosen | None) -> str:
    if chosen is None:
        return '<p class="lab-hint">&nbsp;</p>'
    if not chosen.path:
        return '<p class="lab-warn">No dataset is chosen.</p>'
    evaluated = f", evaluated on {chosen.eval_file.name}" if chosen.eval_file else ""
    text = f"{chosen.name} · {counted(chosen.rows, 'row')}{evaluated}"
    return f'<p style="margin:0"><span class="lab-hint">Dataset</span> <b>{esc(text)}</b></p>'
