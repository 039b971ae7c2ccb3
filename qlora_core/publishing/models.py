"""A run's adapter or merged model with its card to the Hub: prepared, shown, agreed to, pushed, proven, recorded."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_core import hub
from qlora_core.drift import for_card, read_drift
from qlora_core.errors import HubError, RunError
from qlora_core.hub.releases import check_version
from qlora_core.merging import merge, ways
from qlora_core.model_card import Card, CardText, model_card
from qlora_core.publishing.proof import prove
from qlora_core.publishing.record import card_text, published, record, recording
from qlora_core.run_status import ACTIVE
from qlora_core.runs import Run, lock
from qlora_core.studies import StudyStore
from qlora_core.study_results import StudyResults


@dataclass(frozen=True)
class Publication:
    """What is to be pushed and how; `onto` is the base that is merged into, `force` goes over a much better version. `card`:
    other words than those that are kept with the run."""

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
) -> tuple[Path, hub.Push]:
    """The folder and its push, whose `plan()` tells what it would change. Merges first where that is not there.

    Raises HubError, before that merge where token, name, version or repository would not do, RunError for a run without an adapter.
    """
    if (state := run.status().state) in ACTIVE:
        raise RunError(f"{run.run_id}: is {state}; push it when it has ended, or stop it first")
    result = run.result()
    if result is None or not (run.adapter / "adapter_model.safetensors").exists():
        raise RunError(f"{run.run_id}: has no adapter yet; only a finished or stopped run can be pushed")
    release = release_of(run, result, how)
    asked: dict[str, Any] = {
        "private": how.private,
        "revision": how.revision,
        "pull_request": how.pull_request,
        "force": how.force,
        "endpoint": endpoint,
        "report": report,
    }
    check_version(how.version)
    # Refused before minutes of merging. What it will hold is not known yet, so neither whether its version is taken.
    looked = hub.Push(repo_id, "model", token, replace(release, version=""), {"README.md": b""}, **asked).plan()
    if how.what == "merged" and not how.force and looked.refused:
        raise HubError(*looked.refused)
    name = looked.repo_id
    folder = run.adapter if how.what == "adapter" else merge(run, onto=how.onto, report=report)
    card = card_of(run, name, how)
    return folder, hub.model_push(
        folder,
        name,
        token=token,
        release=release,
        files={"README.md": card.text.encode(), **card.images},
        **asked,
    )


def card_of(run: Run, repo_id: str, how: Publication) -> Card:
    """With a person's words, the measured drift of its merges, and the newest study that the run is part of. Raises RunError."""
    return model_card(
        run,
        what=how.what,
        repo_id=repo_id,
        version=how.version or None,
        onto=how.onto,
        study=_study_of(run),
        drift=for_card(read_drift(run)),
        text=how.card or card_text(run),
    )


def _study_of(run: Run) -> StudyResults | None:
    """Of one that still goes on, the figures would be others tomorrow."""
    for study in StudyStore(run.settings).list():
        with suppress(RunError):  # one that cannot be read tells nothing
            if run.run_id in (entry["run_id"] for entry in study.told()["runs"]) and study.status().state not in ACTIVE:
                return study.results()
    return None


def release_of(run: Run, result: dict[str, Any], how: Publication) -> hub.Release:
    """What the version's record says: of the step whose adapter it is, where that was evaluated.

    A merged model's figures are those of the model that was trained, and say so in their names; its own are what the merge
    changed, where that was measured.
    """
    info, train = result["run_info"], result["train_info"]
    losses = {entry["step"]: entry["loss"] for entry in train.get("eval_losses") or []}
    scores = {entry["step"]: entry["correct"] / entry["total"] for entry in train.get("scores") or [] if entry["total"]}
    step = train.get("adapter_step")
    found = {"eval_loss": losses.get(step), "train_loss": train.get("train_loss"), "score": scores.get(step)}
    dataset, of = run.dataset(), "trained_" if how.what == "merged" else ""
    drifted = (for_card(read_drift(run)) or {}).get(how.onto or ways(run)[-1], {}) if how.what == "merged" else {}
    return hub.Release(
        how.what,
        version=how.version,
        run_id=run.run_id,
        base_model=run.base_model().name,
        dataset_fingerprint=dataset.train_fingerprint,
        eval_fingerprint=dataset.eval_fingerprint,
        git_commit=info.get("git_commit"),
        metrics={of + name: value for name, value in found.items() if value is not None}
        | {f"merge_{name}": value for name, value in drifted.items() if name in ("kl", "top1")},
    )


def publish(run: Run, folder: Path, push: hub.Push, agreed: str) -> dict[str, Any]:
    """Push, download into an empty cache, load both and compare; the record joins published.json.

    `agreed` is the digest of the plan that a person has agreed to. Raises HubError, RunError.
    """
    with (
        lock(run.path / "publish.lock") as held,
        recording(run.path, push, proof={"state": "pending"}) as committed,
    ):
        if held is None:
            raise RunError(f"{run.run_id}: is being pushed already; wait for that push to end")
        pushed = push.run(agreed, committed=committed)
        for entry in published(run.path):
            same = (entry["url"], entry["commit"]) == (pushed.url, pushed.commit)
            if same and not pushed.changed and entry.get("proof", {}).get("state") == "proven":
                return {**entry, "changed": False}
        committed(pushed)
        return record(run.path, push, pushed, proof=prove(run, push, folder, pushed))
