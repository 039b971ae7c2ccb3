"""A job as the page follows it: how far it is, Cancel, how it ended. Knows not what the job does."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from qlora_core import jobs
from qlora_core.settings import Settings
from qlora_core.ui.progress import progress_html
from qlora_core.ui.words import problems_panel

CANCELLED = '<p class="lab-hint" role="status">Cancelled.</p>'


class JobView:
    """`ended(result)` -> HTML of what a job has made; `failed` is the title of what went wrong."""

    def __init__(self, settings: Settings, name: str, *, ended: Callable[[dict[str, Any]], str], failed: str) -> None:
        self.settings, self.ended, self.failed = settings, ended, failed
        self.job = gr.State("")
        self.timer = gr.Timer(0.7, active=False)
        self.told = gr.HTML("", min_height=44, elem_id=f"{name}-told")
        self.cancel = gr.Button("Cancel", size="sm", visible=False, elem_id=f"{name}-cancel")

    @property
    def outputs(self) -> list[Any]:
        return [self.job, self.timer, self.told, self.cancel]

    def connect(self, hidden: dict[str, Any]) -> None:
        self.timer.tick(self.tick, self.job, self.outputs, **hidden)
        self.cancel.click(self.stop, self.job, self.outputs, **hidden)

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
        progress = self.progress(job_id)
        if progress is None:
            return self._shown("", "")
        if progress.state == jobs.RUNNING:
            return self._shown(job_id, progress_html(progress), active=True)
        if progress.state == jobs.CANCELLED:
            return self._shown(job_id, CANCELLED + problems_panel(progress.problems, title="Before that"))
        if progress.state == jobs.FAILED:
            return self._shown(job_id, problems_panel(progress.problems, title=self.failed))
        return self._shown(job_id, self.ended(progress.result))

    def progress(self, job_id: str) -> jobs.Progress | None:
        job = jobs.find(job_id, self.settings)
        return job.progress() if job else None

    def _shown(self, job_id: str, told: str, *, active: bool = False) -> tuple[Any, ...]:
        return job_id, gr.Timer(active=active), told, gr.Button(visible=active)
