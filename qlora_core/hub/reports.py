"""A study's report to a dataset repository: its page, tables, settings, and a card; without rows unless they are asked for."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.push import Push
from qlora_core.hub.releases import Release

if TYPE_CHECKING:
    from qlora_core.study_results import StudyResults

STUDY, CARD = "study.json", "README.md"


def report_push(
    results: "StudyResults",
    repo_id: str,
    *,
    token: str,
    endpoint: str | None = None,
    rows: bool = False,
    report: Callable[[str], None] | None = None,
    **asked: Any,
) -> Push:
    """The push, to be planned and run; see Push for what may be `asked`. Raises HubError."""
    from qlora_core.report import report_files  # plotly, which only a report needs, is slow to import
    from qlora_core.report.readme import readme

    # The card names it; nothing is drawn for a bad name.
    repo_id = full_name(repo_id, account(token, endpoint=endpoint))
    ended = [run.result["meta_info"].get("ended_at") or 0 for run in results.runs if run.result]
    if not ended:
        raise HubError(
            f"study {results.name!r}: nothing has finished yet, so there is nothing to publish; wait for a run"
        )
    # As of its last result, so that the same study is the same report tomorrow; and no folder of this machine is named.
    files = report_files(results, rows=rows, at=max(ended) or None)
    study = json.loads(files[STUDY])
    files[CARD] = readme(study, files, repo_id=repo_id).encode("utf-8", errors="backslashreplace")
    return Push(
        repo_id, "dataset", token, _release(study), files, endpoint=endpoint, report=report or (lambda _: None), **asked
    )  # fmt: skip


def _release(study: Mapping[str, Any]) -> Release:
    from qlora_core.report.readme import eval_loss

    first_of = {"base_model": "", "dataset_fingerprint": "", "eval_fingerprint": ""}
    for base in study["bases"][:1]:
        first_of["base_model"] = str(base.get("name") or "")
    for data in study["datasets"][:1]:
        first_of["dataset_fingerprint"] = str(data.get("train_fingerprint") or "")
        first_of["eval_fingerprint"] = str(data.get("eval_fingerprint") or "")
    commits = [one.get("git_commit") for one in study["environments"]]
    losses = [loss for run in study["runs"] if (loss := eval_loss(run)) is not None]
    return Release(
        "report",
        run_id=str(study["study"]["id"]),
        git_commit=next(filter(None, commits), None),
        metrics={"lowest_eval_loss": min(losses)} if losses else {},
        **first_of,
    )
