"""One run from config to adapter: rows, model, steps, evaluations, checkpoints, result. Read it top to bottom."""

import contextlib
import errno
import math
import os
import shutil
import threading
import time
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from qlora_core import events, models
from qlora_core.config import MUTATED_BASE
from qlora_core.errors import ModelError, TrainingError
from qlora_core.runs import Run
from qlora_core.scores import scorer
from qlora_core.tokens import load_tokenizer, template_name
from qlora_core.worker import checkpoints, hardware, loading, results
from qlora_core.worker.evaluation import count_correct, evaluation_loss, generate
from qlora_core.worker.reading import read_rows
from qlora_core.worker.steps import Stepper
from qlora_core.worker.tracking import Tracking

EVALUATIONS = 5
# Groups of settings that a checkpoint depends on, and what in them it does not depend on.
SHAPING_GROUPS = ("adapter", "quantisation", "optimizer")
NOT_SHAPING = ("base_model", "max_steps", "num_epochs")
BEGIN_AT_ZERO = ("default", "gaussian", "orthogonal")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def train(run: Run, stop: Any) -> None:
    """Train the run to its end or to a stop. Raises LabError where a person can mend what is wrong."""
    run_guarded(Training(run, stop))


def run_guarded(training: "Training") -> None:
    """Run it to its end; a full disk and full memory become a TrainingError that says what helps."""
    disable_progress_bar()  # the run's events say how far it is; bars would fill its log
    try:
        training.run_to_end()
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in DISK_FULL and not any(os.strerror(n) in str(error) for n in DISK_FULL):
            raise
        shutil.rmtree(training.run.path / "adapter.partial", ignore_errors=True)
        raise TrainingError(
            f"the disk became full while {training.doing}: free space on the disk of {training.run.path}, then resume"
        ) from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory while {training.doing}: {str(error).split('. If reserved')[0]}. Choose qlora, a lower rank, a "
            "shorter max_seq_length or a smaller base model, or end what else uses this device"
        ) from error
    finally:
        training.tracking.finish()


class StopAsked(Exception):
    """A person asked the run to stop; raised between passes, steps and tokens, never inside one."""


