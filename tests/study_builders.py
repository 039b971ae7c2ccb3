"""Studies as their files tell of them, made in memory and shaped like measured ones: for figures, verdicts, reports, page."""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from helpers import started, step

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.study_results import Analysis, StudyResults, StudyRun

GIB = 1024**3
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Shares of the peak.
PARTS = {"weights": 0.24, "adapters": 0.02, "optimizer": 0.02, "gradients": 0.01, "activations": 0.42, "logits": 0.3}
EVAL_FINGERPRINT = "3feb516da916f65e" * 4


def study_run(
    *,
    method: str = "lora",
    rank: int = 8,
    seed: int = 42,
    role: str = "arm",
    state: str = "finished",
    detail: str = "",
    loss: float = 0.814,
    base_loss: float = 3.2,
    peak_gib: float = 1.13,
    on_gpu: bool = True,
    seconds: float = 0.33,
    steps: int = 20,
    tokens: Sequence[int] | None = None,
    varied: Mapping[str, Any] | None = None,
    parts: Mapping[str, int] | None = None,
    eval_fingerprint: str = EVAL_FINGERPRINT,
    evaluations: Sequence[float] | None = None,
    train_losses: Sequence[float] | None = None,
    **settings: Any,
) -> StudyRun:
    """A run with these figures. One that neither finished nor was stopped has no result. `evaluations`: losses from step 0 to
    the end, the last of which is `loss` where none are given."""
    varied = {"method": method, "rank": rank} if varied is None else dict(varied)
    config = TrainConfig(**({
        "data": "support_tickets.jsonl", "method": method, "rank": rank, "seed": seed, "max_steps": steps,
        "dataset_license": "apache-2.0", "device": "auto" if on_gpu else "cpu",
    } | settings))  # fmt: skip
    tokens = tokens or [150 + 40 * (number % 7) for number in range(steps)]
    curve = evaluations or [base_loss + (loss - base_loss) * share for share in (0, 0.7, 1)]
    at = [round(place * steps / (len(curve) - 1)) for place in range(len(curve))]
    noise = random.Random(seed * 1000 + rank)
    train = train_losses or [
        loss + (base_loss - loss) * math.exp(-6 * n / steps) + noise.gauss(0, 0.08) for n in range(1, steps + 1)
    ]
    peak = round(peak_gib * GIB)
    done = steps if state in ("finished", "stopped") else steps // 2 if state in ("running", "failed", "crashed") else 0
    done = done // 2 if state == "stopped" else done
    known = [
        step(
            n, epoch=n / 10, loss=train[n - 1], tokens=tokens[n - 1], supervised_tokens=tokens[n - 1] // 2,
            step_seconds=_step_seconds(seconds, tokens[n - 1], method, n), peak_allocated_bytes=peak if on_gpu else None,
            peak_reserved_bytes=round(1.2 * peak) if on_gpu else None, peak_host_bytes=2 * GIB if on_gpu else peak,
        )
        for n in range(1, done + 1)
    ]  # fmt: skip
    evaluated = [
        events.Evaluation(step=n, loss=value, tokens=400, seconds=1)
        for n, value in zip(at, curve, strict=True)
        if done and n <= done
    ]
    has_result = state in ("finished", "stopped")
    slug = "-".join(str(value) for value in varied.values())
    run_id = f"20261125-041003-{seed:04d}-{slug}-{role}".replace(" ", "-")
    values = parts if parts is not None else {name: round(share * peak) for name, share in PARTS.items()}
    return StudyRun(
        run_id=run_id,
        name=config.run_name(),
        role=role,
        varied=varied,
        seed=seed,
        state=state,
        detail=detail or f"{state} at step {done}",
        config=config,
        result=_result(run_id, config, known, evaluated, on_gpu=on_gpu, done=done, eval_fingerprint=eval_fingerprint)
        if has_result
        else None,
        steps=tuple(known),
        evaluations=tuple(evaluated),
        started=started(
            total_steps=steps, estimated_peak_bytes=sum(values.values()) or peak, estimated_parts=dict(values),
            device="NVIDIA H100 80GB HBM3" if on_gpu else "CPU (AMD EPYC, 2 threads)",
        ) if done else None,
    )  # fmt: skip


def _step_seconds(seconds: float, tokens: int, method: str, number: int) -> float:
    """A fixed share and one that grows with the tokens; QLoRA's is mostly fixed, so that its ratio falls with the tokens."""
    fixed = 0.3 if method == "lora" else 0.5
    return seconds * (fixed + (1 - fixed) * tokens / 300) * (1 + 0.02 * ((number * 7) % 5 - 2))


