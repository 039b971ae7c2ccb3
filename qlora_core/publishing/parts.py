"""What can be pushed, each as a push with its record: a run's model, its dataset, a prepared dataset, a study's report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core import hub
from qlora_core.data.locate import LINEAGE
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.errors import RunError
from qlora_core.model_card import licence_problems, licence_warning
from qlora_core.publishing.merge_drift import told_of_merge
from qlora_core.publishing.models import publish
from qlora_core.publishing.record import record, recording
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study import Study


@dataclass(frozen=True)
class Part:
    """`publish` takes the digest of the plan that was agreed to, and returns the record of what is there then. `notes` are said
    with what it changes; `warning` of a licence, and `doubts`, must be agreed to."""

    push: hub.Push
    warning: str | None
    publish: Callable[[str], dict[str, Any]]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def run_or_study(text: str, settings: Settings) -> Run | Study:
    """By its id, or the beginning of it, which a run may have of a study's whole id. Raises RunError."""
    found: list[Run | Study] = []
    problems: list[str] = []
    for store in (RunStore(settings), StudyStore(settings)):
        try:
            found.append(store.get(text))
        except RunError as error:
            problems += error.problems
    if not found:
        raise RunError(*problems)
    return next((one for one in found if one.path.name == text), found[0])


def model_part(run: Run, folder: Path, push: hub.Push) -> Part:
    """Of a merged model, with how far the merge is from the model that was trained."""
    notes, doubts = told_of_merge(run, folder) if push.release.what == "merged" else ((), ())
    return Part(push, licence_warning(run), lambda agreed: publish(run, folder, push, agreed), notes, doubts)


def dataset_part(folder: Path, repo_id: str, *, run: Run | None = None, **asked: Any) -> Part:
    """A prepared dataset; `run` keeps the record. Raises HubError where that is no dataset, DatasetError where its lineage cannot
    be read."""
    warning = " ".join(licence_problems([PreparedSet.load(folder).lineage.get("license") or None]))
    push = hub.dataset_push(folder, repo_id, **asked)
    return Part(push, warning or None, lambda agreed: _sent(push, agreed, run and run.path))


def report_part(study: Study, repo_id: str, *, rows: bool = False, **asked: Any) -> Part:
    """A study's report, with prompts and answers of held-out rows where asked. Raises HubError where nothing of the study has
    finished."""
    results = study.results()
    licences = {run.config.dataset_license or None for run in results.runs if run.config}
    warning = " ".join(licence_problems(sorted(licences, key=str))) if rows else ""
    push = hub.report_push(results, repo_id, rows=rows, **asked)
    told = f"It holds rows of the dataset. {warning}" if warning else None
    return Part(push, told, lambda agreed: _sent(push, agreed, study.path))


def dataset_of(run: Run) -> Path:
    """The prepared dataset that the run was trained on. Raises RunError where it was not, or is not there any more, DatasetError
    where its lineage cannot be read."""
    folder = Path(run.config().data or "")
    told = f"{run.run_id}: was trained on {run.dataset().file_name}, which is no prepared dataset"
    if not (folder / LINEAGE).is_file():
        raise RunError(
            f"{told}; prepare it (Data, or `python -m qlora_core prepare`), and train on that or push its folder"
        )
    if PreparedSet.load(folder).lineage["fingerprint"] != run.dataset().origin.get("fingerprint"):
        raise RunError(f"{run.run_id}: the dataset in {folder} has been prepared anew since; push it by its folder")
    return folder


def _sent(push: hub.Push, agreed: str, keeper: Path | None) -> dict[str, Any]:
    with recording(keeper, push) as committed:
        return record(keeper, push, push.run(agreed, committed=committed))
