"""Runs picked by hand for a study: why they cannot be compared, and what is to be said where they can."""

from collections.abc import Sequence

from qlora_core.config import TrainConfig
from qlora_core.differences import NOT_USED, effective, run_differences
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run

# Of two picked runs: what makes a comparison of their losses wrong, and what is to be said beside it.
MUST_BE_EQUAL = {
    "training rows, SHA-256": "were trained on other rows",
    "evaluation rows, SHA-256": "were evaluated on other rows",
    "base revision": "have other base models",
    "base weights, SHA-256": "have other base weights",
    # Either changes which tokens a loss is of.
    "template": "have other templates",
    "loss_on": "have their losses on other tokens",
}
SAID = (
    "device",
    "compute_dtype",
    "max_steps",
    "num_epochs",
    "rows_per_step",
    "max_seq_length",
    "torch",
)


def differences_of(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """(why the runs cannot be compared, what is to be said where they can)"""
    if len(runs) < 2:
        return [f"{len(runs)} run is picked; pick at least two"], []
    problems = [
        f"{run.run_id}: is {state}; pick runs that have finished"
        for run in runs
        if (state := run.status().state) != FINISHED
    ]
    problems += [f"{run.run_id}: trains nothing itself" for run in runs if run.combination() or run.analysis()]
    if problems:
        return problems, []
    first, said = runs[0], []
    if len({run.base_model().name for run in runs}) > 1:
        names = ", ".join(f"{run.run_id} {run.base_model().name}" for run in runs)
        problems.append(f"the runs have other base models: {names}; pick runs of one base")
    for run in runs[1:]:
        for found in run_differences(first, run):
            if found.field in MUST_BE_EQUAL:
                problems.append(f"{first.run_id} and {run.run_id} {MUST_BE_EQUAL[found.field]}: pick runs of the same")
            elif found.field in SAID:
                values = found.words()
                said.append(
                    f"{found.field.replace('_', ' ')}: {values[0]} in {first.run_id}, {values[1]} in {run.run_id}"
                )
    return list(dict.fromkeys(problems)), said


def varied_of(configs: Sequence[TrainConfig]) -> list[str]:
    """Settings in which the runs differ, of those that count in them, method and rank first; where none does, the method."""

    def differ(name: str) -> bool:
        given = {str(getattr(config, name)) for config in configs}
        counts = {str(value) for config in configs if (value := effective(config, name)) != NOT_USED}
        return len(given) > 1 and len(counts) > 1  # an automatic alpha follows the rank, and was not varied

    names = [name for name in configs[0].to_json() if name not in ("name", "seed") and differ(name)]
    return sorted(names, key=lambda name: {"method": 0, "rank": 1}.get(name, 2)) or ["method"]