def _result(
    run_id: str,
    config: TrainConfig,
    steps: Sequence[events.Step],
    evaluations: Sequence[events.Evaluation],
    *,
    on_gpu: bool,
    done: int,
    eval_fingerprint: str,
) -> dict[str, Any]:
    """result.json as worker/results.py writes it."""
    seconds = [one.step_seconds for one in events.timed_steps(list(steps))]
    return {
        "run_info": {
            "run_id": run_id,
            "config": config.to_json(),
            "base_model": {
                "name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None, "origin": "bundled (4-bit GGUF, converted)",
                "weights_sha256": "9264ed59cd89807a" * 4,
            },
            "dataset": {
                "file_name": "support_tickets.jsonl", "train_rows": 200, "eval_rows": 40,
                "train_fingerprint": "3823ea6d6fe427b8" * 4,
                "eval_fingerprint": eval_fingerprint, "eval_source": "support_tickets_heldout.jsonl", "origin": {},
            },
            "device": "NVIDIA H100 80GB HBM3" if on_gpu else "CPU (AMD EPYC, 2 threads)",
            "template": "the model's chat template",
            "compute_dtype": "bf16",
            "path": {"layers": "fused: 30 decoder layers", "packed": "packed: attention ends with each row", "token_budget": 8192,
                     "memory": "passes of up to 8,192 tokens, nothing is recomputed"},
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
            "python": "3.11.7",
            "driver": ["580.159.04", "13.0"] if on_gpu else None,
            "git_commit": "f61e120679968caa1962fb2caa3bb75436a1f568",
        },
        "train_info": {
            "step_seconds_median": statistics.median(seconds) if seconds else None,
            "step_seconds_quartiles": statistics.quantiles(seconds, n=4) if len(seconds) > 1 else None,
            "tokens_per_second": sum(one.tokens for one in steps) / sum(one.step_seconds for one in steps),
            "peak_allocated_bytes": steps[-1].peak_allocated_bytes,
            "peak_reserved_bytes": steps[-1].peak_reserved_bytes,
            "peak_host_bytes": steps[-1].peak_host_bytes,
            "adapter_bytes": 1_222_000 * config.rank + 40_000,
            "train_loss": steps[-1].loss,
            "eval_losses": [{"step": one.step, "loss": one.loss, "tokens": one.tokens} for one in evaluations],
            "scores": [],
            "steps": done,
            "total_steps": config.max_steps,
            "train_rows": 200,
            "eval_rows": 40,
            "rows_cut": 0,
            "rows_left_out": [],
            "eval_rows_left_out": [],
            "load_peak_host_bytes": GIB,
            "load_peak_allocated_bytes": round(0.3 * GIB) if on_gpu else None,
            "trainable_parameters": 305_280 * config.rank,
            "adapter_step": evaluations[-1].step,
        },
        "meta_info": {"ended": "finished", "attempts": 1, "created_at": 1.8e9, "attempt_seconds": 60.0, "ended_at": 1.8e9 + 60,
                      "held_out": "support_tickets_heldout.jsonl"},
    }  # fmt: skip


def study(runs: Sequence[StudyRun], **changed: Any) -> StudyResults:
    """The study that these runs make."""
    names = dict.fromkeys(name for run in runs for name in run.varied)
    vary: dict[str, list[Any]] = {name: [] for name in names}
    for run in runs:
        for name, value in run.varied.items():
            if value not in vary[name]:
                vary[name].append(value)
    values: dict[str, Any] = {
        "study_id": "20261125-041003-ab12-tickets",
        "name": "tickets",
        "kind": "lora-qlora",
        "vary": vary,
        "seeds": tuple(dict.fromkeys(run.seed for run in runs if run.role == "arm")),
        "runs": tuple(runs),
        "analysis": None,
        "analysis_state": "none",
        "differences": (),
    }
    return StudyResults(**(values | changed))


# Rank -> evaluation loss of LoRA; QLoRA lies above it.
LADDER = {2: 1.02, 4: 0.91, 8: 0.816, 16: 0.812, 32: 0.811}


def ladder(
    *,
    ranks: Sequence[int] = (2, 4, 8, 16),
    seeds: Sequence[int] = (42, 43, 44),
    losses: Mapping[int, float] = LADDER,
    noise: float = 0.004,
    qlora_loss: float = 0.035,
    peaks: tuple[float, float] = (1.13, 0.89),
    seconds: tuple[float, float] = (0.33, 0.45),
    **settings: Any,
) -> list[StudyRun]:
    """LoRA and QLoRA over ranks and seeds. `qlora_loss`, `peaks` (GiB) and `seconds`: what QLoRA changes."""
    runs = []
    for number, method in enumerate(("lora", "qlora")):
        for rank in ranks:
            for seed in seeds:
                chance = random.Random(f"{method} {rank} {seed}").gauss(0, noise) + 0.01 * (seed % 3)
                runs.append(
                    study_run(
                        method=method, rank=rank, seed=seed, loss=losses[rank] + qlora_loss * number + chance,
                        base_loss=3.22 + 0.38 * number, peak_gib=peaks[number] + 0.004 * rank, seconds=seconds[number], **settings,
                    )
                )  # fmt: skip
    return runs


def floor(run: StudyRun, *, loss: float = 0.006) -> list[StudyRun]:
    """The two runs of the run's noise floor, whose evaluation loss differs by so much."""
    assert run.eval_loss is not None and run.config is not None
    common = {"method": run.config.method, "rank": run.config.rank, "varied": run.varied, "steps": run.config.max_steps}
    return [
        study_run(**common, role="other seed", seed=run.seed + 1000, loss=run.eval_loss + loss),
        study_run(**common, role="other row order", seed=run.seed, loss=run.eval_loss - loss / 2),
    ]


