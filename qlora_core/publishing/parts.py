"""What can be pushed, each as a push with its record: a run's model, its dataset, a prepared dataset, a study's report."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_core import hub
from qlora_core.data.locate import LINEAGE
from qlora_core.errors import RunError
from qlora_core.model_card import licence_problems, licence_warning
from qlora_core.publishing.models import publish
from qlora_core.publishing.record import record
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study import Study


@dataclass(frozen=True)
class Part:
    """`publish` takes the digest of the plan that was agreed to, and returns the record of what is there then."""

    push: hub.Push
    warning: str | None
    publish: Callable[[str], dict[str, Any]]


def run_or_study(text: str, settings: Settings) -> Run | Study:
    """By its id, or the beginning of it. Raises RunError."""
    try:
        return RunStore(settings).get(text)
    except RunError as no_run:
        try:
            return StudyStore(settings).get(text)
        except RunError:
            raise RunError(*no_run.problems) from None


def model_part(run: Run, folder: Path, push: hub.Push) -> Part:
    return Part(push, licence_warning(run), lambda agreed: publish(run, folder, push, agreed))


def dataset_part(folder: Path, repo_id: str, *, private: bool, run: Run | None = None, **asked: Any) -> Part:
    """A prepared dataset; `run` keeps the record. Raises HubError where that is no dataset."""
    licence = json.loads((folder / LINEAGE).read_text()).get("license") or None
    warning = " ".join(licence_problems([licence])) if not private else None
    push = hub.dataset_push(folder, repo_id, private=private, **asked)
    return Part(push, warning or None, lambda agreed: _sent(push, agreed, "dataset", run and run.path))


def report_part(study: Study, repo_id: str, *, rows: bool = False, **asked: Any) -> Part:
    """A study's report, with prompts and answers of held-out rows where asked. Raises HubError where nothing of the study has
    finished."""
    results = study.results()
    licences = {run.config.dataset_license or None for run in results.runs if run.config}
    warning = " ".join(licence_problems(sorted(licences, key=str))) if rows else ""
    push = hub.report_push(results, repo_id, rows=rows, **asked)
    told = f"It holds rows of the dataset. {warning}" if warning else None
    return Part(push, told, lambda agreed: _sent(push, agreed, "report", study.path))


def dataset_of(run: Run) -> Path:
    """The prepared dataset that the run was trained on. Raises RunError where it was not, or is not there any more."""
    folder = Path(run.config().data or "")
    told = f"{run.run_id}: was trained on {run.dataset().file_name}, which is no prepared dataset"
    if not (folder / LINEAGE).is_file():
        raise RunError(f"{told}; prepare it (Data, or `python -m qlora_core prepare`), and push that")
    if json.loads((folder / LINEAGE).read_text()).get("fingerprint") != run.dataset().origin.get("fingerprint"):
        raise RunError(f"{run.run_id}: the dataset in {folder} has been prepared anew since; push it by its folder")
    return folder


def _sent(push: hub.Push, agreed: str, what: str, keeper: Path | None) -> dict[str, Any]:
    def committed(pushed: hub.Pushed) -> dict[str, Any]:
        entry = {**asdict(pushed), "what": what, "private": push.private, "at": time.time()}
        if keeper:
            record(keeper, entry)
        return entry

    return committed(push.run(agreed, committed=committed))
