"""The part of the Publish tab that pushes a run's models to the Hub: what, where, its card, its versions."""

from typing import Any

import gradio as gr

from qlora_core import publishing
from qlora_core.errors import ConfigError, LabError
from qlora_core.model_card import licence_warning
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.card_editor import CardEditor
from qlora_core.ui.identity import Identity
from qlora_core.ui.merge_choice import MergeChoice, is_quantised
from qlora_core.ui.pushing import Pushing, Wish, further, further_asked, repository, target
from qlora_core.ui.uploads import safe_name
from qlora_core.ui.versions_part import VersionsPart
from qlora_core.ui.words import clock, empty, esc

WHAT = [("Adapter", "adapter"), ("Merged model", "merged"), ("Dataset", "dataset")]

# By the state of its proof; nothing but a model is loaded.
PROOFS = {
    None: "✓ arrived as sent",
    "proven": "✓ arrived as sent, loads, same logits",
    "pending": "not checked to the end",
    "differs": "arrived as sent, but its logits differ",
    "failed": "arrived as sent, but could not be loaded",
}


class PushPart:
    """`run` is the tab's dropdown of runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Column(visible=False, elem_id="push-part") as self.part:
            gr.HTML('<div class="lab-step">To the Hugging Face Hub</div>')
            with gr.Row(equal_height=True):
                self.what = gr.CheckboxGroup(
                    WHAT, value=["adapter"], label="What", scale=4, min_width=300, elem_id="push-what"
                )
                self.repository, self.public = target("push")
            self.warning = gr.HTML("", elem_id="push-warning")
            self.merge_choice = MergeChoice(settings)
            self.card = CardEditor(settings)
            with gr.Accordion("Version, branch, pull request, collection", open=False, elem_id="push-more"), gr.Row():
                self.version = gr.Textbox(
                    label="Version",
                    placeholder="the next of v1, v2, …",
                    max_lines=1,
                    min_width=220,
                    elem_id="push-version",
                )
                self.further = further("push")
            self.pushing = Pushing(settings, "push", self.wish)
            self.earlier = gr.HTML("", elem_id="push-earlier")
            self.versions = VersionsPart()

    def connect(self, run: gr.Dropdown, identity: Identity, hidden: dict[str, Any]) -> None:
        onto = self.merge_choice.onto
        asked = [run, self.what, onto, self.repository, self.public, self.version, *self.further]
        self.merge_choice.connect(run, hidden)
        self.what.input(lambda what: gr.Accordion(open="merged" in what), self.what, self.merge_choice.part, **hidden)
        pushing = self.pushing
        pushing.connect(asked, identity, hidden)
        run.change(
            self.show,
            [run, pushing.remembered],
            [self.part, self.repository, self.warning, self.earlier, *pushing.outputs],
            **hidden,
        )
        pushing.view.told.change(self.show_earlier, run, self.earlier, **hidden)
        self.card.connect([run, self.what, self.repository, onto], hidden)
        self.versions.connect(self.repository, identity, hidden)

    def show(self, run_id: str | None, remembered: str) -> tuple[Any, ...]:
        """The chosen run: its suggested repository, licence warning, earlier pushes, and this browser's own push of it."""
        try:
            run = RunStore(self.settings).get(run_id or "")
            warning = licence_warning(run)
        except (LabError, OSError):
            return gr.Column(visible=False), gr.skip(), "", "", *self.pushing.watch(None)
        before = publishing.shown(run.path)
        name = before[-1]["repo_id"] if before else safe_name(run.config().run_name())
        text = f'<p class="lab-warn">{esc(warning)}</p>' if warning else ""
        return gr.Column(visible=True), name, text, earlier_html(run), *self.pushing.again(remembered, run.run_id)

    def show_earlier(self, run_id: str | None) -> str:
        try:
            return earlier_html(RunStore(self.settings).get(run_id or ""))
        except (LabError, OSError):
            return ""

    def wish(
        self, run_id: str | None, what: list[str], onto: str, name: str, public: bool, version: str, *further: Any
    ) -> Wish:
        """Raises LabError with all that is missing."""
        problems, given, more, also = [], [], [], ()
        try:
            given.append(f"--repo-id={repository(name)}")
        except LabError as error:
            problems += error.problems
        try:
            more, also = further_asked(*further)
        except LabError as error:
            problems += error.problems
        if not what:
            problems.append("nothing is chosen; tick what to push")
        run = RunStore(self.settings).get(run_id or "")
        try:
            _ = "dataset" in what and publishing.dataset_of(run)
        except LabError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)
        given += [f"--what={','.join(what)}", *(["--public"] if public else [])]
        if "merged" in what and is_quantised(run):
            given.append(f"--onto={onto}")
        given += [f"--version={version.strip()}"] if (version or "").strip() else []
        kinds = {
            n: "dataset" if one == "dataset" else "model"
            for one, n in publishing.repositories(name.strip(), what).items()
        }
        return Wish(["push", run.run_id, *given, *more], kinds, not public, also)


def earlier_html(run: Run) -> str:
    """Pushes of this run that were recorded, the newest first."""
    found = publishing.shown(run.path)
    if not found:
        return empty(
            "No push of this run so far", "What arrives is downloaded again, loaded, and compared with what is here."
        )
    items = "".join(f"<li>{_pushed_before(entry)}</li>" for entry in reversed(found))
    return f'<div class="lab-card"><h3>Pushed before</h3><ul>{items}</ul></div>'


def _pushed_before(entry: dict[str, Any]) -> str:
    url, where = entry.get("pull_request") or entry["url"], f"{entry['repo_id']} {entry['version'] or ''}"
    proposed = " · pull request" if entry.get("pull_request") else ""
    proof = PROOFS[entry.get("proof", {}).get("state")]
    told = f"{esc(entry['what'])}{proposed} · {proof} · {clock(entry['at'])}"
    return f'<a href="{esc(url)}" target="_blank" rel="noopener">{esc(where)}</a> · {told}'
