"""All studies: made at once or not at all, found, and deleted; and how fast runs were that are known. Trains nothing."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_core import models, trackers
from qlora_core.config import TrainConfig, replace
from qlora_core.data.locate import locate
from qlora_core.data.stored import StoredDataset, store
from qlora_core.errors import ConfigError, RunError
from qlora_core.planner.studying import Pace
from qlora_core.run_status import ACTIVE
from qlora_core.runs import Run, RunStore, lock
from qlora_core.settings import Settings
from qlora_core.storage import new_folder, new_id, remove_folder, write_json
from qlora_core.study import GRID, PICKED, Study, link
from qlora_core.study_grid import ARM, Cell, cells
from qlora_core.study_picking import differences_of, varied_of
from qlora_core.study_results import NONE

UNFITTING = "it would not fit the memory"


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
        trained, where others would not fit; these stay in the study as a gap. Raises ConfigError, DatasetError, ModelError.
        """
        name = name.strip() or config.run_name()
        made = cells(config, vary, seeds=seeds, noise_floor=noise_floor, name=name)
        kept = [_marks(cell) for cell in (made if only is None else only)]
        if problem := trackers.problem(config):
            raise ConfigError(problem)
        with new_folder(self.folder) as folder:
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
                        "left_out": "" if _marks(cell) in kept else UNFITTING,
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
        with new_folder(self.folder) as folder:
            link(first.path / "dataset", folder / "dataset")
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
        write_json(folder / "model.json", model.to_json())
        write_json(folder / "study.json", told)
        with lock(self.folder / ".lock", wait=True):
            for study in self.list():
                with suppress(RunError):
                    if study.told().get("key") == told["key"] and study.status().state in (*ACTIVE, NONE):
                        return study
            path = self.folder / new_id(told["name"], otherwise="study")
            folder.rename(path)
        return Study(path, self.settings)

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
        """Its runs stay, unless they are to go too. Raises RunError while something of it waits or trains, and where a run cannot
        go; the study then stays."""
        runs, doomed, problems = RunStore(self.settings), [], []
        with suppress(RunError):  # one that cannot be read names no runs, and goes
            if study.status().state in ACTIVE:
                problems.append(f"{study.study_id}: is under way; stop it before you delete it")
            doomed = [run for run in (study.analysis(), *(self._own_runs(study) if with_runs else ())) if run]
        # All are asked before the first goes.
        problems += [problem for run in doomed if (problem := runs.deletion_problem(run))] if not problems else []
        if problems:
            raise RunError(*problems)
        for run in doomed:
            runs.delete(run)
        (self.settings.downloads / f"{study.study_id}.zip").unlink(missing_ok=True)
        remove_folder(study.path)

    def _own_runs(self, study: Study) -> Sequence[Run]:
        """Those that were made for it: not what was picked, nor what another study names too."""
        if study.told()["kind"] == PICKED:
            return []
        others: set[str] = set()
        for other in self.list():
            with suppress(RunError):
                others |= {entry["run_id"] for entry in other.told()["runs"] if other.study_id != study.study_id}
        return [run for run in study.runs() if run.run_id not in others]


def measured_paces(settings: Settings) -> list[Pace]:
    """How fast runs that have finished were, the newest first."""
    found = []
    for run in RunStore(settings).list():
        with suppress(OSError, ValueError, KeyError, TypeError, RunError):  # a run that cannot be read says nothing
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


def _marks(cell: Cell) -> tuple[Any, ...]:
    """What tells a run of a study from its others, whatever it is called."""
    return cell.role, repr(sorted(cell.varied.items())), cell.seed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
