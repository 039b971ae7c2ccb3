"""The part of the Publish tab that pushes a run's models to the Hub: what, where, its card, its versions."""

from typing import Any

import gradio as gr

from qlora_core import jobs, publishing
from qlora_core.errors import ConfigError, LabError
from qlora_core.model_card import licence_warning
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.card_editor import CardEditor
from qlora_core.ui.pushing import Pushing, repository
from qlora_core.ui.uploads import safe_name
from qlora_core.ui.versions_part import VersionsPart
from qlora_core.ui.words import clock, empty, esc

WHAT = [("Adapter", "adapter"), ("Merged model", "merged")]


class PushPart:
    """`run` is the tab's dropdown of runs. A token stays in its field in the browser; a push has it for as long as it lasts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Column(visible=False, elem_id="push-part") as self.part:
            gr.HTML('<div class="lab-step">To the Hugging Face Hub</div>')
            with gr.Row():
                self.what = gr.CheckboxGroup(WHAT, value=["adapter"], label="What", min_width=220, elem_id="push-what")
                self.repository = gr.Textbox(
                    label="Repository",
                    placeholder="name, or owner/name",
                    max_lines=1,
                    info="Made if it is not there.",
                    min_width=220,
                    elem_id="push-repo",
                )
                self.public = gr.Checkbox(
                    label="Public", info="Else only you see it.", value=False, min_width=220, elem_id="push-public"
                )
                self.token = gr.Textbox(
                    label="Token with write permission", type="password", max_lines=1,
                    info="Used for pushes of this session, and kept nowhere.", min_width=220, elem_id="push-token",
                )  # fmt: skip
            self.warning = gr.HTML("", elem_id="push-warning")
            self.card = CardEditor(settings)
            with gr.Accordion("Version, branch, pull request", open=False, elem_id="push-more"), gr.Row():
                self.version = gr.Textbox(
                    label="Version",
                    placeholder="the next of v1, v2, …",
                    max_lines=1,
                    min_width=220,
                    elem_id="push-version",
                )
                self.branch = gr.Textbox(
                    label="Branch", placeholder="main", max_lines=1, min_width=220, elem_id="push-branch"
                )
                self.pull_request = gr.Checkbox(
                    label="As a pull request", value=False, min_width=220, elem_id="push-pull-request"
                )
                self.force = gr.Checkbox(
                    label="Over a better version",
                    info="Or over what others have changed there.",
                    value=False,
                    min_width=220,
                    elem_id="push-force",
                )
            self.pushing = Pushing(settings, "push")
            self.earlier = gr.HTML("", elem_id="push-earlier")
            self.versions = VersionsPart()

    def connect(self, run: gr.Dropdown, onto: gr.Radio, hidden: dict[str, Any]) -> None:
        """`onto`: the tab's choice of the base that is merged into."""
        asked = [
            run, self.what, onto, self.repository, self.public, self.version, self.branch, self.pull_request, self.force,
        ]  # fmt: skip
        pushing = self.pushing
        pushing.connect(self.arguments, asked, self.token, hidden)
        run.change(self.show, run, [self.part, self.repository, self.warning, self.earlier, *pushing.outputs], **hidden)
        pushing.told.change(self.show_earlier, run, self.earlier, **hidden)
        self.card.connect([run, self.what, self.repository, onto], hidden)
        self.versions.connect(self.repository, self.token, hidden)

    def show(self, run_id: str | None) -> tuple[Any, ...]:
        """The chosen run: its suggested repository, licence warning, earlier pushes, and a push of it that goes on."""
        try:
            run = RunStore(self.settings).get(run_id or "")
            warning = licence_warning(run)
        except (LabError, OSError):
            return gr.Column(visible=False), gr.skip(), "", "", *self.pushing.watch(None)
        before = publishing.published(run)
        name = before[-1]["repo_id"] if before else safe_name(run.config().run_name())
        text = f'<p class="lab-warn">{esc(warning)}</p>' if warning else ""
        job = jobs.running(["push", run.run_id], self.settings)
        return gr.Column(visible=True), name, text, earlier_html(run), *self.pushing.watch(job)

    def show_earlier(self, run_id: str | None) -> str:
        try:
            return earlier_html(RunStore(self.settings).get(run_id or ""))
        except (LabError, OSError):
            return ""

    def arguments(
        self, run_id: str | None, what: list[str], onto: str, name: str, public: bool,
        version: str, branch: str, pull_request: bool, force: bool,
    ) -> list[str]:  # fmt: skip
        """Raises LabError with all that is missing."""
        problems, given = [], []
        try:
            given.append(f"--repo-id={repository(name)}")
        except LabError as error:
            problems += error.problems
        if not what:
            problems.append("nothing is chosen; tick what to push")
        if problems:
            raise ConfigError(*problems)
        run = RunStore(self.settings).get(run_id or "")
        given += [f"--what={','.join(what)}", *(["--public"] if public else []), *(["--force"] if force else [])]
        if "merged" in what and run.config().method == "qlora":
            given.append(f"--onto={onto}")
        given += [
            f"--{option}={value.strip()}" for option, value in (("version", version), ("revision", branch)) if value
        ]
        return ["push", run.run_id, *given, *(["--pull-request"] if pull_request else [])]


def earlier_html(run: Run) -> str:
    """Pushes of this run that were recorded, the newest first."""
    found = publishing.published(run)
    if not found:
        return empty("Not pushed yet", "What arrives is downloaded again, loaded, and compared with what is here.")
    items = "".join(
        f"<li>{esc(entry['repo_id'])} {esc(entry['version'] or '')} · {esc(entry['what'])} · "
        f"{esc(entry['proof']['state'])} · {clock(entry['at'])}</li>"
        for entry in reversed(found)
    )
    return f'<div class="lab-card"><h3>Pushed before</h3><ul>{items}</ul></div>'
