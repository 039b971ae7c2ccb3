"""What differs between two runs: settings as they take effect, and what they ran on. Knows no page and starts nothing."""

from dataclasses import fields
from typing import Any, NamedTuple

from qlora_core.config import TrainConfig
from qlora_core.runs import Run

RAN = "ran"
# In place of a value that plays no part in the run.
NOT_USED = "not used"


class Difference(NamedTuple):
    """`group` is that of TrainConfig's field, or "ran" for what no setting says."""

    group: str
    field: str
    first: Any
    second: Any

    def words(self) -> tuple[str, str]:
        """Both values for a person; None is a value that the run finds by itself, or in "ran" one that it has not."""
        return _word(self.first, self.group), _word(self.second, self.group)


def differences(first: TrainConfig, second: TrainConfig) -> list[Difference]:
    """Settings in which two runs differ, in the order of the form; the name of a run is not one of them."""
    found = [
        Difference(spec.metadata["group"], spec.name, effective(first, spec.name), effective(second, spec.name))
        for spec in fields(TrainConfig)
        if spec.name != "name"
    ]
    return [difference for difference in found if difference.first != difference.second]


def effective(config: TrainConfig, field: str) -> Any:
    """The value that counts: an automatic one where the settings alone decide it, NOT_USED where it changes nothing."""
    if _is_idle(config, field):
        return NOT_USED
    if field == "lora_alpha":
        return config.alpha
    if field == "save_steps":
        return config.save_steps or config.eval_steps
    value = getattr(config, field)
    return sorted(value) if isinstance(value, tuple) else value


def _is_idle(config: TrainConfig, field: str) -> bool:
    match field:
        case "num_epochs":
            return config.max_steps is not None
        case "eval_fraction":
            return config.eval_data is not None
        case "row_order_seed":
            return config.order_seed == config.seed
        case "quant_type" | "double_quant" | "quantize_modules" | "int8_modules":
            return config.method == "lora"
        case "score_rows" | "score_max_new_tokens":
            return config.score == "none"
        case "score_fields":
            return config.score != "json"
        case "tracker_project":
            return config.tracker == "none"
    return False


def run_differences(first: Run, second: Run) -> list[Difference]:
    """Settings, then rows, base and, where both have a result, device, path and versions. Raises RunError."""
    ours, theirs = _ran(first), _ran(second)
    known = [name for name in ours | theirs if name in ours and name in theirs]
    return differences(first.config(), second.config()) + [
        Difference(RAN, name, ours[name], theirs[name]) for name in known if ours[name] != theirs[name]
    ]


def _ran(run: Run) -> dict[str, Any]:
    """What a run worked with, by name; what only its result tells is left out until it has one."""
    base, dataset, result = run.base_model(), run.dataset(), run.result()
    facts = {
        "base revision": base.revision,
        "training rows, SHA-256": dataset.train_fingerprint,
        "evaluation rows, SHA-256": dataset.eval_fingerprint,
        "combined from": _combined_from(run.combination()),
    }
    if result is None:
        return facts
    info = result["run_info"]
    facts |= {"base weights, SHA-256": info["base_model"].get("weights_sha256")}
    facts |= {name.replace("_", " "): info.get(name) for name in ("device", "compute_dtype", "template", "python")}
    facts |= {name.replace("_", " "): value for name, value in info.get("path", {}).items()}
    return facts | info.get("packages", {}) | {"git commit": info.get("git_commit")}


def _combined_from(combination: dict[str, Any] | None) -> str | None:
    if combination is None:
        return None
    parts = " + ".join(f"{part['weight']:g} x {part['name']}" for part in combination["parts"])
    return f"{parts}, by {combination['method']}"


def _word(value: Any, group: str) -> str:
    if value is None:
        return "none" if group == RAN else "automatic"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
