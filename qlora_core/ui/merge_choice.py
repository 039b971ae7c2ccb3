"""How a merged model is made: onto which base, and what that changes as measured. For what is pushed and what is downloaded."""

from typing import Any

import gradio as gr

from qlora_core import jobs
from qlora_core.drift import HEADER, basis, read_drift, table
from qlora_core.errors import LabError
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.job_view import JobView
from qlora_core.ui.words import esc, hint, problems_panel

ONTO = [
    ("the base as it was trained on: dequantised from 4 bits", "dequantized"),
    ("the original 16-bit base", "original"),
]
WHY = {
    "dequantized": "The adapter learnt to correct the 4-bit weights, so this merge answers most nearly as the trained model did.",
    "original": "The weights are the better ones, but the adapter never saw them: answers may differ a little.",
    "lora": "LoRA trained on the original base, so the merge answers as the trained model did, but for the rounding to 16 bits.",
}


HOW_NEAR = "KL and the same token tell how near a merge is to the trained model; its loss may be lower, and its answers others."


class MergeChoice:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Accordion("How the merged model is made", open=False, elem_id="merge-choice") as self.part:
            self.onto = gr.Radio(ONTO, value="dequantized", label="Merge onto", elem_id="onto")
            self.why = gr.HTML("")
            self.measure = gr.Button("Measure what each merge changes", elem_id="drift")
            self.drift = JobView(settings, "drift", ended=drift_html, failed="Not measured")

    @property
    def outputs(self) -> list[Any]:
        return [self.onto, self.why, *self.drift.outputs]

    def connect(self, run: gr.Dropdown, hidden: dict[str, Any]) -> None:
        run.change(self.show, run, self.outputs, **hidden)
        self.measure.click(self.measure_drift, run, self.drift.outputs, **hidden)
        self.drift.connect(hidden)

    def show(self, run_id: str | None) -> tuple[Any, ...]:
        try:
            run = RunStore(self.settings).get(run_id or "")
            quantised = is_quantised(run)
        except (LabError, OSError):
            return gr.skip(), "", *self.drift.watch(None)
        onto = gr.Radio(value="dequantized" if quantised else "original", visible=quantised)
        why = hint(WHY["dequantized" if quantised else "lora"])
        measuring = jobs.running(["drift", run.run_id], self.settings)
        drifted = drift_html(found) if (found := read_drift(run)) else ""
        return onto, why, *self.drift.watch(measuring, drifted)

    def measure_drift(self, run_id: str | None) -> tuple[Any, ...]:
        try:
            run = RunStore(self.settings).get(run_id or "")
        except LabError as error:
            return self.drift.watch(None, problems_panel(error.problems, title="Not measured"))
        return self.drift.watch(jobs.start(["drift", run.run_id, "--json"], self.settings, again=True))


def is_quantised(run: Run) -> bool:
    return run.config().method == "qlora"


def drift_html(found: dict[str, Any]) -> str:
    """Of each way of merging how far it is from the model that was trained, and on what that was measured."""
    head = "".join(f"<th>{esc(name)}</th>" for name in HEADER)
    rows = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in table(found))
    return (
        f'<div class="lab-scroll"><table class="lab-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{hint(basis(found))}{hint(HOW_NEAR)}"
    )
