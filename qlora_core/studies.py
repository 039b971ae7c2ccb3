"""Studies: each is a directory that names its runs, and is queued, watched, resumed and stopped as a whole. Trains nothing."""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core import events, models, queue, trackers
from qlora_core.config import TrainConfig, replace
from qlora_core.data.locate import locate
from qlora_core.data.stored import StoredDataset, store
from qlora_core.errors import ConfigError, RunError
from qlora_core.planner.studying import Pace
from qlora_core.run_status import ACTIVE, FINISHED, RUNNING, RunStatus
from qlora_core.runs import Run, RunStore, lock, sync
from qlora_core.settings import Settings
from qlora_core.study_grid import ARM, Cell, cells
from qlora_core.study_picking import differences_of, varied_of
from qlora_core.study_results import GONE, NONE, Analysis, StudyResults, StudyRun
from qlora_core.study_status import StudyStatus, detail_of, eta_seconds, state_of

PICKED, GRID = "picked", "grid"
# Held-out rows that the analysis answers with each adapter, and the longest answer.
ANSWERED_ROWS, ANSWER_TOKENS = 32, 96


@dataclass(frozen=True)
class Study:
    """study.json, and dataset/ and model.json from which each of its runs is made."""

    path: Path
    settings: Settings

    @property
    def study_id(self) -> str:
        return self.path.name

    def told(self) -> dict[str, Any]:
        """Raises RunError where study.json cannot be read."""
        try:
            return json.loads((self.path / "study.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.study_id}: its study.json cannot be read ({error}); delete the study") from None

    def _tell(self, values: dict[str, Any]) -> None:
        _write_json(self.path / "study.json", values)

    @property
    def name(self) -> str:
        return self.told()["name"]

    @property
    def config(self) -> TrainConfig:
        """The settings that its runs have in common."""
        return TrainConfig.from_mapping(self.told()["config"], where=self.study_id)

    def base_model(self) -> models.BaseModel:
        return models.BaseModel.from_json(json.loads((self.path / "model.json").read_text()))

    def run(self, run_id: str | None) -> Run | None:
        """None where the run is not made yet, or was deleted."""
        path = self.settings.runs / (run_id or ".")
        return Run(path, self.settings) if run_id and (path / "config.json").exists() else None

    def runs(self) -> list[Run]:
        """Those that are there, without the analysis."""
        return [run for entry in self.told()["runs"] if (run := self.run(entry["run_id"]))]

    def analysis(self) -> Run | None:
        return self.run(self.told()["analysis"])

    # -- as a whole

    def start(self) -> None:
        """Make the runs that are not there, queue all that have not finished, and after them the analysis.

        What a kill has left half done is done by calling this again; finished runs stay as they are.
        """
        with lock(self.path / "lock", wait=True):
            told = self.told()
            made = [self._made(entry, told) for entry in told["runs"]]
            analysis = self._made_analysis(told)
            waiting = [run for run in made if run.status().state not in (*ACTIVE, FINISHED)]
            for run in waiting:
                queue.add(run)
            if waiting or analysis.status().state != FINISHED or _is_older(analysis, made):
                queue.add(analysis)
        queue.start_next(self.settings)

    def analyse_again(self) -> None:
        """Compare once more what has finished by now. Raises RunError while something of the study waits or trains."""
        if self.status().state in ACTIVE:
            raise RunError(f"{self.study_id}: is under way, and is analysed at its end")
        with lock(self.path / "lock", wait=True):
            queue.add(self._made_analysis(self.told()))
        queue.start_next(self.settings)

    def _made(self, entry: dict[str, Any], told: dict[str, Any]) -> Run:
        """The run of the entry, made again where it is not there."""
        if run := self.run(entry["run_id"]):
            return run
        if told["kind"] == PICKED:
            raise RunError(f"{self.study_id}: its run {entry['run_id']} is gone; pick runs again")
        config = TrainConfig.from_mapping(entry["config"], where=self.study_id)
        run = self._publish(config, [self.study_id, entry["role"], entry["seed"], entry["varied"]])
        entry["run_id"] = run.run_id
        self._tell(told)
        return run

    def _made_analysis(self, told: dict[str, Any]) -> Run:
        if run := self.run(told["analysis"]):
            return run
        config = replace(self.config, name=f"{told['name']}: analysis", score="none", tracker="none")
        asked = {"study_id": self.study_id, "answered_rows": ANSWERED_ROWS, "answer_tokens": ANSWER_TOKENS}
        run = self._publish(config, [self.study_id, "analysis"], {"analysis.json": asked})
        told["analysis"] = run.run_id
        self._tell(told)
        return run

    def _publish(self, config: TrainConfig, made_of: Sequence[Any], files: Mapping[str, Any] | None = None) -> Run:
        runs = RunStore(self.settings)
        with runs.new_folder() as folder:
            _link(self.path / "dataset", folder / "dataset")
            for name, values in (files or {}).items():
                _write_json(folder / name, values)
            return runs.publish(folder, config, self.base_model(), made_of)

    def stop(self) -> str:
        """Ask every run that waits or trains to save and stop. Raises RunError when there is none."""
        asked = 0
        # The analysis first, and then the last of the queue, so that none starts because another was taken out.
        for run in [run for run in (self.analysis(), *reversed(self.runs())) if run]:
            if run.status().state in ACTIVE:
                with suppress(RunError):  # it has just ended by itself
                    run.request_stop()
                    asked += 1
        if not asked:
            raise RunError(f"{self.study_id}: nothing of it waits or trains, so there is nothing to stop")
        return f"{asked} of its runs are stopping"

    # -- where it stands, and what it has found

    def status(self, known: Mapping[str, RunStatus] | None = None) -> StudyStatus:
        """`known`: where runs stand, by id, as somebody has just read it; the others are read here."""

        def stands(run_id: str | None) -> RunStatus | None:
            run = self.run(run_id)
            return ((known or {}).get(run.run_id) or run.status()) if run else None

        told = self.told()
        runs = [(_label(entry), stands(entry["run_id"])) for entry in told["runs"]]
        of_analysis = stands(told["analysis"])
        done = sum(status is not None and status.state == FINISHED for _, status in runs)
        state = state_of([status for _, status in runs], of_analysis)
        return StudyStatus(
            study_id=self.study_id,
            name=told["name"],
            kind=told["kind"],
            state=state,
            done=done,
            total=len(runs),
            runs=tuple(runs),
            analysis=of_analysis,
            eta_seconds=eta_seconds([status for _, status in runs]) if state == RUNNING else None,
            created_at=told["created_at"],
            detail=detail_of(runs, of_analysis, done),
        )

    def results(self) -> StudyResults:
        told = self.told()
        analysis = self.run(told["analysis"])
        found = self.analysis_found()
        return StudyResults(
            study_id=self.study_id,
            name=told["name"],
            kind=told["kind"],
            vary=told["vary"],
            seeds=tuple(told["seeds"]),
            runs=tuple(self._result(entry) for entry in told["runs"]),
            analysis=found,
            analysis_state=analysis.status().state if analysis else NONE,
            differences=tuple(told.get("differences", ())),
        )

    def analysis_found(self) -> Analysis | None:
        run = self.analysis()
        path = run.path / "found.json" if run else None
        return Analysis.from_json(json.loads(path.read_text())) if path and path.exists() else None

    def _result(self, entry: dict[str, Any]) -> StudyRun:
        run = self.run(entry["run_id"])
        known = {"role": entry["role"], "varied": entry["varied"], "seed": entry["seed"]}
        if run is None:
            return StudyRun(
                **known, run_id=entry["run_id"] or "", name=_label(entry), state=GONE, detail="deleted, or yet to be made",
                config=None, result=None, steps=(), evaluations=(), started=None,
            )  # fmt: skip
        status, history = run.status(), run.history()
        started = [event for event in history if isinstance(event, events.Started)]
        return StudyRun(
            **known,
            run_id=run.run_id,
            name=status.name,
            state=status.state,
            detail=status.detail,
            config=run.config(),
            result=run.result(),
            steps=tuple(event for event in history if isinstance(event, events.Step)),
            evaluations=tuple(event for event in history if isinstance(event, events.Evaluation)),
            started=started[-1] if started else None,
        )


class StudyStore:
    """All studies below `settings.home`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.home / "studies"

    def create(
        self,
        config: TrainConfig,
        vary: Mapping[str, Sequence[Any]],
        *,
        seeds: Sequence[int] = (),
        noise_floor: bool = False,
        kind: str = GRID,
        name: str = "",
        only: Sequence[Cell] | None = None,
        token: str | None = None,
    ) -> Study:
        """Check and copy the rows and resolve the base once for all runs; `start` makes and queues these.

        The same study while such a one is under way is returned: a double click makes one. `only`: the cells that are to be
        trained, where others would not fit. Raises ConfigError, DatasetError, ModelError.
        """
        name = name.strip() or config.run_name()
        made = list(only) if only is not None else cells(config, vary, seeds=seeds, noise_floor=noise_floor, name=name)
        if problem := trackers.problem(config):
            raise ConfigError(problem)
        with self._new_folder() as folder:
            located = locate(config, self.settings, token=token)
            dataset = store(located, folder / "dataset", limits=self.settings.limits, max_rows=self.settings.max_rows)
            model = models.resolve(config.base_model, self.settings, token=token)
            located_values = {
                field: getattr(located.config, field) for field in ("data", "eval_data", "dataset_license")
            }
            told = {
                "name": name,
                "kind": kind,
                "config": replace(config, **located_values).to_json(),
                "vary": {field: [_plain(value) for value in values] for field, values in vary.items()},
                "seeds": list(seeds) or [config.seed],
                "noise_floor": noise_floor,
                "runs": [
                    {
                        "run_id": None,
                        "role": cell.role,
                        "varied": {field: _plain(value) for field, value in cell.varied.items()},
                        "seed": cell.seed,
                        "config": replace(cell.config, **located_values).to_json(),
                    }
                    for cell in made
                ],
                "analysis": None,
            }
            return self._publish(folder, told, dataset, model)

    def of_runs(self, runs: Sequence[Run], *, name: str = "") -> Study:
        """A study of runs that were trained already. Raises RunError where they cannot be compared, with all reasons; what makes
        them less alike than the runs of a study is said with every figure."""
        problems, said = differences_of(runs)
        if problems:
            raise RunError(*problems)
        varied = varied_of([run.config() for run in runs])
        first = runs[0]
        with self._new_folder() as folder:
            _link(first.path / "dataset", folder / "dataset")
            told = {
                "name": name.strip() or f"{len(runs)} runs picked",
                "kind": PICKED,
                "config": first.config().to_json(),
                "vary": {field: [_plain(getattr(run.config(), field)) for run in runs] for field in varied},
                "seeds": sorted({run.config().seed for run in runs}),
                "noise_floor": False,
                "runs": [
                    {
                        "run_id": run.run_id,
                        "role": ARM,
                        "varied": {field: _plain(getattr(run.config(), field)) for field in varied},
                        "seed": run.config().seed,
                        "config": run.config().to_json(),
                    }
                    for run in runs
                ],
                "analysis": None,
                "differences": said,
            }
            return self._publish(folder, told, first.dataset(), first.base_model())

    def _publish(self, folder: Path, told: dict[str, Any], dataset: StoredDataset, model: models.BaseModel) -> Study:
        made_of = [told, dataset.train_fingerprint, dataset.eval_fingerprint, model.to_json()]
        told |= {"key": hashlib.sha256(json.dumps(made_of).encode()).hexdigest(), "created_at": time.time()}
        _write_json(folder / "model.json", model.to_json())
        _write_json(folder / "study.json", told)
        with lock(self.folder / ".lock", wait=True):
            for study in self.list():
                with suppress(RunError):
                    if study.told().get("key") == told["key"] and study.status().state in (*ACTIVE, NONE):
                        return study
            path = self.folder / _study_id(told["name"])
            folder.rename(path)
        return Study(path, self.settings)

    def _new_folder(self) -> "_NewFolder":
        return _NewFolder(self.folder)

    def get(self, study_id: str) -> Study:
        """Raises RunError; names studies that the text is the beginning of."""
        ids = [study.study_id for study in self.list()]
        close = [known for known in ids if known == study_id] or [k for k in ids if study_id and k.startswith(study_id)]
        if len(close) == 1:
            return Study(self.folder / close[0], self.settings)
        hint = (
            f"it could be {', '.join(close)}" if close else "`python -m qlora_core studies list` shows those there are"
        )
        raise RunError(f"there is no study {study_id!r}; {hint}")

    def list(self) -> list[Study]:
        """Newest first."""
        paths = self.folder.glob("[!.]*/study.json") if self.folder.is_dir() else ()
        return [Study(path.parent, self.settings) for path in sorted(paths, key=lambda p: p.parent.name, reverse=True)]

    def delete(self, study: Study, *, with_runs: bool = False) -> None:
        """Its runs stay, unless they are to go too. Raises RunError while something of it waits or trains."""
        if study.status().state in ACTIVE:
            raise RunError(f"{study.study_id}: is under way; stop it before you delete it")
        runs = RunStore(self.settings)
        if analysis := study.analysis():
            runs.delete(analysis)
        if with_runs:
            for run in study.runs():
                runs.delete(run)
        shutil.rmtree(study.path)


class _NewFolder:
    """A folder to prepare a study in; gone afterwards unless it was renamed to one."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / f".creating-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> Path:
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _label(entry: Mapping[str, Any]) -> str:
    config = TrainConfig.from_mapping(entry["config"], where="study.json")
    return Cell(entry["role"], entry["varied"], entry["seed"], config).label + f", seed {entry['seed']}"


def _is_older(analysis: Run, runs: Sequence[Run]) -> bool:
    """Whether a run has ended since the analysis did."""
    ended = analysis.status().updated_at
    return any(run.status().updated_at > ended for run in runs)


def measured_paces(settings: Settings) -> list[Pace]:
    """How fast runs that have finished were, the newest first."""
    found = []
    for run in RunStore(settings).list():
        with suppress(OSError, ValueError, RunError):  # a run that cannot be read says nothing
            result = run.result() if run.trains else None
            if result and result["train_info"]["tokens_per_second"]:
                found.append(_pace(run.config(), result))
    return found


def _pace(config: TrainConfig, result: dict[str, Any]) -> Pace:
    info, meta = result["train_info"], result["meta_info"]
    steps = info["steps"] * info["step_seconds_median"]
    return Pace(
        base_model=config.base_model,
        device=result["run_info"]["device"],
        method=config.method,
        tokens_per_second=info["tokens_per_second"],
        seconds_around=max(0.0, meta["attempt_seconds"] - steps) if meta["attempts"] == 1 else 0.0,
    )


# -- files


def _study_id(name: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}-{safe.strip('-.')[:50] or 'study'}"


def _link(source: Path, target: Path) -> None:
    """The files of a folder under another name; copies where the disk has no hard links. They are never written to."""
    target.mkdir()
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)


def _write_json(path: Path, values: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    sync(partial)
    partial.rename(path)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
