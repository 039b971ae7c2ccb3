"""Adapters of several runs, added by weight, as a new run that goes through the queue. Knows no torch: a worker adds."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_core import precision
from qlora_core.config import TrainConfig, replace
from qlora_core.data.stored import read_stored
from qlora_core.errors import RunError
from qlora_core.run_status import ACTIVE
from qlora_core.runs import Run, RunStore
from qlora_core.storage import file_sha256, new_folder, sync

DENSITY = 0.5
MOST_RANK = 1024  # as TrainConfig.rank


@dataclass(frozen=True)
class Method:
    """One of PEFT's `combination_type`s: what it gives, and what it asks for."""

    help: str
    equal_ranks: bool = False
    takes_rank: bool = False
    takes_density: bool = False


# "linear" and its kin add the factors apart: (ΣA)(ΣB) has products of one adapter's A with another's B in it, so that
# only svd and cat keep to the weighted sum of the updates B·A.
METHODS: dict[str, Method] = {
    "svd": Method("the weighted sum of the updates B·A, as near as one rank can hold it", takes_rank=True),
    "cat": Method("the weighted sum of the updates B·A exactly; the ranks add up"),
    "linear": Method(
        "adds the A and the B matrices apart, which mixes one adapter's A with another's B: fast and rough, good for "
        "adapters of one start",
        equal_ranks=True,
    ),
    "ties": Method(
        "as linear, of the largest entries those that agree in sign (arXiv 2306.01708)",
        equal_ranks=True,
        takes_density=True,
    ),
    "dare_linear": Method(
        "as linear, with entries dropped at random and the rest enlarged (arXiv 2311.03099)",
        equal_ranks=True,
        takes_density=True,
    ),
    "dare_ties": Method(
        "as dare_linear, of the entries those that agree in sign", equal_ranks=True, takes_density=True
    ),
    "magnitude_prune": Method("as linear, of the largest entries only", equal_ranks=True, takes_density=True),
    "ties_svd": Method("ties on the updates B·A, then svd", takes_rank=True, takes_density=True),
    "dare_linear_svd": Method("dare_linear on the updates B·A, then svd", takes_rank=True, takes_density=True),
    "dare_ties_svd": Method("dare_ties on the updates B·A, then svd", takes_rank=True, takes_density=True),
    "magnitude_prune_svd": Method("magnitude_prune on the updates B·A, then svd", takes_rank=True, takes_density=True),
}


@dataclass(frozen=True)
class Part:
    """A run whose adapter is to be combined, and what its files say of it."""

    run: Run

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """Rank, scale and modules as they were saved: a PiSSA run saves twice the rank of its config."""
        return json.loads((self.run.adapter / "adapter_config.json").read_text())

    @property
    def rank(self) -> int:
        return self.adapter["r"]

    @cached_property
    def base(self) -> tuple[str, str]:
        """Two runs have the same base where these are equal: name and revision, and the hash of the weights."""
        model, result = self.run.base_model(), self.run.result() or {"run_info": {"base_model": {}}}
        name = model.name + (f"@{model.revision}" if model.revision else "")
        return name, result["run_info"]["base_model"].get("weights_sha256") or str(model.folder)

    @cached_property
    def precision(self) -> str:
        config = self.run.config()
        if config.method == "lora":
            return "lora (16-bit base)"
        return f"qlora ({precision.words(config)})"

    def eval_loss(self) -> float | None:
        """Of the adapter as it was saved, which with final_adapter best is not that of the last step."""
        info = (self.run.result() or {}).get("train_info", {"eval_losses": []})
        losses = {entry["step"]: entry["loss"] for entry in info["eval_losses"]}
        return losses.get(info.get("adapter_step"), list(losses.values())[-1] if losses else None)

    def problem(self) -> str | None:
        """Why the adapter cannot be combined with any other."""
        run_id = self.run.run_id
        if self.run.analysis():
            return f"{run_id}: compares the runs of a study, so it has no adapter; combine those runs instead"
        state = self.run.status().state
        if state in ACTIVE:
            return f"{run_id}: is {state}; combine it when it has ended, or stop it first"
        if not adapter_weights(self.run).exists() or not (self.run.adapter / "adapter_config.json").exists():
            return f"{run_id}: has no adapter; train it to its end, or leave it out"
        if self.adapter.get("use_dora"):
            return (
                f"{run_id}: is a DoRA adapter, whose magnitudes PEFT cannot combine; leave it out, or merge it instead"
            )
        if self.adapter.get("target_parameters"):
            return f"{run_id}: adapts parameters that are no layers, which PEFT cannot combine; leave it out"
        return None


