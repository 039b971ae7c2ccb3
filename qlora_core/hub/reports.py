"""A study's report to a dataset repository: its page, tables, settings, and a card; without rows unless they are asked for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.files import chosen
from qlora_core.hub.push import Push
from qlora_core.hub.releases import Release

if TYPE_CHECKING:
    from qlora_core.study_results import StudyResults

PAGE, STUDY, CARD = "report.html", "study.json", "README.md"
# Of a folder; tables are added by name, and of configs those of the study's own runs.
REPORT_FILES = (PAGE, STUDY, "study.yaml", "configs/*.yaml")


def report_push(
    results_or_folder: "StudyResults | Path | str",
    repo_id: str,
    *,
    token: str,
    endpoint: str | None = None,
    rows: bool = False,
    licence: str | None = None,
    report: Callable[[str], None] | None = None,
    **asked: Any,
) -> Push:
    """The push, to be planned and run; see Push for what may be `asked`. Raises HubError."""
    from qlora_core.report.readme import readme  # plotly, which only a report needs, is slow to import

    repo_id = full_name(
        repo_id, account(token, endpoint=endpoint)
    )  # the card names it; nothing is drawn for a bad name
    if isinstance(results_or_folder, (str, Path)):
        files = _of_folder(Path(results_or_folder), rows=rows)
    else:
        files = _of_results(results_or_folder, rows=rows)
    try:
        study = json.loads(files[STUDY])
        release = _release(study)
        files[CARD] = readme(study, files, repo_id=repo_id, licence=licence).encode("utf-8", errors="backslashreplace")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{STUDY}: is none that a report of a study brings ({type(error).__name__}: {error}); write the report again"
        ) from None
    return Push(
        repo_id, "dataset", token, release, files, endpoint=endpoint, report=report or (lambda _: None), **asked
    )  # fmt: skip


def _of_results(results: "StudyResults", *, rows: bool) -> dict[str, bytes]:
    from qlora_core.report import report_files

    ended = [run.result["meta_info"].get("ended_at") or 0 for run in results.runs if run.result]
    if not ended:
        raise HubError(
            f"study {results.name!r}: nothing has finished yet, so there is nothing to publish; wait for a run"
        )
    # As of its last result, so that the same study is the same report tomorrow; and no folder of this machine is named.
    return report_files(results, rows=rows, at=max(ended) or None)


def _of_folder(folder: Path, *, rows: bool) -> dict[str, bytes]:
    from qlora_core.report.tables import ANSWERS, TABLES

    wanted = (*REPORT_FILES, *(f"{name}.csv" for name in TABLES if rows or name != ANSWERS))
    paths = chosen(folder, wanted)
    if missing := [name for name in (PAGE, STUDY) if name not in paths]:
        raise HubError(f"{str(folder)!r}: has no {' and no '.join(missing)}, so it is no report of a study")
    try:
        study = json.loads(paths[STUDY].read_bytes())
        runs = {f"configs/{run['run_id']}.yaml" for run in study["runs"]}
        has_rows = bool(((study["analysis"] or {}).get("behaviour") or {}).get("rows"))
        found = {
            name: path.read_bytes() for name, path in paths.items() if not name.startswith("configs/") or name in runs
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{str(folder / STUDY)!r}: is none that a report of a study brings ({type(error).__name__}); write the report again"
        ) from None
    if has_rows and not rows:
        raise HubError(
            f"{str(folder)!r}: was written with prompts and answers of held-out rows, which a licence may forbid to pass on; "
            "write it again without rows, or push it with them"
        )
    return found


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
