"""The Train tab: a filled form, the equal command line, every problem beside Start, and Start."""

from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core import queue
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, LabError
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui import form
from qlora_core.ui.data_tab import Chosen
from qlora_core.ui.words import METHOD_NAMES, counted, esc, problems_panel

NO_PLAN = (
    '<div class="lab-card"><h3>Not ready to start</h3><p class="lab-hint">What is missing stands below Start.</p></div>'
)


class TrainTab:
    """Builds the form from TrainConfig's metadata. `fields` maps each field to its component."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fields: dict[str, gr.components.Component] = {}
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
                self.plan = gr.HTML(plan_html(config, 0), min_height=112, elem_id="plan")
                self.start = gr.Button("Start", variant="primary", elem_id="start")
                self.problems = gr.HTML("", elem_id="train-problems")
                self.command = gr.Textbox(
                    form.command_line(config),
                    label="The same on the command line",
                    lines=9,
                    max_lines=24,
                    buttons=["copy"],
                    elem_classes="lab-code",
                    elem_id="command",
                )

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
            names = [n for n, spec in form.SPECS.items() if spec.metadata["group"] == group and n not in form.SIMPLE]
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

    def connect(self, chosen: gr.State, picked: list[gr.events.Dependency], hidden: dict[str, Any]) -> None:
        """Wire the form; `picked` are the events after which another dataset is chosen."""
        watched = [self.plan, self.command, self.problems, self.dataset]
        gr.on(
            [component.change for component in self.inputs] + [chosen.change],
            self.check,
            [chosen, *self.inputs],
            watched,
            trigger_mode="always_last",
            **hidden,
        )
        for event in picked:
            event.then(self.settle, [chosen, *self.inputs], self.inputs, **hidden)

    def check(self, chosen: Chosen, *values: Any) -> tuple[str, Any, str, str]:
        """(plan, command line, problems, dataset line) for what the form says now."""
        try:
            config = self._config(chosen, values)
        except ConfigError as error:
            return NO_PLAN, "", marked_problems(error.problems), dataset_html(chosen)
        return plan_html(config, chosen.rows), form.command_line(config), "", dataset_html(chosen)

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
            return "", start_run(config, self.settings)
        except LabError as error:
            return marked_problems(error.problems), None

    def fill(self, config: TrainConfig) -> list[Any]:
        """The form's values for a config, in the order of `inputs`."""
        return [form.to_form(name, getattr(config, name)) for name in form.SPECS]

    def _config(self, chosen: Chosen, values: tuple[Any, ...]) -> TrainConfig:
        if problem := chosen.problem():
            raise ConfigError(problem)
        return form.to_config(dict(zip(form.SPECS, values, strict=True)), chosen.config_fields())


def start_run(config: TrainConfig, settings: Settings) -> Run:
    """The run of this config: a new one, or the one that is queued or running already. Raises LabError."""
    run = RunStore(settings).create(config)
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


def plan_html(config: TrainConfig, rows: int) -> str:
    """What Start will do, in two sentences."""
    base = config.base_model if config.base_model != "bundled" else "the bundled model"
    sentence = f"{METHOD_NAMES[config.method]}, rank {config.rank}, on {esc(base)}"
    if rows or config.max_steps:
        train_rows = rows if config.eval_data else rows - max(1, round(rows * config.eval_fraction))
        steps = form.planned_steps(config, train_rows)
        detail = f"{counted(steps, 'step')} of {counted(config.rows_per_step, 'row')}"
    else:
        detail = f"{config.num_epochs:g} epochs"
    return (
        f'<div class="lab-card"><h3><span class="lab-method lab-method-{config.method}">{sentence}</span></h3>'
        f'<p class="lab-hint">{esc(detail)}; learning rate {config.learning_rate:g}; '
        "Start queues the run and shows it.</p></div>"
    )


def dataset_html(chosen: Chosen | None) -> str:
    if chosen is None:
        return '<p class="lab-hint">&nbsp;</p>'
    if not chosen.path:
        return '<p class="lab-warn">No dataset is chosen.</p>'
    evaluated = f", evaluated on {Path(chosen.eval_path).name}" if chosen.eval_path else ""
    text = f"{Path(chosen.path).name} · {counted(chosen.rows, 'row')}{evaluated}"
    return f'<p style="margin:0"><span class="lab-hint">Dataset</span> <b>{esc(text)}</b></p>'