def create_combined(
    runs: Sequence[Run],
    weights: Sequence[float],
    *,
    method: str,
    name: str,
    density: float | None = None,
    rank: int | None = None,
) -> Run:
    """A new run, to be queued as any other, whose worker combines the adapters and evaluates the sum on the first run's
    evaluation rows.

    `density`: share of entries kept, for the methods that prune (default 0.5). `rank` of the result, for the svd methods
    (default: the highest of the parts). While an equal combination is queued or running, that run is returned. Raises
    RunError with all problems at once.
    """
    parts = [Part(run) for run in runs]
    problems = _wrong_numbers(parts, weights, method, name, density, rank)
    unusable = {part.run.run_id: problem for part in parts if (problem := part.problem())}
    problems += unusable.values()
    problems += _differences([part for part in parts if part.run.run_id not in unusable], method)
    if problems:
        raise RunError(*problems)
    if METHODS[method].takes_density and density is None:
        density = DENSITY
    return _publish(parts, weights, _config(parts, method, name, rank), {"method": method, "density": density})


def _wrong_numbers(
    parts: Sequence[Part], weights: Sequence[float], method: str, name: str, density: float | None, rank: int | None
) -> list[str]:
    problems, ids = [], [part.run.run_id for part in parts]
    if not name.strip():
        problems.append("the combination has no name; give it one (--out)")
    if len(ids) < 2:
        problems.append(f"there is {len(ids)} run to combine; name at least two")
    problems += [
        f"{run_id}: is named twice; add its weights up instead"
        for run_id in dict.fromkeys(ids)
        if ids.count(run_id) > 1
    ]
    if len(weights) != len(ids):
        problems.append(f"{len(weights)} weights for {len(ids)} runs; give one weight a run, in the order of the runs")
    if not all(math.isfinite(weight) for weight in weights):
        problems.append(f"weights are {_listed(weights)}; each must be a finite number")
    elif weights and not any(weights):
        problems.append("all weights are 0, which gives an adapter that does nothing; make one of them 1")
    kind = METHODS.get(method)
    if kind is None:
        return [*problems, f"method is {method!r}; choose one of {', '.join(METHODS)}"]
    if density is not None and not kind.takes_density:
        problems.append(f"density is {density:g}, but {method} drops no entries; leave density out, or choose ties")
    elif density is not None and not 0 < density <= 1:
        problems.append(f"density is {density:g}; it must be above 0 and at most 1 (the share of entries that is kept)")
    if rank is not None and not kind.takes_rank:
        problems.append(
            f"rank is {rank}, but {method} has the rank that its parts give it; leave rank out, or choose svd"
        )
    elif rank is not None and not 1 <= rank <= MOST_RANK:
        problems.append(f"rank is {rank}; it must be at least 1 and at most {MOST_RANK}")
    return problems


