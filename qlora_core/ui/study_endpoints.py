"""The endpoints of studies for gradio_client, as those of runs are. Each calls the core once; mistakes are told in words."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from qlora_core.cli_estimate import facts_for
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.options import converted
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore, measured_paces
from qlora_core.study_grid import KINDS, grid_problems
from qlora_core.study_plan import LORA_VS_QLORA, Wanted
from qlora_core.study_results import StudyResults
from qlora_core.ui import study_view
from qlora_core.ui.study_asked import plan_of_form, start_study
from qlora_core.verdicts import verdicts

STUDY_KEYS = ("kind", "vary", "seeds", "noise_floor", "name", "skip_unfitting")


def add_study_endpoints(
    settings: Settings, told: Callable[..., Any], config_of: Callable[[dict[str, Any], str | None], TrainConfig]
) -> None:
    """Inside a Blocks context. `told` wraps an endpoint so that mistakes reach the client; `config_of` makes the settings of a
    run from what a client sends."""

    @told
    def begin_study(
        config: dict[str, Any], file: str | None = None, study: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Start or queue a study. `config` and `file` as start_run takes them; `study` says what is compared: kind (lora-vs-qlora,
        rank-ladder …), vary ({"rank": [4, 8]}), seeds, noise_floor, name, skip_unfitting. The same call while the study is under
        way returns that study."""
        wanted, skip = wanted_of(study or {})
        settings_of_runs = config_of(config or {}, file)
        facts = facts_for(settings_of_runs, None, settings)
        found = plan_of_form(wanted, settings_of_runs, facts, measured_paces(settings))
        return start_study(found, settings, skip=skip).status().to_json()

    @told
    def study_status(study_id: str) -> dict[str, Any]:
        """Where a study stands: state, runs done of total, time left, each run as run_status tells it, one sentence in `detail`."""
        return StudyStore(settings).get(study_id).status().to_json()

    @told
    def study_results(study_id: str) -> dict[str, Any]:
        """What a study has found so far: verdicts with the numbers they rest on, and what each run measured."""
        return results_of(StudyStore(settings).get(study_id).results())

    @told
    def stop_study(study_id: str) -> dict[str, Any]:
        """Save and stop what trains of a study, and take the rest out of the queue."""
        study = StudyStore(settings).get(study_id)
        return {"study_id": study.study_id, "detail": study.stop()}

    @told
    def resume_study(study_id: str) -> dict[str, Any]:
        """Go on with what has not finished, and analyse again."""
        study = StudyStore(settings).get(study_id)
        study.start()
        return study.status().to_json()

    @told
    def list_studies() -> dict[str, Any]:
        """All studies, newest first, each as study_status tells it."""
        return {"studies": [status.to_json() for status in study_view.statuses(settings)]}

    with gr.Column(visible=False):
        config, study = gr.JSON(label="config"), gr.JSON(label="study")
        file, status, trigger = gr.File(label="file"), gr.JSON(label="status"), gr.Button()
    trigger.click(begin_study, [config, file, study], status, api_name="start_study", concurrency_limit=None)
    for function in (study_status, study_results, stop_study, resume_study, list_studies):
        gr.api(function, api_name=function.__name__, concurrency_limit=None)


def wanted_of(given: dict[str, Any]) -> tuple[Wanted, bool]:
    """(the study that is asked for, whether runs that do not fit are left out). Raises ConfigError with all that is wrong."""
    if not isinstance(given, dict):
        raise ConfigError(
            f"study is {type(given).__name__}; expected what is compared, such as {{'kind': 'rank-ladder'}}"
        )
    values: dict[str, Any] = {"vary": {}, "seeds": []} | given
    problems = [
        f"study: {key} is not known; known are {', '.join(STUDY_KEYS)}" for key in given if key not in STUDY_KEYS
    ]
    kind = values.get("kind") or (None if values["vary"] or values["seeds"] else LORA_VS_QLORA)
    if kind is not None and kind not in KINDS:
        problems.append(f"study: kind is {kind!r}; it must be one of {', '.join(KINDS)}, or absent with vary")
    vary = dict(KINDS[kind].vary) if kind in KINDS else {}
    vary |= _vary(values["vary"], problems)
    seeds = values["seeds"]
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
        problems.append(f"study: seeds are {seeds!r}; expected a list of whole numbers")
        seeds = []
    problems += grid_problems(vary, seeds)
    if problems:
        raise ConfigError(*problems)
    floor = values.get("noise_floor")
    wanted = Wanted(kind or "", vary, seeds, None if floor is None else bool(floor), str(values.get("name") or ""))
    return wanted, bool(values.get("skip_unfitting"))


def _vary(given: Any, problems: list[str]) -> dict[str, list[Any]]:
    """Values as the fields have them; what is wrong joins the problems."""
    if not isinstance(given, dict) or not all(isinstance(values, list) for values in given.values()):
        problems.append(f"study: vary is {given!r}; expected a list of values by setting, such as {{'rank': [4, 8]}}")
        return {}
    found: dict[str, list[Any]] = {}
    for name, values in given.items():
        try:
            found[name] = [converted(TrainConfig, name, value) for value in values]
        except ConfigError as error:
            problems.extend(f"study: vary: {problem}" for problem in error.problems)
    return found


def results_of(results: StudyResults) -> dict[str, Any]:
    """JSON of what a study has found, without its curves."""
    names = (
        "run_id",
        "label",
        "role",
        "varied",
        "seed",
        "state",
        "detail",
        "eval_loss",
        "peak_bytes",
        "memory_kind",
        "step_seconds",
    )
    return {
        "study_id": results.study_id,
        "verdicts": [verdict.to_json() for verdict in verdicts(results)],
        "runs": [{name: getattr(run, name) for name in names} for run in results.runs],
        "differences": list(results.differences),
        "analysis_state": results.analysis_state,
    }
