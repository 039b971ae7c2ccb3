"""What a run leaves behind: adapter/, answers and result.json with where it ran, on what, how fast and how good."""

import importlib.metadata
import json
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_core import devices, events, models
from qlora_core.data.rows import Example
from qlora_core.runs import Run
from qlora_core.scores import Scorer, wilson_interval
from qlora_core.storage import write_json
from qlora_core.worker import hardware
from qlora_core.worker.steps import Stepper

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


def write_adapter(run: Run, model: Any, tokenizer: Any, *, initial: dict[str, torch.Tensor] | None = None) -> None:
    """adapter/ as PEFT saves it, with the tokenizer and the chat template that training used. Replaced as a whole.

    `initial`: the adapter before the first step, where it took part of the base weights over (PiSSA, OLoRA).
    """
    partial = run.path / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # PEFT would ask the Hub whether the base's vocabulary grew, to save its embeddings too; ours never does.
    model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    if initial:
        _fit_to_original_base(partial, initial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    shutil.rmtree(run.adapter, ignore_errors=True)
    partial.rename(run.adapter)


def _fit_to_original_base(folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Rewrite an adapter that was trained on W - s·B0·A0 as one for W: s·(B·A - B0·A0) = s·[B, -B0]·[A; A0], of twice the rank.

    PEFT's own conversion does the same, but loads the first adapter beside the trained one, with warnings.
    """
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name, first in initial.items():
        if "lora_A" in name:
            tensors[name] = torch.cat([tensors[name], first], dim=0)
        elif "lora_B" in name:
            tensors[name] = torch.cat([tensors[name], -first], dim=1)
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    # The scale stays as it was: alpha / r, or alpha / sqrt(r).
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_answers(run: Run, step: int, examples: Sequence[Example], answers: Sequence[str], score: Scorer) -> None:
    rows = [
        {"line": e.line, "prompt": e.asked, "reference": e.reference,
         "answer": answer, "correct": score(answer, e.reference)}
        for e, answer in zip(examples, answers, strict=True)
    ]  # fmt: skip
    write_json(run.path / f"answers-{step}.json", rows)


def write_result(
    run: Run, ending: events.Event, steps: Stepper, *, device: torch.device, adapter_step: int, attempt_started: float
) -> None:
    """`steps` tells the path that ran in the end, which memory or a failed compilation may have changed on the way."""
    history = run.history()
    started = [event for event in history if isinstance(event, events.Started)][-1]
    how = {
        "template": started.template,
        "compute_dtype": steps.dtype,
        "path": {
            "layers": steps.passes.fused_reason,
            "packed": steps.passes.packed_reason,
            "compiled": steps.passes.compiled_reason,
            "memory": steps.passes.memory_reason,
            "token_budget": steps.passes.token_budget,
            "checkpointed_layers": steps.passes.checkpointed_layers,
            "offloaded": steps.passes.offloaded,
        },
    }
    found = {
        "steps": max((event.step for event in history if isinstance(event, events.Step)), default=0),
        "total_steps": started.total_steps,
        "train_rows": started.train_rows,
        "eval_rows": started.eval_rows,
        "rows_cut": started.rows_cut,
        "rows_left_out": list(started.rows_left_out),
        "eval_rows_left_out": list(started.eval_rows_left_out),
        "load_peak_host_bytes": started.load_peak_host_bytes,
        "load_peak_allocated_bytes": started.load_peak_allocated_bytes,
        "trainable_parameters": started.trainable_parameters,
        "adapter_step": adapter_step,
    }
    write_run_result(run, ending, how=how, found=found, device=device, attempt_started=attempt_started)


def write_run_result(
    run: Run,
    ending: events.Event,
    *,
    how: dict[str, Any],
    found: dict[str, Any],
    device: torch.device,
    attempt_started: float,
) -> None:
    """result.json of any run. `how` it was made joins run_info, what it `found` train_info; the rest is read here."""
    history, base = run.history(), run.base_model()
    run_info = {
        "run_id": run.run_id,
        "config": run.config().to_json(),
        "base_model": {
            "name": base.name,
            "revision": base.revision,
            "origin": base.origin,
            "weights_sha256": models.weights_sha256(base),
        },
        "dataset": json.loads((run.path / "dataset" / "dataset.json").read_text()),
        "device": hardware.describe(device),
        **how,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "driver": devices.driver_versions(),
        "git_commit": _git_commit(),
    }
    meta_info = {
        "ended": type(ending).__name__.lower(),
        "attempts": sum(isinstance(event, events.Launched) for event in history),
        "created_at": (run.path / "model.json").stat().st_mtime,
        "attempt_seconds": time.time() - attempt_started,
        "ended_at": time.time(),
        "held_out": run.dataset().eval_source,
    }
    write_json(
        run.path / "result.json",
        {"run_info": run_info, "train_info": _measured(run, history) | found, "meta_info": meta_info},
    )


def _measured(run: Run, history: list[events.Event]) -> dict[str, Any]:
    """What the run's events and its adapter say, in figures."""
    steps = [event for event in history if isinstance(event, events.Step)]
    evaluations = [event for event in history if isinstance(event, events.Evaluation)]
    timed = events.timed_steps(history)
    seconds = [event.step_seconds for event in timed]
    peaks = {
        name: events.peak(history, name) for name in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes")
    }
    return {
        "step_seconds_median": statistics.median(seconds) if seconds else None,
        "step_seconds_quartiles": statistics.quantiles(seconds, n=4) if len(seconds) > 1 else None,
        "tokens_per_second": sum(e.tokens for e in timed) / sum(seconds) if seconds else None,
        **peaks,
        "adapter_bytes": (run.adapter / "adapter_model.safetensors").stat().st_size,
        "train_loss": steps[-1].loss if steps else None,
        "eval_losses": [{"step": e.step, "loss": e.loss, "tokens": e.tokens} for e in evaluations],
        "scores": [
            {"step": e.step, "name": e.name, "correct": e.correct, "total": e.total,
             "interval_95": wilson_interval(e.correct, e.total), "seconds": e.seconds}
            for e in history if isinstance(e, events.Score)
        ],
    }  # fmt: skip


def _git_commit() -> str | None:
    """The commit of this code, with "-dirty" when it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
