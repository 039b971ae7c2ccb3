"""The Publish tab: a run to the Hub, and as a file. Files are made below `<home>/downloads`."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core.errors import LabError
from qlora_core.gguf_export import export_gguf
from qlora_core.merging import merge
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.ui import run_view
from qlora_core.ui.downloads import adapter_zip, follow, link, merged_zip, offered
from qlora_core.ui.identity import Identity
from qlora_core.ui.merge_choice import WHY, is_quantised
from qlora_core.ui.push_part import PushPart
from qlora_core.ui.words import empty, esc, facts, hint, loss, problems_panel

EXPORTS = [("16-bit", "16bit"), ("NF4, 4-bit", "nf4")]
GGUF = ("GGUF", "gguf")
ABOUT = {
    "16bit": "As large as the base in 16 bits; loads anywhere, and can be the base model of a new run (Train, Base model).",
    "nf4": "About a quarter of the size; transformers loads it in 4 bits with bitsandbytes, and answers may differ a little. "
    "It cannot be trained further: for that, merge in 16 bits. It is made of the original base: the dequantised one lies on the "
    "values of 4 bits already, and rounding to them again would lose what was learnt.",
    "gguf": "One file of 16-bit weights for llama.cpp and what is built on it, by llama.cpp’s own converter.",
}


REPORT_SECONDS = 1.0


class PublishTab:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.run = gr.Dropdown(
            [], label="Run", info="finished or stopped runs", elem_id="publish-run", interactive=True
        )
        self.summary = gr.HTML(self.nothing(), elem_id="publish-summary")
        self.push = PushPart(settings)
        with gr.Column(visible=False, elem_id="publish-page") as self.page:
            gr.HTML('<div class="lab-step">As a file</div>')
            with gr.Row():
                with gr.Column(min_width=300):
                    gr.HTML(
                        hint("The adapter: a few megabytes, used with the base model. PEFT and most servers load it.")
                    )
                    self.zip = gr.Button("Download adapter (zip)", elem_id="download-adapter")
                    self.adapter_file = gr.HTML("", min_height=44, elem_id="adapter-file")
                with gr.Column(min_width=300):
                    exports = [*EXPORTS, *([GGUF] if settings.gguf_converter else [])]
                    self.export = gr.Radio(
                        exports, value="16bit", label="Weights of the merged model", elem_id="export"
                    )
                    self.about = gr.HTML(hint(ABOUT["16bit"]), elem_id="export-about")
                    self.merge = gr.Button("Merge and download", elem_id="merge")
                    self.merged_file = gr.HTML("", min_height=44, elem_id="merged-file")

    def connect(self, identity: Identity, hidden: dict[str, Any]) -> None:
        choice = self.push.merge_choice
        self.run.change(self.show, self.run, [self.summary, self.page, self.adapter_file, self.merged_file], **hidden)
        self.push.connect(self.run, identity, hidden)
        how = [self.run, choice.onto, self.export]
        self.export.input(self.exported, how, [choice.onto, choice.why, self.about], **hidden)
        choice.onto.input(self.merged_onto, how, [choice.why, self.export, self.about], **hidden)
        self.zip.click(self.adapter, self.run, self.adapter_file, **hidden).then(
            None, None, None, js=follow("adapter-file"), **hidden
        )
        self.merge.click(self.merged, how, self.merged_file, **hidden).then(
            None, None, None, js=follow("merged-file"), **hidden
        )

    def choices(self, current: str | None, looked_at: str | None = None) -> Any:
        """The Run dropdown: runs with an adapter, newest first; at first the one that was looked at in Runs."""
        found = run_view.with_adapter(run_view.statuses(self.settings), self.settings)
        ids = [run_id for _, run_id in found]
        wanted = [run_id for run_id in (looked_at, current, *ids) if run_id in ids]
        return gr.Dropdown(choices=found, value=next(iter(wanted), None))

    def exported(self, run_id: str | None, onto: str, export: str) -> tuple[Any, Any, str]:
        """NF4 is made of the original base alone."""
        moved = export == "nf4" and onto == "dequantized" and self._is_quantised(run_id)
        return (
            ("original", hint(WHY["original"]), hint(ABOUT[export]))
            if moved
            else (gr.skip(), gr.skip(), hint(ABOUT[export]))
        )

    def merged_onto(self, run_id: str | None, onto: str, export: str) -> tuple[str, Any, Any]:
        moved = export == "nf4" and onto == "dequantized"
        return hint(WHY[onto]), *(("16bit", hint(ABOUT["16bit"])) if moved else (gr.skip(), gr.skip()))

    def _is_quantised(self, run_id: str | None) -> bool:
        try:
            return is_quantised(RunStore(self.settings).get(run_id or ""))
        except (LabError, OSError):
            return False

    def nothing(self) -> str:
        return empty("Nothing to publish yet", "Start a run; when it has finished or stopped, its adapter is here.")

    def show(self, run_id: str | None) -> tuple[Any, ...]:
        try:
            status = RunStore(self.settings).get(run_id or "").status()
        except (LabError, FileNotFoundError):
            return self.nothing(), gr.Column(visible=False), "", ""
        pairs = [
            ("state", status.state),
            ("steps", f"{status.step:,}"),
            ("evaluation loss", loss(status.eval_loss)),
            ("base model", status.base_model),
        ]
        head = f'<div class="lab-card"><h3>{esc(status.name)}</h3>{facts(pairs)}</div>'
        return head, gr.Column(visible=True), "", ""

    def adapter(self, run_id: str | None) -> str:
        try:
            return link(adapter_zip(RunStore(self.settings).get(run_id or ""), self.settings))
        except LabError as error:
            return problems_panel(error.problems, title="No download")

    def merged(self, run_id: str | None, onto: str, export: str = "16bit") -> Iterator[str]:
        """Merges in a thread, so that a person sees how long it has been going on."""
        told: list[Any] = ["starting the merge"]
        done = threading.Event()

        def work() -> None:
            try:
                run = RunStore(self.settings).get(run_id or "")
                chosen = onto if is_quantised(run) else "original"
                if export == GGUF[1]:
                    told.append(offered(export_gguf(run, onto=chosen, report=told.append), run, self.settings))
                    return
                folder = merge(run, onto=chosen, export=export, report=told.append)
                told.append(merged_zip(run, folder, self.settings, told.append))
            except LabError as error:
                told.append(error)
            finally:
                done.set()

        threading.Thread(target=work, daemon=True).start()
        waited = 0
        while not done.wait(REPORT_SECONDS):
            waited += 1
            yield hint(f"{told[-1]} … {waited} s")
        if isinstance(told[-1], Path):
            base = hint(f"As the base model of a new run, write run:{run_id}") if export == "16bit" else ""
            yield link(told[-1]) + base
        else:
            yield problems_panel(
                getattr(told[-1], "problems", ("the merge ended early; see the app's output",)), title="No merge"
            )
