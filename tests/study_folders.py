"""Studies on the disk as their workers leave them, from those of study_builders: for the page, its list and its buttons."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from helpers import run_in, say, settings_in

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.runs import Run, RunStore
from qlora_core.study import Study
from qlora_core.study_results import GONE, LEFT_OUT, StudyResults, StudyRun

ENDS = {"finished": events.Finished, "stopped": events.Stopped}


def lay_down(folder: Path, results: StudyResults) -> Study:
    """The study with its runs below `<folder>/home`. A run that neither finished, stopped nor failed is left as one that crashed;
    of one that is gone or left out there is nothing."""
    settings = settings_in(folder)
    events._parsed.clear()  # a run laid down again under its old id may get the inode of the deleted file
    pattern = run_in(folder, name="pattern")
    path = settings.home / "studies" / results.study_id
    path.mkdir(parents=True)
    shutil.copytree(pattern.path / "dataset", path / "dataset")
    shutil.copy2(pattern.path / "model.json", path)
    entries = []
    for run in results.runs:
        config = _config(run, pattern)
        entry = {
            "run_id": run.run_id,
            "role": run.role,
            "varied": run.varied,
            "seed": run.seed,
            "config": config.to_json(),
        }
        if run.state == LEFT_OUT:
            entry |= {"run_id": None, "left_out": run.detail}
        elif run.state != GONE:
            _lay_down_run(run, _folder(run.run_id, config, pattern))
        entries.append(entry)
    told = {
        "name": results.name, "kind": results.kind, "config": pattern.config().to_json(), "vary": results.vary,
        "seeds": list(results.seeds), "noise_floor": any(run.role != "arm" for run in results.runs), "runs": entries,
        "analysis": None, "differences": list(results.differences), "created_at": 1.8e9,
    }  # fmt: skip
    if results.analysis:
        told["analysis"] = f"{results.study_id}-analysis"
        analysis = _folder(told["analysis"], replace(pattern.config(), name=f"{results.name}: analysis"), pattern)
        (analysis.path / "analysis.json").write_text(json.dumps({"study_id": results.study_id}))
        (analysis.path / "found.json").write_text(json.dumps(asdict(results.analysis)))
        say(analysis, events.Launched(attempt=1), events.Finished(step=0, reason="compared"))
    (path / "study.json").write_text(json.dumps(told))
    RunStore(settings).delete(pattern)
    return Study(path, settings)


def _config(run: StudyRun, pattern: Run) -> TrainConfig:
    assert run.config is not None
    return replace(
        run.config, data=pattern.config().data, base_model=pattern.config().base_model, name=f"tickets: {run.label}"
    )


def _folder(run_id: str, config: TrainConfig, pattern: Run) -> Run:
    path = pattern.settings.runs / run_id
    shutil.copytree(pattern.path, path)
    (path / "config.json").write_text(json.dumps(config.to_json()))
    (path / "key").unlink()
    return Run(path, pattern.settings)


def _lay_down_run(told: StudyRun, run: Run) -> None:
    if told.started is None:
        return
    after = {one.step: one for one in told.evaluations}
    history = [*([after[0]] if 0 in after else [])]
    for step in told.steps:
        history += [step, *([after[step.step]] if step.step in after else [])]
    say(run, events.Launched(attempt=1), told.started, *history)
    done = told.steps[-1].step if told.steps else 0
    if told.state in ENDS:
        say(run, ENDS[told.state](step=done))
    if told.state == "failed":
        say(run, events.Failed(step=done, reason=told.detail))
    if told.result:
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").write_bytes(told.run_id.encode())
        (run.adapter / "adapter_config.json").write_text(json.dumps({"r": told.varied.get("rank", 8)}))
        result = told.result["run_info"] | {
            "path": told.result["run_info"]["path"] | {"compiled": "eager: compile is off"}
        }
        (run.path / "result.json").write_text(json.dumps(told.result | {"run_info": result}))
