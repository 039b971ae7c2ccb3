"""The card of a run's model: a person's words beside it as it will look. The words are kept with the run."""

import base64
import re
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from qlora_core import publishing
from qlora_core.errors import LabError
from qlora_core.model_card import CardText, licence_names
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.merge_choice import is_quantised
from qlora_core.ui.words import problems_panel

# (field, label, what the card says where it is empty)
TEXTS = (
    ("intended_use", "Intended use", "The card says what kind of rows it learnt from."),
    ("limits", "Limits", "The card says what was measured, and that nothing else was."),
    ("bias", "Bias", "The card says that it was not tested for bias."),
    ("misuse", "Misuse", "The card names decisions about people and false authorship."),
    ("notes", "Notes", "Left out."),
)
LICENCES = (
    ("license", "Licence of the model", "Empty: the strictest that is known of rows and base."),
    ("base_license", "Licence of the base", "As its page has it."),
)
FIELDS = tuple(name for name, *_ in (*TEXTS, *LICENCES))


class CardEditor:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fields: dict[str, Any] = {}
        self.open = gr.State(False)
        with gr.Accordion("Model card", open=False, elem_id="card") as self.part, gr.Row():
            with gr.Column(min_width=300):
                for name, label, info in TEXTS:
                    self.fields[name] = gr.Textbox(
                        label=label, info=info, lines=2, max_lines=8, elem_id=f"card-{name.replace('_', '-')}"
                    )
                for name, label, info in LICENCES:
                    self.fields[name] = gr.Dropdown(
                        licence_names(), value="", allow_custom_value=True, label=label, info=info,
                        elem_id=f"card-{name.replace('_', '-')}",
                    )  # fmt: skip
                self.problem = gr.HTML("", elem_id="card-problem")
            with gr.Column(min_width=300, scale=2):
                self.preview = gr.Markdown(
                    "", sanitize_html=True, container=True, min_height=200, max_height=720, elem_id="card-preview"
                )

    def connect(self, shown: list[Any], hidden: dict[str, Any]) -> None:
        """`shown`: run, what is pushed, the repository's name, and onto which base it is merged."""
        run, outputs = shown[0], [self.problem, self.preview]
        inputs = [*shown, *self.fields.values()]
        run.change(self.fill, run, list(self.fields.values()), **hidden)
        self.part.expand(self.show, inputs, outputs, **hidden)
        self.part.expand(lambda: True, None, self.open, **hidden)
        self.part.collapse(lambda: False, None, self.open, **hidden)
        what, name, onto = shown[1:]
        gr.on(
            [run.change, what.input, name.blur, name.submit, onto.input],
            self.show_again, [self.open, *inputs], outputs, trigger_mode="always_last", **hidden,
        )  # fmt: skip
        for field, component in self.fields.items():
            changed = component.blur if isinstance(component, gr.Textbox) else component.input
            changed(partial(self.keep, field), [component, *shown], outputs, trigger_mode="always_last", **hidden)

    def fill(self, run_id: str | None) -> tuple[str, ...]:
        try:
            text = publishing.card_text(RunStore(self.settings).get(run_id or ""))
        except (LabError, OSError):
            text = CardText()
        return tuple(getattr(text, name) for name in FIELDS)

    def keep(
        self, field: str, text: str | None, run_id: str | None, what: list[str], name: str, onto: str
    ) -> tuple[str, Any]:
        """Keeps the words with the run, those of this field alone: another page may hold others; and shows the card with them."""
        try:
            run = RunStore(self.settings).get(run_id or "")
            publishing.keep_card_text(run, replace(publishing.card_text(run), **{field: text or ""}))
        except LabError as error:
            return problems_panel(error.problems, title="Not kept"), gr.skip()
        return self.show(run_id, what, name, onto)

    def show_again(self, is_open: bool, *values: Any) -> tuple[Any, Any]:
        """Something else is pushed by now, or to elsewhere; while nobody looks, no card is made."""
        return self.show(*values) if is_open else (gr.skip(), gr.skip())

    def show(self, run_id: str | None, what: list[str], name: str, onto: str, *_: str) -> tuple[str, Any]:
        try:
            run = RunStore(self.settings).get(run_id or "")
            models = [one for one in what if one in publishing.MODELS]
            if not models:
                return "", "A dataset has a card of its own, which came with its preparation."
            return "", preview(run, models[0], name, onto)
        except LabError as error:
            return problems_panel(error.problems, title="No card"), ""


def preview(run: Run, what: str, name: str, onto: str) -> str:
    """The card as Markdown that a browser shows: front matter as a code block, pictures within."""
    merged_onto = onto if what == "merged" and is_quantised(run) else None
    card = publishing.card_of(run, name or "owner/name", publishing.Publication(what=what, onto=merged_onto))
    _, front, body = re.split(r"^---$", card.text, maxsplit=2, flags=re.MULTILINE)
    for path, content in card.images.items():
        body = body.replace(f"]({path})", f"](data:image/png;base64,{base64.b64encode(content).decode()})")
    return f"```yaml\n{front.strip()}\n```\n{body}"
