"""What reproduces a study: its settings as YAML, the command, and everything that was measured with the environment it ran in."""

import json
import os
import shlex
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_core.config import TrainConfig, replace
from qlora_core.data.hub_source import PREFIX
from qlora_core.study_grid import KINDS
from qlora_core.study_plan import vary_option
from qlora_core.study_results import ARM, StudyResults, StudyRun
from qlora_core.verdicts import verdicts

YAML, JSON = "study.yaml", "study.json"
# Of a result's run_info: what a run depends on that no setting says.
ENVIRONMENT = ("device", "driver", "python", "packages", "git_commit", "compute_dtype", "template")
ROWS = (
    "file_name",
    "form",
    "origin",
    "train_rows",
    "eval_rows",
    "train_fingerprint",
    "eval_fingerprint",
    "eval_source",
)


def bundle(
    results: StudyResults, *, folder: Path | None = None, rows: bool = True, at: float | None = None
) -> dict[str, Any]:
    """JSON values of the whole study but its steps, which steps.csv has. `folder`: where the file will lie, which its local paths
    are named from; `rows`: whether prompts and answers of held-out rows may go in; `at`: when it says that it was written."""
    analysis = asdict(results.analysis) if results.analysis else None
    if analysis and analysis["behaviour"] and not rows:
        analysis["behaviour"]["rows"] = []
    return {
        "study": {"id": results.study_id, "name": results.name, "kind": results.kind, "vary": results.vary,
                  "seeds": list(results.seeds), "noise_floor": has_floor(results)},
        "reproduce": {"command": command(results), "settings": YAML},
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at)),
        "differences": list(results.differences),
        "verdicts": [verdict.to_json() for verdict in verdicts(results)],
        "bases": list(_unique(run.result["run_info"]["base_model"] for run in results.runs if run.result)),
        "datasets": list(_unique(_dataset(run) for run in results.runs if run.result)),
        "environments": [{"of": of, **one} for one, of in environments(results)],
        "runs": [_run(run, folder) for run in results.runs],
        "analysis": analysis,
    }  # fmt: skip


def _dataset(run: StudyRun) -> dict[str, Any]:
    found = run.result["run_info"].get("dataset", {}) if run.result else {}
    return {name: found.get(name) for name in ROWS if found.get(name) not in (None, {})}


def _run(run: StudyRun, folder: Path | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        name: getattr(run, name) for name in ("run_id", "name", "label", "role", "varied", "seed", "state", "detail")
    }
    told["config"] = named(run.config, folder).to_json() if run.config else None
    if run.result:
        # Its settings stand above, its environment among the environments.
        told["path"] = run.result["run_info"].get("path")
        told |= {"measured": run.result["train_info"], "meta": run.result["meta_info"]}
    if run.started:
        told["estimated_peak_bytes"], told["estimated_parts"] = (
            run.started.estimated_peak_bytes,
            run.started.estimated_parts,
        )
    return told


def environments(results: StudyResults) -> list[tuple[dict[str, Any], list[str]]]:
    """[(what runs worked in, ids of those that did)]; one where all are alike."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in results.runs:
        if run.result:
            info = run.result["run_info"]
            one = {name: info[name] for name in ENVIRONMENT if info.get(name) is not None}
            found.setdefault(json.dumps(one, sort_keys=True), (one, []))[1].append(run.run_id)
    return list(found.values())


def _unique(values: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return {json.dumps(value, sort_keys=True): value for value in values}.values()


# -- the command


def command(results: StudyResults) -> str:
    """What makes the same study again, in the folder that holds its YAML. Of runs picked by hand, the command for one."""
    if not reproducible(results):
        return "python -m qlora_core train --config configs/RUN.yaml"
    words = ["python", "-m", "qlora_core", "compare", "--config", YAML]
    known = KINDS.get(results.kind)
    words += ["--kind", results.kind] if known else []
    for name, values in results.vary.items():
        words += ["--vary", vary_option(name, values)]
    if len(results.seeds) > 1:
        words += ["--seeds", ",".join(map(str, results.seeds))]
    if has_floor(results) or (known and known.noise_floor):
        words.append("--noise-floor" if has_floor(results) else "--no-noise-floor")
    return shlex.join(words)


def reproducible(results: StudyResults) -> bool:
    """Whether a grid made the runs; picked ones are repeated one by one."""
    return results.kind != "picked"


def has_floor(results: StudyResults) -> bool:
    return any(run.role != ARM for run in results.runs)


def common_config(results: StudyResults) -> TrainConfig | None:
    """The first arm's settings, of which the command varies some; None where every run is gone."""
    first = next((run.config for run in results.runs if run.config and run.role == ARM), None)
    if first is None:
        return None
    return replace(first, name=results.name, seed=results.seeds[0] if results.seeds else first.seed)


def study_yaml(results: StudyResults, *, folder: Path | None = None) -> str | None:
    """The settings for `compare --config`; what varies is said by the command."""
    config = common_config(results)
    if config is None:
        return None
    head = f"# {command(results)}\n" if reproducible(results) else ""
    return head + named(config, folder).to_yaml()


def named(config: TrainConfig, folder: Path | None) -> TrainConfig:
    """Local data named from `folder`, where both lie in one place; else by the file's name alone, as a home directory is nobody
    else's business and would not be there."""
    return replace(config, data=_relative(config.data, folder), eval_data=_relative(config.eval_data, folder))


def _relative(path: str | None, folder: Path | None) -> Any:
    if not path or path.startswith(PREFIX):
        return path
    local = Path(os.path.expanduser(path))
    if folder is not None and local.is_absolute() and local.exists():
        here = folder.resolve()
        if len(Path(os.path.commonpath([here, local])).parts) > 2:
            return os.path.relpath(local, here)
    return local.name
