"""Combine adapters: choose runs, weights and a method; what comes out is a run of its own, queued as any other."""

from typing import Any

import gradio as gr

from qlora_core import queue
from qlora_core.combining import DENSITY, METHODS, create_combined
from qlora_core.errors import LabError, RunError
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.ui.words import esc, problems_panel

FIRST_METHOD = "svd"
NAME = "combined"


class CombinePart:
    """An accordion of the Runs tab; hidden while fewer than two runs have an adapter."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Accordion("Combine adapters", open=False, visible=False, elem_id="combine") as self.accordion:
            gr.HTML(
                '<p class="lab-hint">Adds the adapters of several runs on one base model into a new run, and measures the '
                "sum on the first run's held-out rows. Nothing is trained.</p>"
            )
            # Custom values: a run that was deleted meanwhile stays chosen, and Combine says so.
            self.runs = gr.Dropdown(
                [],
                label="Runs, in order",
                info="two or more with an adapter",
                multiselect=True,
                allow_custom_value=True,
                elem_id="combine-runs",
            )
            with gr.Row():
                self.method = gr.Dropdown(
                    list(METHODS),
                    value=FIRST_METHOD,
                    label="Method",
                    info="how they are added",
                    elem_id="combine-method",
                )
                self.weights = gr.Textbox(
                    label="Weights", placeholder="equal", info="one a run, such as 0.7, 0.3", elem_id="combine-weights"
                )
                self.rank = gr.Textbox(label="Rank", placeholder="highest of the parts", info="of the new adapter")
                self.density = gr.Textbox(
                    label="Density", placeholder=f"{DENSITY:g}", info="share of entries kept", visible=False
                )
                self.name = gr.Textbox(NAME, label="Name", info="of the new run", elem_id="combine-name")
            self.why = gr.HTML(why(FIRST_METHOD), elem_id="combine-why")
            self.button = gr.Button("Combine", variant="primary", size="md", elem_id="combine-button")
            self.problems = gr.HTML("", elem_id="combine-problems")

    def connect(self, selected: gr.Textbox, hidden: dict[str, Any]) -> gr.events.Dependency:
        """Wire it; returns the event after which the new run is selected."""
        self.method.input(self.explain, self.method, [self.why, self.rank, self.density], **hidden)
        inputs = [self.runs, self.weights, self.method, self.name, self.density, self.rank]
        return self.button.click(self.combine, inputs, [self.problems, selected], **hidden)

    def explain(self, method: str) -> tuple[str, Any, Any]:
        kind = METHODS[method]
        return why(method), gr.Textbox(visible=kind.takes_rank), gr.Textbox(visible=kind.takes_density)

    def combine(self, run_ids: list[str] | None, *typed: str) -> tuple[str, Any]:
        """(problems, id of the new run): all that is wrong with what was typed, else all that keeps the runs apart."""
        try:
            run = self._create(run_ids or [], *typed)
        except LabError as error:
            return problems_panel(error.problems, title="These cannot be combined"), gr.skip()
        queue.add(run)
        queue.start_next(self.settings)
        return "", run.run_id

    def _create(self, run_ids: list[str], weights: str, method: str, name: str, density: str, rank: str) -> Any:
        problems: list[str] = []
        runs = [_or_problem(RunStore(self.settings).get, run_id, problems) for run_id in run_ids]
        shares = _or_problem(lambda text: weights_of(text, len(run_ids)), weights, problems)
        kind = METHODS[method]
        # A field that is hidden keeps what was typed before, and does not count.
        kept = _or_problem(
            lambda text: _number(text, "density", float), density if kind.takes_density else "", problems
        )
        wanted = _or_problem(lambda text: _number(text, "rank", int), rank if kind.takes_rank else "", problems)
        if problems:
            raise RunError(*problems)
        return create_combined(runs, shares, method=method, name=name, density=kept, rank=wanted)


def why(method: str) -> str:
    return f'<p class="lab-hint"><b>{esc(method)}</b>: {esc(METHODS[method].help)}</p>'


def weights_of(text: str, runs: int) -> list[float]:
    """Numbers separated by commas or spaces; equal shares of 1 when nothing is typed. Raises RunError."""
    if not text.strip():
        return [1 / max(1, runs)] * runs
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise RunError(f"weights are {text!r}; write numbers separated by commas, such as 0.7, 0.3") from None


def _number(text: str, what: str, kind: type) -> Any:
    if not text.strip():
        return None
    try:
        return kind(text)
    except ValueError:
        raise RunError(f"{what} is {text!r}; write a number, or nothing for the automatic one") from None


def _or_problem(function: Any, text: str, problems: list[str]) -> Any:
    """The function's value; what is wrong joins the problems, so that all are told at once."""
    try:
        return function(text)
    except LabError as error:
        problems.extend(error.problems)
        return None
