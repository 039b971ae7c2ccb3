"""Asks the Hub before a training whether what comes out of it could be pushed. Sends nothing there."""

from collections.abc import Collection, Iterator
from typing import Any

import gradio as gr

from qlora_core.errors import LabError
from qlora_core.hub import Also, probe
from qlora_core.ui.identity import Identity, scope_of, secret_of
from qlora_core.ui.pushing import ASKING, NO_TOKEN, repository, target
from qlora_core.ui.words import esc, problems_panel

ALSO = [("As a pull request", "pull request"), ("Into a collection", "collection")]


class ProbePart:
    def __init__(self) -> None:
        with gr.Accordion("Will it be possible to push it?", open=False, elem_id="probe"):
            with gr.Row(equal_height=True):
                self.repository, self.public = target("probe")
                self.also = gr.CheckboxGroup(
                    ALSO,
                    label="Also",
                    info="Each needs a right of its own.",
                    scale=3,
                    min_width=260,
                    elem_id="probe-also",
                )
            self.ask = gr.Button("Ask the Hub", size="md", elem_id="probe-ask")
            self.told = gr.HTML("", min_height=44, elem_id="probe-told")

    def connect(self, identity: Identity, hidden: dict[str, Any]) -> None:
        asked = [identity.token, self.repository, self.public, self.also]
        self.ask.click(self.answer, asked, self.told, **hidden)

    def answer(
        self, signed_in: gr.OAuthToken | None, typed: str, name: str, public: bool = False, also: Collection[Also] = ()
    ) -> Iterator[str]:
        """What was found, and all that is in the way of a push of a model."""
        secret, problems = secret_of(typed, signed_in), []
        try:
            name = repository(name)
        except LabError as error:
            problems += error.problems
        if not secret:
            problems.append(NO_TOKEN)
        if problems or not secret:
            yield problems_panel(problems, title="Not asked yet")
            return
        yield ASKING
        found = probe(secret, name, private=not public, also=also, scope=scope_of(typed, signed_in))
        told = "".join(
            f'<p class="lab-hint">{esc(sentence)}</p>'
            for sentence in found.sentences()
            if sentence not in found.problems
        )
        kind = "public" if public else "private"
        good = f'<p class="lab-hint" role="status">✓ A {kind} model can be pushed there.</p>' if found.ok else ""
        yield good + told + problems_panel(found.problems, title="A push would fail")
