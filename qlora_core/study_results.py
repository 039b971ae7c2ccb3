"""What a study has found so far, as values: its runs with what they measured, and what its analysis compared. Judges nothing."""

from dataclasses import dataclass
from typing import Any

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.wording import METHOD_NAMES

ARM, OTHER_SEED, OTHER_ORDER = "arm", "other seed", "other row order"
GONE, LEFT_OUT, NONE = "gone", "left out", "none"
GPU, HOST = "GPU", "host"


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study in whatever state it is: those of runs, "gone" where it was deleted (then `config` is None), or "left out"
    where it would not have fitted."""

    run_id: str
    name: str
    role: str  # ARM, or what its noise floor repeats an arm with
    varied: dict[str, Any]
    seed: int
    state: str
    detail: str
    config: TrainConfig | None
    result: dict[str, Any] | None
    steps: tuple[events.Step, ...]
    evaluations: tuple[events.Evaluation, ...]
    started: events.Started | None

    @property
    def label(self) -> str:
        """ "QLoRA, rank 8": what was varied, in words."""
        return label(self.varied)

    @property
    def eval_loss(self) -> float | None:
        """Evaluation loss of the adapter that was kept, nats a token."""
        info = self._info()
        losses = {entry["step"]: entry["loss"] for entry in info.get("eval_losses", ())}
        return losses.get(info.get("adapter_step"))

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the steps: allocated on a GPU, the process's on a CPU."""
        info = self._info()
        return info.get("peak_allocated_bytes") or info.get("peak_host_bytes")

    @property
    def memory_kind(self) -> str | None:
        """Two kinds are never compared."""
        info = self._info()
        return None if not info else GPU if info.get("peak_allocated_bytes") else HOST

    @property
    def step_seconds(self) -> float | None:
        """Median of the timed steps."""
        return self._info().get("step_seconds_median")

    def _info(self) -> dict[str, Any]:
        return (self.result or {}).get("train_info", {})


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """found.json of the analysis: lists of plain values, so that tables and figures take them as they are.

    `similarity`: {"first", "second": run ids, "kind": "lora-qlora" | "other seed" | "other row order" | "other arm", "label",
    "overall": {"cosine", "l2", "relative"}, "modules": [{"layer", "module", "cosine", "l2", "relative"}]}.
    `updates`: run id -> [{"layer", "module", "norm", "effective_rank", "singular_values"}].
    `refused`: {"run_id", "reason"}. `quantisation`: {"layer", "module", "type", "relative_error", "max_error", "parameters"}.
    `behaviour`: {"sources": {source: {"label", "loss", "perplexity", "score"}}, "pairs": [{"first", "second", "token_match",
    "token_match_95", "embedding_cosine", "embedding_cosine_95", "rows"}], "rows": [{"line", "prompt", "reference",
    "answers": {source: text}}]}; sources are run ids, "base" (16 bits) and "base nf4" or another way that the base is held.
    """

    similarity: tuple[dict[str, Any], ...] = ()
    updates: dict[str, list[dict[str, Any]]]
    refused: tuple[dict[str, Any], ...] = ()
    quantisation: tuple[dict[str, Any], ...] = ()
    behaviour: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Analysis":
        """What has learnt nothing is like nothing, so matrices and adapters of zeros are left out of the comparisons."""
        return cls(
            similarity=tuple(
                entry | {"modules": [module for module in entry["modules"] if module["cosine"] is not None]}
                for entry in found.get("similarity", ())
                if entry["overall"]["cosine"] is not None
            ),
            updates={
                run_id: [module for module in modules if module["effective_rank"] is not None]
                for run_id, modules in found.get("updates", {}).items()
            },
            refused=tuple(found.get("refused", ())),
            quantisation=tuple(found.get("quantisation", ())),
            behaviour=found.get("behaviour"),
        )


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    study_id: str
    name: str
    kind: str
    vary: dict[str, list[Any]]
    seeds: tuple[int, ...]
    runs: tuple[StudyRun, ...]
    analysis: Analysis | None
    analysis_state: str  # a state of runs, or "none"
    differences: tuple[
        str, ...
    ]  # what makes runs picked by hand not quite comparable, in words; said with every figure

    def arms(self) -> list[tuple[StudyRun, ...]]:
        """Runs of equal `varied`, one a seed, in the order of the grid."""
        found: dict[str, list[StudyRun]] = {}
        for run in self.runs:
            if run.role == ARM:
                found.setdefault(repr(sorted(run.varied.items())), []).append(run)
        return [tuple(runs) for runs in found.values()]


def label(varied: dict[str, Any]) -> str:
    """Varied settings in words, method and rank first: "QLoRA, rank 8, fp4"."""
    order = {"method": 0, "rank": 1}
    return ", ".join(_words(name, varied[name]) for name in sorted(varied, key=lambda name: order.get(name, 2)))


def _words(name: str, value: Any) -> str:
    match name:
        case "method":
            return METHOD_NAMES[value]
        case "rank":
            return f"rank {value}"
        case "quant_type":
            return str(value).upper()
        case "double_quant":
            return "double quantisation" if value else "single quantisation"
        case "quantize_modules":
            return f"4 bits in {_joined(value)}"
        case "int8_modules":
            return f"int8 in {_joined(value)}" if value else "no int8"
        case "target_modules":
            return f"adapters on {_joined(value)}"
    return f"{name.replace('_', ' ')} {_joined(value)}"


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
