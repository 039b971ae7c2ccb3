"""Endpoint of a push for gradio_client. It waits for the job that the page would start."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import yaml

from qlora_core import jobs, publishing
from qlora_core.errors import HubError
from qlora_core.settings import Settings
from qlora_core.ui.identity import secret_of
from qlora_core.ui.pushing import NO_TOKEN_FOR_CLIENT, repository

LOOK_SECONDS = 0.3


def add_push_endpoint(settings: Settings, told: Callable[..., Any]) -> None:
    """Inside a Blocks context; `told` turns a LabError into the client's."""

    @told
    def push_run(
        run_id: str,
        repo_id: str,
        token: str = "",
        what: str = "",
        public: bool = False,
        onto: str = "",
        version: str = "",
        collection: str = "",
        revision: str = "",
        pull_request: bool = False,
        plan: bool = False,
        agreed: str = "",
        force: bool = False,
        card: dict[str, str] | None = None,
        with_rows: bool = False,
    ) -> dict[str, Any]:
        """Push a run, or a study's report: `what` is adapter, merged or dataset, or several with commas; of a study, report.
        `card` has words for the model card by section, `with_rows` sends rows of the dataset with a report. Returns {"pushed":
        [...], "collection": url} with commit, version and proof of each, or {"plan": [...], "warnings": [...], "agree": digest,
        "needed": true} where that must be agreed to first: call again with `agreed=digest`. The token is used for this call and
        kept nowhere."""
        secret = secret_of(token, None)
        if not secret:
            raise HubError(NO_TOKEN_FOR_CLIENT)
        source = publishing.run_or_study(run_id, settings)
        given = {"repo-id": repository(repo_id), "what": what, "onto": onto, "version": version}
        given |= {"collection": collection, "revision": revision, "agreed": agreed}
        switches = {
            "public": public,
            "pull-request": pull_request,
            "plan": plan,
            "force": force,
            "with-rows": with_rows,
        }
        with TemporaryDirectory() as folder:
            if card:
                publishing.as_card_text(card, where="card")  # an error of the file would name the file
                (Path(folder) / "card.yaml").write_text(yaml.safe_dump(card))
                given["card"] = f"{folder}/card.yaml"
            arguments = [f"--{name}={value}" for name, value in given.items() if value]
            arguments += [f"--{name}" for name, on in switches.items() if on]
            job = jobs.start(["push", source.path.name, *arguments, "--json"], settings, secret=secret, again=True)
            while (progress := job.progress()) and progress.state == jobs.RUNNING:
                time.sleep(LOOK_SECONDS)
        if progress is None or progress.state != jobs.DONE:
            raise HubError(*(progress.problems if progress else ()) or ("the push was cancelled",))
        return progress.result

    gr.api(push_run, api_name="push_run", concurrency_limit=4)
