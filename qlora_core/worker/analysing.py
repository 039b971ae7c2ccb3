"""The analysis of a study: what its adapters have learnt, what quantising the base lost, how its models answer. Trains nothing."""

from pathlib import Path
from typing import Any

from qlora_core import adapter_comparison, events, precision
from qlora_core.adapter_comparison import Update
from qlora_core.errors import LabError, RunError
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run
from qlora_core.storage import write_json
from qlora_core.studies import StudyStore
from qlora_core.study_results import ARM, StudyRun
from qlora_core.worker import hardware
from qlora_core.worker.answers import Answers
from qlora_core.worker.quantisation_error import quantisation_error
from qlora_core.worker.study_pairs import first_seed, weight_pairs
from qlora_core.worker.training import StopAsked, Training, run_guarded

FOUND = "found.json"


def analyse(run: Run, stop: Any) -> None:
    """Compare the runs of the study that analysis.json names. Raises LabError where a person can mend what is wrong."""
    run_guarded(StudyAnalysis(run, stop))


class StudyAnalysis(Training):
    """As a training: the same rows, base, device, memory messages and stopping, with comparisons in place of the steps. What each
    part has found is written before the next begins. One base is in memory at a time."""

    def run_to_end(self) -> None:
        self.asked = self.run.analysis()
        self.found: dict[str, Any] = {"updates": {}}
        # What an earlier analysis has found stays until this one has found it all.
        self.is_first = not (self.run.path / FOUND).exists()
        if any(isinstance(event, events.Launched) and event.attempt > 1 for event in self.run.events()[0]):
            self.say(events.Resumed(from_step=0))  # runs may have ended since: it begins anew
        try:
            self.study = StudyStore(self.run.settings).get(self.asked["study_id"])
            self.finished = self.finished_runs()
            self.seed = first_seed(self.finished, self.study.results().seeds)
            self.compare_weights()
            self.measure_quantisation()
            arms = [run for run in self.finished if run.role == ARM and run.seed == self.seed]
            self.keep(behaviour=Answers(self, arms, self.adapter_of).compared())
        except StopAsked:
            self.say(events.Stopped(step=0))
        else:
            self.write_found()
            self.say(events.Finished(step=0, reason=f"compared {len(self.finished)} runs"))

    def finished_runs(self) -> list[StudyRun]:
        """Raises RunError where none has finished with an adapter."""
        results = self.study.results()
        usable = [run for run in results.runs if run.state == FINISHED and self.adapter_of(run).exists()]
        left_out = [run for run in results.runs if run not in usable]
        if left_out:
            named = ", ".join(f"{run.label} ({run.state})" for run in left_out)
            self.say(events.Note(text=f"not compared, as they have not finished: {named}"))
        if not usable:
            raise RunError(f"{self.study.study_id}: none of its runs has finished with an adapter; resume the study")
        return usable

    def adapter_of(self, run: StudyRun) -> Path:
        return self.run.settings.runs / run.run_id / "adapter" / "adapter_model.safetensors"

    def keep(self, **found: Any) -> None:
        self.found |= found
        if self.is_first:
            self.write_found()

    def write_found(self) -> None:
        write_json(self.run.path / FOUND, self.found)

    # -- weights

    def compare_weights(self) -> None:
        pairs = list(weight_pairs(self.finished, self.seed))
        last_use = {run.run_id: place for place, (*both, _, _) in enumerate(pairs) for run in both}
        held: dict[str, Update | None] = {}
        refused, spectra, similarity = [], {}, []

        def update_of(run: StudyRun) -> Update | None:
            if run.run_id not in held:
                try:
                    held[run.run_id] = self.load_update(run)
                except LabError as error:
                    held[run.run_id] = None
                    refused.append({"run_id": run.run_id, "reason": str(error)})
                else:
                    spectra[run.run_id] = adapter_comparison.spectrum(held[run.run_id])
            return held[run.run_id]

        for place, (first, second, kind, label) in enumerate(pairs):
            self.check_stop()
            self.phase("comparing what the adapters have learnt", place, len(pairs))
            one, other = update_of(first), update_of(second)
            # Adapters on attention and on the MLP alone have nothing in common, which is no mistake.
            if one and other and one.modules.keys() & other.modules.keys():
                found = adapter_comparison.compare(one, other).to_json()
                told = {"first": first.run_id, "second": second.run_id, "kind": kind, "label": label}
                similarity.append(told | found)
            for run_id in [run_id for run_id, use in last_use.items() if use <= place and held.get(run_id)]:
                held[run_id] = None  # 8B adapters of high rank would not all fit
        for run in self.finished:
            self.check_stop()
            if run.run_id not in held:
                update_of(run)
                held[run.run_id] = None
        self.keep(similarity=similarity, updates=spectra, refused=refused)

    def load_update(self, run: StudyRun) -> Update:
        folder = self.adapter_of(run).parent
        return adapter_comparison.load_update(folder, init_lora_weights=run.config.init_lora_weights)

    # -- the base

    def measure_quantisation(self) -> None:
        """For each way in which a run of the study held its base, once for each type of number."""
        measured: dict[tuple[Any, ...], dict[str, Any]] = {}
        for config in {
            precision.words(r.config): r.config for r in self.finished if r.config.method == "qlora"
        }.values():

            def report(done: int, total: int, told: str = precision.words(config)) -> None:
                self.check_stop()
                if done % 8 == 0:
                    self.phase(f"measuring what {told} loses of each matrix", done, total)

            for found in quantisation_error(
                self.base.folder, config, device=self.device, dtype=hardware.DTYPES[self.dtype],
                report=report, tell=lambda text: self.say(events.Note(text=text)),
            ):  # fmt: skip
                if not config.double_quant and found["type"] != "int8":
                    found["type"] += ", single quantisation"
                measured.setdefault((found["layer"], found["module"], found["type"]), found)
        self.keep(quantisation=list(measured.values()))