def _differences(parts: Sequence[Part], method: str) -> list[str]:
    """What keeps these adapters from being added to each other."""
    problems = []
    for what, values, remedy in (
        ("bases", [part.base[0] for part in parts], "combine runs of one base model and revision"),
        ("methods", [part.precision for part in parts], "combine runs that trained on the base in the same precision"),
        ("templates", [part.run.config().template for part in parts], "their adapters answer to different prompts"),
    ):
        if len(set(values)) > 1:
            problems.append(f"the runs have different {what}: {_each(parts, values)}; {remedy}")
    if len({part.base[0] for part in parts}) == 1 and len({part.base for part in parts}) > 1:
        hashes = [part.base[1][:12] for part in parts]
        problems.append(
            f"the runs have bases of one name but different weights: {_each(parts, hashes)}; combine runs of one base"
        )
    ranks = [part.rank for part in parts]
    if method in METHODS and METHODS[method].equal_ranks and len(set(ranks)) > 1:
        problems.append(
            f"{method} needs adapters of one rank, these have {_each(parts, ranks)}; choose svd or cat, which do not"
        )
    if method == "cat" and sum(ranks) > MOST_RANK:
        problems.append(
            f"cat adds the ranks up to {sum(ranks)}, above {MOST_RANK}; choose svd, with a rank that holds what matters"
        )
    if len({isinstance(part.adapter["target_modules"], str) for part in parts}) > 1:
        problems.append("some adapters list their target modules, others have a pattern; combine adapters of one kind")
    return problems


def _config(parts: Sequence[Part], method: str, name: str, rank: int | None) -> TrainConfig:
    """The first run's settings, with the adapter's own as the combination will have them."""
    ranks = [part.rank for part in parts]
    rank = sum(ranks) if method == "cat" else rank or max(ranks)
    first = parts[0].run.config()
    targets: Any = [part.adapter["target_modules"] for part in parts]
    same = all(isinstance(names, str) or set(names) == set(targets[0]) for names in targets)
    return replace(
        first,
        name=name.strip(),
        rank=rank,
        lora_alpha=float(rank),  # PEFT puts weights and scales into A and B: what is left is a scale of 1
        use_rslora=False,
        init_lora_weights="default",
        target_modules=first.target_modules if same else tuple(sorted({name for names in targets for name in names})),
        score="none",
        tracker="none",
    )


def _publish(parts: Sequence[Part], weights: Sequence[float], config: TrainConfig, how: dict[str, Any]) -> Run:
    first = parts[0].run
    combination = how | {
        "parts": [
            {
                "run_id": part.run.run_id,
                "name": part.run.config().run_name(),
                "weight": float(weight),
                "rank": part.rank,
                "adapter_sha256": file_sha256(adapter_weights(part.run)),
                "eval_loss": part.eval_loss(),
                "same_eval_rows": part.run.dataset().eval_fingerprint == first.dataset().eval_fingerprint,
            }
            for part, weight in zip(parts, weights, strict=True)
        ]
    }
    store = RunStore(first.settings)
    with new_folder(first.settings.runs) as folder:
        shutil.copytree(first.path / "dataset", folder / "dataset")
        dataset = replace(first.dataset(), eval_rows_also_trained=_also_trained(parts))
        (folder / "dataset" / "dataset.json").write_text(json.dumps(asdict(dataset), indent=1))
        for path in (folder / "dataset").iterdir():
            sync(path)
        (folder / "combination.json").write_text(json.dumps(combination, indent=1, ensure_ascii=False))
        return store.publish(folder, config, first.base_model(), [combination, dataset.eval_fingerprint])


def _also_trained(parts: Sequence[Part]) -> int:
    """Evaluation rows of the first run on which any of the parts was trained: their loss would flatter the sum."""
    trained = {e.digest() for part in parts for e in read_stored(part.run.path / "dataset" / "train.jsonl")}
    return sum(e.digest() in trained for e in read_stored(parts[0].run.path / "dataset" / "eval.jsonl"))


def adapter_weights(run: Run) -> Path:
    return run.adapter / "adapter_model.safetensors"


def _each(parts: Sequence[Part], values: Sequence[Any]) -> str:
    return ", ".join(f"{part.run.run_id} {value}" for part, value in zip(parts, values, strict=True))


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)
