"""The part of the Publish tab that pushes a run's model to the Hub: a job of its own, its plan before, its proof after."""

from typing import Any

import gradio as gr

from qlora_core import jobs, publishing
from qlora_core.errors import LabError
from qlora_core.hub import machine_token
from qlora_core.model_card import licence_warning
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.progress import progress_html
from qlora_core.ui.uploads import safe_name
from qlora_core.ui.words import clock, empty, esc, problems_panel

WHAT = [("Adapter", "adapter"), ("Merged model", "merged")]
PROVEN = "Downloaded again and loaded: the logits are equal."


class PushPart:
    """Builds the part; `run` is the tab's dropdown of runs. A token lives in its field until the job has it, and nowhere else."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Column(visible=False, elem_id="push-part") as self.part:
            gr.HTML('<div class="lab-step">To the Hugging Face Hub</div>')
            with gr.Row(equal_height=True):
                self.what = gr.Radio(WHAT, value="adapter", label="What", elem_id="push-what")
                self.repository = gr.Textbox(
                    label="Repository",
                    placeholder="owner/name",
                    max_lines=1,
                    info="Made if it is not there.",
                    elem_id="push-repo",
                )
                self.public = gr.Checkbox(
                    label="Public", info="Else only you see it.", value=False, elem_id="push-public"
                )
            with gr.Row(equal_height=True):
                self.token = gr.Textbox(
                    label="Token with write permission", type="password", max_lines=1, placeholder="that of this machine",
                    info="Used for this push, and kept nowhere.", elem_id="push-token",
                )  # fmt: skip
                self.confirmed = gr.Checkbox(label="Publish all the same", visible=False, elem_id="push-confirm")
            self.warning = gr.HTML("", elem_id="push-warning")
            with gr.Row():
                self.look = gr.Button("What would change", elem_id="push-plan")
                self.push = gr.Button("Push", variant="primary", elem_id="push-model")
            self.job = gr.State("")
            self.timer = gr.Timer(0.7, active=False)
            self.told = gr.HTML("", min_height=44, elem_id="push-model-told")

    def connect(self, run: gr.Dropdown, hidden: dict[str, Any]) -> None:
        asked = [run, self.what, self.repository, self.public, self.token, self.confirmed]
        told = [self.job, self.timer, self.told]
        run.change(self.show, run, [self.part, self.repository, self.warning, self.confirmed, self.told], **hidden)
        # What is told is of the run that is shown; a push that goes on is in its record when it has ended.
        run.change(lambda: ("", gr.Timer(active=False)), None, [self.job, self.timer], **hidden)
        self.look.click(self.plan, asked, told, **hidden)
        self.push.click(self.begin, asked, told, **hidden).then(lambda: "", None, self.token, **hidden)
        self.timer.tick(self.tick, self.job, [self.timer, self.told], **hidden)

    def show(self, run_id: str | None) -> tuple[Any, ...]:
        """(part, repository's hint, licence warning, its confirmation, earlier pushes) of the chosen run."""
        try:
            run = RunStore(self.settings).get(run_id or "")
            warning = licence_warning(run)
        except (LabError, OSError):
            return gr.Column(visible=False), gr.skip(), "", gr.Checkbox(visible=False), ""
        hint = f"owner/{safe_name(run.config().run_name())}"
        text = f'<p class="lab-warn">{esc(warning)}</p>' if warning else ""
        confirm = gr.Checkbox(value=False, visible=warning is not None)
        return gr.Column(visible=True), gr.Textbox(placeholder=hint), text, confirm, earlier_html(run)

    def plan(self, *asked: Any) -> tuple[Any, ...]:
        return self._start(*asked, plan=True)

    def begin(self, *asked: Any) -> tuple[Any, ...]:
        return self._start(*asked, plan=False)

    def _start(
        self, run_id: str | None, what: str, repository: str, public: bool, token: str, confirmed: bool, *, plan: bool
    ) -> tuple[Any, ...]:
        """(job, timer, what is told): all that is missing at once, or the job."""
        secret, problems = (token or "").strip() or machine_token(), []
        try:
            run = RunStore(self.settings).get(run_id or "")
            if not plan and not confirmed and (warning := licence_warning(run)):
                problems.append(f"{warning} Tick “Publish all the same” where you may")
        except LabError as error:
            problems += error.problems
        if not secret:
            problems.append("no token; type one in, or set HF_TOKEN for the app")
        if not (repository or "").strip():
            problems.append("no repository is named; write owner/name")
        if problems:
            return "", gr.Timer(active=False), problems_panel(problems, title="Not pushed yet")
        arguments = ["push", run.run_id, f"--repo-id={repository.strip()}", f"--what={what}", "--json"]
        arguments += (["--public"] if public else []) + ["--plan" if plan else "--yes"]
        job = jobs.start(arguments, self.settings, secret=secret, again=True)
        return job.job_id, gr.Timer(active=True), progress_html(job.progress())

    def tick(self, job_id: str) -> tuple[Any, str]:
        job = jobs.find(job_id, self.settings)
        progress = job.progress() if job else None
        if progress is None or progress.state == jobs.RUNNING:
            return gr.Timer(active=progress is not None), progress_html(progress)
        off = gr.Timer(active=False)
        if progress.state != jobs.DONE:
            return off, problems_panel(progress.problems, title="Not pushed")
        return off, planned_html(progress.result) if "plan" in progress.result else pushed_html(progress.result)


def planned_html(result: dict[str, Any]) -> str:
    items = "".join(f"<li>{esc(sentence)}</li>" for sentence in result["plan"])
    return f'<div class="lab-card"><h3>What a push would change</h3><ul>{items}</ul></div>'


def pushed_html(result: dict[str, Any]) -> str:
    """The link, the version, and whether what arrived is what is here."""
    url, proof = result.get("pull_request") or result["url"], result.get("proof") or {}
    link = f'<a class="lab-link" href="{esc(url)}" target="_blank" rel="noopener">{esc(url)}</a>'
    changed = "Pushed" if result["changed"] else "Nothing has changed since the last push"
    version = f", version {esc(result['version'])}" if result.get("version") else ""
    if proof.get("state") == "proven":
        shown = f'<p class="lab-hint">✓ {PROVEN}</p>'
    else:
        why = proof.get("reason") or "its logits differ from those of the model here"
        shown = f'<p class="lab-warn">Not proven: {esc(why)}</p>'
    return f'<p class="lab-hint">{changed}: commit {esc(result["commit"][:10])}{version}</p>{link}{shown}'


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
