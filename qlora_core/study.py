"""One study: a directory that names its runs, which are made, queued, watched, resumed and stopped as a whole. Trains nothing."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core import events, models, queue
from qlora_core.config import TrainConfig, replace
from qlora_core.errors import RunError
from qlora_core.run_status import ACTIVE, CRASHED, FINISHED, QUEUED, RUNNING, RunStatus
from qlora_core.runs import Run, RunStore, lock
from qlora_core.settings import Settings
from qlora_core.storage import new_folder, write_json
from qlora_core.study_grid import run_label
from qlora_core.study_results import GONE, LEFT_OUT, NONE, Analysis, StudyResults, StudyRun
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
        write_json(self.path / "study.json", values)

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
            made = [self._made(entry, told) for entry in told["runs"] if not entry.get("left_out")]
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
        with new_folder(self.settings.runs) as folder:
            link(self.path / "dataset", folder / "dataset")
            for name, values in (files or {}).items():
                write_json(folder / name, values)
            return RunStore(self.settings).publish(folder, config, self.base_model(), made_of)

    def stop(self) -> str:
        """Ask every run that waits or trains to save and stop. Raises RunError when there is none."""
        asked = 0
        # While its runs are being made, one that is queued a moment later would be missed.
        with lock(self.path / "lock", wait=True):
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

    def is_starting(self) -> bool:
        """Whether its runs are being made and queued just now."""
        if not self.path.exists():  # deleted meanwhile; a lock would make its folder again
            return False
        with lock(self.path / "lock", shared=True) as descriptor:
            return descriptor is None

    def status(self, known: Mapping[str, RunStatus] | None = None) -> StudyStatus:
        """`known`: where runs stand, by id, as somebody has just read it; the others are read here."""

        def stands(run_id: str | None) -> RunStatus | None:
            run = self.run(run_id)
            return ((known or {}).get(run.run_id) or run.status()) if run else None

        told = self.told()
        runs = [(label_of(entry), stands(entry["run_id"])) for entry in told["runs"] if not entry.get("left_out")]
        left_out = tuple(label_of(entry) for entry in told["runs"] if entry.get("left_out"))
        of_analysis = stands(told["analysis"])
        done = sum(status is not None and status.state == FINISHED for _, status in runs)
        state = state_of([status for _, status in runs], of_analysis)
        if state in (CRASHED, GONE) and self.is_starting():  # a run that is made and not queued yet looks like a crash
            state = QUEUED
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
            detail=detail_of(runs, of_analysis, done, left_out),
            left_out=left_out,
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
            left_out = entry.get("left_out")
            return StudyRun(
                **known,
                run_id=entry["run_id"] or "",
                name=label_of(entry),
                state=LEFT_OUT if left_out else GONE,
                detail=left_out or "deleted, or yet to be made",
                config=TrainConfig.from_mapping(entry["config"], where=self.study_id) if left_out else None,
                result=None,
                steps=(),
                evaluations=(),
                started=None,
            )
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


def label_of(entry: Mapping[str, Any]) -> str:
    return f"{run_label(entry['role'], entry['varied'])}, seed {entry['seed']}"


def _is_older(analysis: Run, runs: Sequence[Run]) -> bool:
    """Whether a run has ended since the analysis did."""
    ended = analysis.status().updated_at
    return any(run.status().updated_at > ended for run in runs)


def link(source: Path, target: Path) -> None:
    """The files of a folder under another name; copies where the disk has no hard links. They are never written to."""
    target.mkdir()
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)
