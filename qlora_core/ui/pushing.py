"""The buttons of a push and what it says: its job, what must be agreed to first, cancel, the outcome. Knows not what is pushed."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from qlora_core import jobs
from qlora_core.errors import ConfigError, LabError
from qlora_core.hub import machine_token
from qlora_core.settings import Settings
from qlora_core.ui.progress import progress_html
from qlora_core.ui.words import esc, problems_panel

PROVEN = "Downloaded again and loaded: the logits are equal."
NO_TOKEN = "no token; type one in, or set HF_TOKEN for the app"
NO_REPOSITORY = "no repository is named; write owner/name"


class Pushing:
    """`arguments(*values)` gives the command line of `inputs`, and raises LabError with all that is missing."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        with gr.Row():
            self.look = gr.Button("What would change", elem_id=f"{name}-plan")
            self.push = gr.Button("Push", variant="primary", elem_id=f"{name}-go")
            self.cancel = gr.Button("Cancel", visible=False, elem_id=f"{name}-cancel")
        self.job = gr.State("")
        self.timer = gr.Timer(0.7, active=False)
        self.told = gr.HTML("", min_height=44, elem_id=f"{name}-told")
        self.agree = gr.Button("Push just this", visible=False, variant="primary", elem_id=f"{name}-agree")

    @property
    def outputs(self) -> list[Any]:
        return [self.job, self.timer, self.told, self.agree, self.cancel]

    def connect(
        self,
        arguments: Callable[..., list[str]],
        inputs: list[Any],
        token: gr.Textbox,
        hidden: dict[str, Any],
    ) -> None:
        self.arguments = arguments
        self.look.click(self.plan, [token, *inputs], self.outputs, **hidden)
        self.push.click(self.begin, [token, *inputs], self.outputs, **hidden)
        self.agree.click(self.go_on, [self.job, token, *inputs], self.outputs, **hidden)
        self.cancel.click(self.stop, self.job, self.outputs, **hidden)
        self.timer.tick(self.tick, self.job, self.outputs, **hidden)

    def plan(self, token: str, *values: Any) -> tuple[Any, ...]:
        return self._start(token, values, ["--plan"])

    def begin(self, token: str, *values: Any) -> tuple[Any, ...]:
        return self._start(token, values, [])

    def go_on(self, job_id: str, token: str, *values: Any) -> tuple[Any, ...]:
        """What was shown is agreed to; what has changed since is shown instead."""
        job = jobs.find(job_id, self.settings)
        progress = job.progress() if job else None
        shown = progress.result.get("agree") if progress else None
        return self._start(token, values, [f"--agreed={shown}"] if shown else [])

    def _start(self, token: str, values: tuple[Any, ...], more: list[str]) -> tuple[Any, ...]:
        """All that is missing at once, or the job."""
        secret, problems, arguments = (token or "").strip() or machine_token(), [], []
        try:
            arguments = self.arguments(*values)
        except LabError as error:
            problems += error.problems
        if not secret:
            problems.append(NO_TOKEN)
        if problems:
            return self._shown("", problems_panel(problems, title="Not pushed yet"))
        return self.watch(jobs.start([*arguments, *more, "--json"], self.settings, secret=secret, again=True))

    def watch(self, job: jobs.Job | None, otherwise: str = "") -> tuple[Any, ...]:
        """Outputs that follow the job until it ends; `otherwise` is shown where there is none."""
        return (
            self._shown(job.job_id, progress_html(job.progress()), active=True) if job else self._shown("", otherwise)
        )

    def stop(self, job_id: str) -> tuple[Any, ...]:
        if job := jobs.find(job_id, self.settings):
            job.cancel()
        return self.tick(job_id)

    def tick(self, job_id: str) -> tuple[Any, ...]:
        job = jobs.find(job_id, self.settings)
        progress = job.progress() if job else None
        if progress is None:
            return self._shown("", "")
        if progress.state == jobs.RUNNING:
            return self._shown(job_id, progress_html(progress), active=True)
        if progress.state == jobs.CANCELLED:
            return self._shown(job_id, '<p class="lab-hint" role="status">Cancelled.</p>')
        if progress.state == jobs.FAILED:
            return self._shown(job_id, problems_panel(progress.problems, title="Not pushed"))
        result = progress.result
        if "plan" in result:
            return self._shown(job_id, planned_html(result), agree=result["needed"])
        return self._shown(job_id, pushed_html(result))

    def _shown(self, job_id: str, told: str, *, active: bool = False, agree: bool = False) -> tuple[Any, ...]:
        return job_id, gr.Timer(active=active), told, gr.Button(visible=agree), gr.Button(visible=active)


def repository(text: str | None) -> str:
    """Raises ConfigError where nothing is named."""
    if not (text or "").strip():
        raise ConfigError(NO_REPOSITORY)
    return str(text).strip()


def planned_html(result: dict[str, Any]) -> str:
    items = "".join(f"<li>{esc(sentence.strip())}</li>" for sentence in result["plan"])
    warned = "".join(f'<p class="lab-warn">{esc(warning)}</p>' for warning in result["warnings"])
    return f'<div class="lab-card"><h3>What a push would change</h3><ul>{items}</ul>{warned}</div>'


def pushed_html(result: dict[str, Any]) -> str:
    """Of each thing the link, the version, and whether what arrived is what is here."""
    return "".join(_pushed(entry) for entry in result["pushed"])


def _pushed(entry: dict[str, Any]) -> str:
    url, proof = entry.get("pull_request") or entry["url"], entry.get("proof")
    link = f'<a class="lab-link" href="{esc(url)}" target="_blank" rel="noopener">{esc(url)}</a>'
    changed = "Pushed" if entry["changed"] else "Nothing has changed since the last push"
    version = f", version {esc(entry['version'])}" if entry.get("version") else ""
    shown = ""
    if proof and proof.get("state") == "proven":
        shown = f'<p class="lab-hint">✓ {PROVEN}</p>'
    elif proof:
        why = proof.get("reason") or "its logits differ from those of the model here"
        shown = f'<p class="lab-warn">Not proven: {esc(why)}</p>'
    return f'<p class="lab-hint">{changed}: commit {esc(entry["commit"][:10])}{version}</p>{link}{shown}'
