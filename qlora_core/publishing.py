"""Publish a run: adapter or merged model with its card, then the proof that what arrived is what is here. Knows no torch."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_core import hub
from qlora_core.errors import HubError, RunError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.arrived import download
from qlora_core.hub.models import ModelPush
from qlora_core.merging import merge
from qlora_core.model_card import CardText, model_card
from qlora_core.queue import worker_environment
from qlora_core.run_status import RUNNING
from qlora_core.runs import Run, lock
from qlora_core.storage import write_json

WHAT = ("adapter", "merged")
PUBLISHED = "published.json"


@dataclass(frozen=True)
class Publication:
    """What is to be pushed and how; `card` are a person's own words for it, `onto` the base that is merged into."""

    what: str = "adapter"
    private: bool = True
    revision: str | None = None
    pull_request: bool = False
    version: str = ""
    force: bool = False
    onto: str | None = None
    card: CardText | None = None


def prepare(
    run: Run,
    repo_id: str,
    how: Publication,
    *,
    token: str,
    endpoint: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> ModelPush:
    """The push, whose `plan()` tells what it would change. Merges first where the merged model is pushed and is not there.

    Raises HubError before that merge where the token or the name would not do, RunError for a run without an adapter.
    """
    if how.what not in WHAT:
        raise RunError(f"what is {how.what!r}; choose one of {', '.join(WHAT)}")
    if run.status().state == RUNNING:
        raise RunError(f"{run.run_id}: is running; push it when it has ended, or stop it first")
    result = run.result()
    if result is None or not (run.adapter / "adapter_model.safetensors").exists():
        raise RunError(f"{run.run_id}: has no adapter yet; only a finished or stopped run can be pushed")
    name = full_name(repo_id, account(token, endpoint=endpoint))
    folder = run.adapter if how.what == "adapter" else merge(run, onto=how.onto, report=report)
    card = model_card(run, what=how.what, repo_id=name, version=how.version or None, onto=how.onto, text=how.card)
    return ModelPush(
        folder,
        name,
        token,
        release_of(run, result, how),
        {"README.md": card.text.encode(), **card.images},
        private=how.private,
        revision=how.revision,
        pull_request=how.pull_request,
        force=how.force,
        endpoint=endpoint,
        report=report,
    )


def release_of(run: Run, result: dict[str, Any], how: Publication) -> hub.Release:
    """What the version's record says: of the step whose adapter it is, where that was evaluated."""
    info, train = result["run_info"], result["train_info"]
    losses = {entry["step"]: entry["loss"] for entry in train.get("eval_losses") or []}
    scores = {entry["step"]: entry["correct"] / entry["total"] for entry in train.get("scores") or [] if entry["total"]}
    step = train.get("adapter_step")
    found = {"eval_loss": losses.get(step), "train_loss": train.get("train_loss"), "score": scores.get(step)}
    dataset = run.dataset()
    return hub.Release(
        how.what,
        version=how.version,
        run_id=run.run_id,
        base_model=run.base_model().name,
        dataset_fingerprint=dataset.train_fingerprint,
        eval_fingerprint=dataset.eval_fingerprint,
        git_commit=info.get("git_commit"),
        metrics={name: value for name, value in found.items() if value is not None},
    )


def publish(run: Run, push: ModelPush, agreed: hub.PushPlan | None) -> dict[str, Any]:
    """Push, download into an empty cache, load both and compare; the record joins published.json. Raises HubError, RunError."""
    with lock(run.path / "publish.lock") as held:
        if held is None:
            raise RunError(f"{run.run_id}: is being pushed already; wait for that push to end")
        pushed = push.run(agreed)
        for entry in published(run):
            same = (entry["url"], entry["commit"]) == (pushed.url, pushed.commit)
            if same and not pushed.changed and entry["proof"]["state"] == "proven":
                return {**entry, "changed": False}
        entries = published(run)
        entry = {**asdict(pushed), "what": push.release.what, "at": time.time(), "proof": {"state": "pending"}}
        write_json(run.path / PUBLISHED, [*entries, entry])  # it is on the Hub: a kill in the proof must not hide that
        entry["proof"] = prove(run, push, pushed)
        write_json(run.path / PUBLISHED, [*entries, entry])
    return entry


def published(run: Run) -> list[dict[str, Any]]:
    """Every push of the run that was made, oldest first."""
    path = run.path / PUBLISHED
    return json.loads(path.read_text()) if path.exists() else []


def prove(run: Run, push: ModelPush, pushed: hub.PushedModel) -> dict[str, Any]:
    """Whether what is on the Hub is what is here: `state` "proven", "differs", or "failed" with its `reason`."""
    push.report("Downloading it again and loading it")
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".proof-") as cache:
        try:
            downloaded = download(pushed, Path(cache), token=push.token, endpoint=push.endpoint)
        except HubError as error:
            return {"state": "failed", "reason": str(error)}
        done = subprocess.run(
            [sys.executable, "-m", "qlora_core.worker.proving", str(run.path), push.release.what, str(downloaded),
             str(push.folder)],
            env=worker_environment(run.settings, device="cpu"), capture_output=True, text=True, cwd=run.path,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        return {"state": "failed", "reason": f"it could not be loaded: {last[:500]}"}
    verdict = json.loads(done.stdout.strip().splitlines()[-1])
    return {"state": "proven" if verdict["same"] else "differs", "files": len(pushed.files), **verdict}