class Training:
    """The state of one run in this process; everything that must outlive it goes through `run`'s directory."""

    def __init__(self, run: Run, stop: Any) -> None:
        self.run, self.stop, self.config = run, stop, run.config()
        self.device = hardware.choose_device(self.config)
        self.dtype = hardware.choose_dtype(self.config, self.device)
        hardware.limit_memory(self.config, self.device)
        self.meter = hardware.MemoryMeter(self.device)
        self.base = run.base_model()
        if not self.base.folder.is_dir():
            raise ModelError(
                f"base model {self.base.name}: its folder {self.base.folder} is gone; put it back, or start a new run"
            )
        # Hashing a large base takes seconds: meanwhile it is loaded. The hash is asked for again where it is needed.
        threading.Thread(target=models.weights_sha256, args=(self.base,), daemon=True).start()
        # What the adapter took over from the base weights at its start, where it does.
        self.initial: dict[str, torch.Tensor] | None = None
        self.adapter_step = 0
        self.eval_losses: dict[int, float] = {}
        self.attempt_started = time.time()
        self.doing = "starting"
        self.tracking = Tracking(run)

    def say(self, event: events.Event) -> None:
        events.append(self.run.events_path, event)
        self.tracking.log(event)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        self.doing = name
        self.say(events.Phase(name=name, done=done, total=total))

    def run_to_end(self) -> None:
        self.tokenizer = load_tokenizer(self.base.folder, self.config.template)
        self.phase("reading the dataset")
        try:
            self.rows = read_rows(self.run, self.tokenizer, check=self.check_stop)
        except StopAsked:  # minutes for a million rows; what an earlier attempt has saved stays
            steps = [event.step for event in self.run.history() if isinstance(event, events.Step)]
            self.say(events.Stopped(step=max(steps, default=0)))
            return
        for remark in self.run.dataset().remarks():
            self.say(events.Note(text=remark))
        self.load_model()
        self.prepare_steps()
        self.done = self.resume()
        self.phase("warming up on the longest rows")
        self.steps.warm_up()
        try:
            self.measure()
            if self.done == 0:
                self.score()
            self.meter.reset()
            while self.done < self.total_steps and not self.has_stopped_improving():
                self.check_stop()
                self.say(self.steps.take(self.done))
                self.done += 1
                self.measure()
                if self.done % self.save_steps == 0 or self.done == self.best_step():
                    self.save_checkpoint()
            self.save_checkpoint()
            self.choose_adapter()
            self.score()
        except StopAsked:
            self.save_checkpoint()
            self.choose_adapter()
            self.finish(events.Stopped(step=self.done))
        else:
            self.finish(events.Finished(step=self.done, reason=self.why_early()))

    def check_stop(self, *_: int) -> None:
        if self.stop:
            raise StopAsked

    # -- the model and the way it is trained

    def load_model(self) -> None:
        self.phase("loading the base model")
        self.meter.reset()
        base = loading.load_base(self.base.folder, self.config, device=self.device, dtype=self.dtype)
        self.model = loading.add_adapter(base, self.config, base_name=self.base.name)
        if self.config.init_lora_weights in MUTATED_BASE:
            self.initial = {name: tensor.cpu().clone() for name, tensor in loading.adapter_tensors(self.model).items()}
        self.model.train()
        self.load_peaks = self.meter.host(), self.meter.allocated()

    def prepare_steps(self) -> None:
        """Decide how the steps run, and say so."""
        self.phase("choosing how the steps run")
        steps = Stepper(self.model, self.config, self.rows.train, device=self.device, dtype=self.dtype, say=self.say)
        passes = steps.passes
        self.steps, self.total_steps = steps, steps.total_steps
        self.eval_steps = self.config.eval_steps or max(1, math.ceil(steps.total_steps / EVALUATIONS))
        self.save_steps = self.config.save_steps or self.eval_steps
        self.say(
            events.Started(
                total_steps=steps.total_steps,
                train_rows=len(self.rows.train),
                eval_rows=len(self.rows.evaluation),
                rows_cut=self.rows.cut,
                rows_left_out=self.rows.left_out,
                eval_rows_left_out=self.rows.eval_left_out,
                device=hardware.describe(self.device),
                compute_dtype=self.dtype,
                template=template_name(self.tokenizer, self.config.template),
                packed=passes.packed,
                packed_reason=passes.packed_reason,
                compiled=passes.compiled,
                compiled_reason=passes.compiled_reason,
                fused=passes.fused is not None,
                fused_reason=passes.fused_reason,
                token_budget=passes.token_budget,
                checkpointed_layers=passes.checkpointed_layers,
                offloaded=passes.offloaded,
                memory_reason=passes.memory_reason,
                estimated_peak_bytes=passes.estimated_peak_bytes,
                estimated_parts={name: size for name, size in passes.estimated_parts.items() if size},
                trainable_parameters=sum(parameter.numel() for parameter in passes.parameters),
                load_peak_host_bytes=self.load_peaks[0],
                load_peak_allocated_bytes=self.load_peaks[1],
            )
        )

    # -- what it has learnt

    def measure(self) -> None:
        """The evaluation loss, where one is due at this step and an earlier attempt has not measured it."""
        step = self.done
        if (step % self.eval_steps and step != self.total_steps) or step in self.eval_losses:
            return
        self.phase(f"evaluating on {len(self.rows.evaluation)} rows")
        begin = hardware.clock(self.device)
        with self.steps.accelerator.autocast():
            loss, tokens = evaluation_loss(
                self.model,
                self.rows.evaluation,
                token_budget=self.steps.passes.token_budget,
                packed=self.steps.passes.packed,
                device=self.device,
                between_passes=self.check_stop,
                loss_of=self.steps.passes.loss_of,
            )
        seconds = hardware.clock(self.device) - begin
        if not math.isfinite(loss) and step == 0:
            raise TrainingError(
                f"the base model's own evaluation loss is {loss}, before any training: its weights are damaged, or too large "
                f"for compute_dtype {self.dtype}; choose another one or another base model"
            )
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step}: the evaluation loss is {loss}; nothing of it was saved. Lower learning_rate "
                f"(now {self.config.learning_rate:g}) or choose another compute_dtype (now {self.dtype})"
            )
        self.eval_losses[step] = loss
        self.say(events.Evaluation(step=step, loss=loss, tokens=tokens, seconds=seconds))

    def has_said(self, kind: type[events.Event], step: int) -> bool:
        return any(isinstance(event, kind) and event.step == step for event in self.run.history())

    def best_step(self) -> int | None:
        """The step of the lowest evaluation loss so far, the first of equal ones; None before there is one."""
        return min((step for step in self.eval_losses if step), key=self.eval_losses.__getitem__, default=None)

    def has_stopped_improving(self) -> bool:
        """Whether the last `early_stopping_patience` evaluations were all no lower than one before them."""
        patience, losses = self.config.early_stopping_patience, list(self.eval_losses.values())
        return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def why_early(self) -> str:
        if self.done == self.total_steps:
            return ""
        lowest = min(self.eval_losses, key=self.eval_losses.__getitem__)
        return (
            f"ended early, at step {self.done} of {self.total_steps}: the evaluation loss was lowest at step {lowest} "
            f"({self.eval_losses[lowest]:.4f}) and has not fallen since"
        )

    def choose_adapter(self) -> None:
        """With final_adapter "best", put the adapter of the lowest evaluation loss back into the model."""
        self.adapter_step, best = self.done, self.best_step()
        if self.config.final_adapter == "last" or best in (None, self.done):
            return
        adapter = checkpoints.load_adapter(self.run.path / "checkpoints", best, device=self.device)
        if adapter is None:
            self.say(
                events.Note(
                    text=f"the checkpoint of step {best}, the best, is gone or damaged: the last adapter is kept"
                )
            )
            return
        self.steps.load_adapter(adapter)
        self.adapter_step = best
        self.say(events.Note(text=f"the adapter of step {best} is kept: its evaluation loss is the lowest"))

    def score(self) -> None:
        """Answer held-out rows and count what is right; the answers are kept for reading."""
        config, step = self.config, self.done
        if config.score == "none" or self.has_said(events.Score, step):
            return

        def report(answered: int, total: int) -> None:
            self.check_stop()
            self.phase(f"answering held-out rows {moment}", answered, total)

        moment = "before training" if step == 0 else "after training"
        begin = hardware.clock(self.device)
        # Before the first step most adapters add nothing; without it the base answers faster.
        begins_at_zero = config.init_lora_weights in BEGIN_AT_ZERO
        base_only = self.model.disable_adapter() if step == 0 and begins_at_zero else contextlib.nullcontext()
        with self.steps.accelerator.autocast(), base_only:
            answers = generate(
                self.model,
                self.tokenizer,
                self.rows.scored,
                max_new_tokens=config.score_max_new_tokens,
                device=self.device,
                report=report,
            )
        correct = count_correct(answers, self.rows.scored, scorer(config.score, config.score_fields))
        results.write_answers(self.run, step, self.rows.scored, answers, scorer(config.score, config.score_fields))
        seconds = hardware.clock(self.device) - begin
        self.say(events.Score(step=step, name=config.score, correct=correct, total=len(answers), seconds=seconds))

    # -- what outlives the process

    def save_checkpoint(self) -> None:
        step = self.done
        if self.has_said(events.Checkpoint, step):
            return
        checkpoints.save(
            self.run.path / "checkpoints",
            step,
            adapter=loading.adapter_tensors(self.model),
            state={"step": step, **self.steps.state()},
            made_for=self.identity(),
            keep=self.config.keep_checkpoints,
            best=self.best_step(),
        )
        self.say(events.Checkpoint(step=step))

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit: base weights, rows, and the settings that shape the steps."""
        shaping = [
            spec.name
            for spec in fields(self.config)
            if spec.metadata["group"] in SHAPING_GROUPS and spec.name not in NOT_SHAPING
        ]
        config = self.config.to_json()
        return {name: config[name] for name in (*shaping, "max_seq_length")} | {
            "base model": self.base.name,
            "weights of the base model (SHA-256)": models.weights_sha256(self.base),
            "training rows (SHA-256)": self.run.dataset().train_fingerprint,
        }

    def resume(self) -> int:
        """Load the newest sound checkpoint of an earlier attempt; returns the step to go on from, 0 for a new run.

        Raises TrainingError for one of another run.
        """
        skipped: list[str] = []
        folder = self.run.path / "checkpoints"
        found = checkpoints.load_newest(folder, self.identity, device=self.device, report=skipped.append)
        earlier = any(isinstance(event, events.Launched) and event.attempt > 1 for event in self.run.events()[0])
        step = 0
        if found:
            adapter, state = found
            self.steps.load_adapter(adapter)
            self.steps.load_state(state)
            step = state["step"]
        if earlier:
            self.say(events.Resumed(from_step=step, skipped=tuple(skipped)))
        self.eval_losses = {e.step: e.loss for e in self.run.history() if isinstance(e, events.Evaluation)}
        return step

    def finish(self, ending: events.Event) -> None:
        """Write the adapter and result.json, then say that the run has ended."""
        self.phase("saving the adapter")
        results.write_adapter(self.run, self.model, self.tokenizer, initial=self.initial)
        results.write_result(
            self.run,
            ending,
            self.steps,
            device=self.device,
            adapter_step=self.adapter_step,
            attempt_started=self.attempt_started,
        )
        self.tracking.finish()
        self.say(ending)