def similarity(
    first: StudyRun,
    second: StudyRun,
    *,
    cosine: float,
    kind: str = "lora-qlora",
    layers: int = 30,
    spread: float = 0.05,
) -> dict[str, Any]:
    """How alike two updates are, around `cosine`; the first layer is less alike than the others."""
    chance = random.Random(f"{kind} {cosine}")
    modules = []
    for layer in range(layers):
        for module in MODULES:
            value = max(-1.0, min(1.0, cosine - spread * chance.random() - (0.1 if layer == 0 else 0)))
            modules.append(
                {"layer": layer, "module": module, "cosine": value, "l2": 0.4, "relative": math.sqrt(2 - 2 * value)}
            )
    label = second.label
    return {
        "first": first.run_id, "second": second.run_id, "kind": kind, "label": label,
        "overall": {"cosine": cosine, "l2": 3.1, "relative": math.sqrt(2 - 2 * cosine)}, "modules": modules,
    }  # fmt: skip


def spectrum(run: StudyRun, *, layers: int = 30) -> list[dict[str, Any]]:
    """Singular values that fall by a third each, as many as the rank."""
    assert run.config is not None
    rank = run.config.rank
    return [
        {"layer": layer, "module": module, "norm": 0.5, "effective_rank": 1 + (rank - 1) * (0.3 + 0.4 * layer / layers),
         "singular_values": [(0.3 + 0.01 * place) * 0.67**number for number in range(rank)]}
        for layer in range(layers) for place, module in enumerate(MODULES)
    ]  # fmt: skip


def quantisation(*, layers: int = 30, types: Sequence[str] = ("nf4", "int8")) -> tuple[dict[str, Any], ...]:
    """Rounding errors; v_proj has the largest."""
    error = {"nf4": 0.09, "fp4": 0.11, "int8": 0.008}
    return tuple(
        {"layer": layer, "module": module, "type": kind,
         "relative_error": error[kind] * (1 + 0.05 * (module == "v_proj") + 0.002 * layer),
         "max_error": 0.3, "parameters": 576 * 576}
        for kind in types for layer in range(layers) for module in MODULES
    )  # fmt: skip


def behaviour(
    runs: Sequence[StudyRun], *, cosine: float = 0.94, answers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Answers of these runs and of the base, in 16 and in 4 bits."""
    sources = {
        run.run_id: {"label": run.label, "loss": run.eval_loss, "perplexity": math.exp(run.eval_loss or 0),
                     "score": {"correct": 21 + number, "total": 40, "interval_95": [0.37, 0.69]}}
        for number, run in enumerate(runs)
    }  # fmt: skip
    for name, loss in (("base", 3.218), ("base nf4", 3.599)):
        sources[name] = {"label": name, "loss": loss, "perplexity": math.exp(loss), "score": None}
    first, *others = sources
    pairs = [
        {"first": first, "second": other, "token_match": 0.83 / number, "token_match_95": [0.78 / number, 0.87 / number],
         "embedding_cosine": cosine / number, "rows": 40,
         "embedding_cosine_95": [(cosine - 0.02) / number, (cosine + 0.02) / number]}
        for number, other in enumerate(others, 1)
    ]  # fmt: skip
    texts = answers or {source: '{"category": "billing", "urgency": "high"}' for source in sources}
    rows = [
        {"line": 7, "prompt": "Triage this ticket.\n\nI was charged twice.",
         "reference": '{"category": "billing", "urgency": "high"}',
         "answers": dict(texts)},
        {"line": 12, "prompt": "Triage this ticket.\n\nMy parcel is late.",
         "reference": '{"category": "delivery", "urgency": "low"}',
         "answers": dict(texts)},
    ]  # fmt: skip
    return {"sources": sources, "pairs": pairs, "rows": rows}


def analysed(
    runs: Sequence[StudyRun], *, cosine: float = 0.97, order: float | None = 0.985, seed: float | None = 0.21
) -> Analysis:
    """What the analysis of LoRA and QLoRA runs found, each LoRA run compared with the QLoRA run of its rank. `order` and `seed`:
    the cosines of the noise floor; None leaves it out."""
    arms = [run for run in runs if run.role == "arm" and run.seed == runs[0].seed and run.result is not None]
    found = []
    for lora in arms:
        qlora = next((r for r in arms if r.varied == lora.varied | {"method": "qlora"}), None)
        if lora.varied.get("method") != "lora" or qlora is None:
            continue
        found.append(similarity(lora, qlora, cosine=cosine))
        for kind, value in (("other seed", seed), ("other row order", order)):
            other = next((r for r in runs if r.role == kind and r.varied == lora.varied), lora)
            if value is not None:
                found.append(similarity(lora, other, cosine=value, kind=kind))
    return Analysis(
        similarity=tuple(found),
        updates={run.run_id: spectrum(run) for run in arms},
        refused=(),
        quantisation=quantisation(),
        behaviour=behaviour([run for run in arms if run.varied.get("rank") == arms[-1].varied.get("rank")]),
    )
