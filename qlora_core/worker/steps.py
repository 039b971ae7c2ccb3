"""The step: rows -> gradients -> optimizer, in as few passes as fit. Knows the model and the rows, but no file."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import Accelerator
from peft import set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from qlora_core import devices, events
from qlora_core.config import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.worker import hardware, loading
from qlora_core.worker.batches import Pass, Row, loss_sum, make_pass, packing_proof, plan_passes, step_rows

# A forward pass of this many tokens keeps the device busy; more costs memory and gains little.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 8192}
# Compiling the layers costs about a minute, an eager step of a large model about half a second more than a compiled one.
COMPILE_FROM_STEPS = 300
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_8bit": (bnb.optim.AdamW8bit, {}),
    "paged_adamw_8bit": (bnb.optim.PagedAdamW8bit, {}),
    "paged_adamw_32bit": (bnb.optim.PagedAdamW32bit, {}),
}
# A CPU has no second memory to page to; bitsandbytes would do the same there, with a warning.
UNPAGED = {"paged_adamw_8bit": (bnb.optim.AdamW8bit, {}), "paged_adamw_32bit": (bnb.optim.AdamW32bit, {})}
# fp16 gradients overflow now and then while the loss scale settles; this many in a row is a run that diverges.
SKIPPED_STEPS_IN_A_ROW = 10


class Stepper:
    """A model with its adapter, its optimizer, and how the steps run: packed or padded, compiled or not, in which passes."""

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        rows: Sequence[Row],
        *,
        device: torch.device,
        dtype: str,
        say: Callable[[events.Event], None],
    ) -> None:
        self.model, self.config, self.rows, self.device, self.dtype, self.say = model, config, rows, device, dtype, say
        self.parameters = loading.trainable_parameters(model)
        self.meter = hardware.MemoryMeter(device)
        self.steps_per_epoch = math.ceil(len(rows) / config.rows_per_step)
        self.total_steps = config.max_steps or max(1, round(self.steps_per_epoch * config.num_epochs))
        self.token_budget = config.token_budget or TOKEN_BUDGET[device.type]
        self.skipped_in_a_row = 0
        self.lengths_in_pass: tuple[int, ...] = ()
        self.checkpointing = False
        if config.activation_checkpointing in ("full", "offloaded"):
            self.use_checkpointing()
        mixed = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}[dtype]
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
        self.optimizer, self.scheduler = self.make_optimizer()
        self.packed, self.packed_reason = False, "padded: packing is off"
        if config.packing == "auto":
            with self.accelerator.autocast():
                self.packed, self.packed_reason = packing_proof(model, rows, device=device)
        self.compiled, self.compiled_reason = self.compile_layers()
        if config.neftune_noise_alpha:
            model.get_input_embeddings().register_forward_hook(self.add_noise)

    def use_checkpointing(self) -> None:
        self.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = True

    def make_optimizer(self) -> tuple[Any, Any]:
        config = self.config
        kind, options = (OPTIMIZERS | (UNPAGED if self.device.type == "cpu" else {}))[config.optimizer]
        if config.loraplus_lr_ratio is None:
            optimizer = kind(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, **options)
        else:
            optimizer = create_loraplus_optimizer(
                self.model, kind, lr=config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio,
                loraplus_weight_decay=config.weight_decay, **options,
            )  # fmt: skip
        # The first step of a warm-up has rate 0, as in transformers; a run of one step must learn all the same.
        warmup = min(math.ceil(self.total_steps * config.warmup_fraction), self.total_steps // 2)
        name = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=self.total_steps)
        return self.accelerator.prepare(optimizer), scheduler

    def compile_layers(self) -> tuple[bool, str]:
        """Compile each decoder layer, with a dynamic length, where that pays and can be done."""
        wanted = self.config.compile
        if wanted == "off":
            return False, "eager: compile is off"
        if wanted == "auto" and self.device.type == "cpu":
            return False, "eager: on a CPU compiling takes longer than most runs win back"
        if wanted == "auto" and self.total_steps < COMPILE_FROM_STEPS:
            return False, f"eager: {self.total_steps} steps are too few to win back a minute of compiling"
        if devices.c_compiler() is None:
            return False, "eager: there is no C compiler here (install gcc) to compile with"
        layers = _decoder_layers(self.model)
        if not layers:
            return False, "eager: no list of decoder layers was found in this architecture"
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        return True, f"compiled: {len(layers)} decoder layers"

    def add_noise(self, embedding: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        """NEFTune (https://arxiv.org/abs/2310.05914): uniform noise of at most alpha / sqrt(row length x width).

        The length is each row's own, whatever shares its pass; transformers takes that of the padded batch.
        """
        if not embedding.training or not self.lengths_in_pass:
            return embedded
        rows = torch.tensor(self.lengths_in_pass, device=embedded.device)
        lengths = rows.repeat_interleave(rows)[None] if self.packed else rows[:, None]
        most = self.config.neftune_noise_alpha / (lengths * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * most[..., None].to(embedded.dtype)

    def passes(self, rows: Sequence[Row]) -> list[Pass]:
        plan = plan_passes([len(row.token_ids) for row in rows], self.token_budget, packed=self.packed)
        return [make_pass([rows[i] for i in members], packed=self.packed, device=self.device) for members in plan]

    def backward(self, rows: Sequence[Row], *, seed: int) -> tuple[torch.Tensor, int]:
        """Gradients of the mean loss over all supervised tokens of the rows; returns that loss and the tokens read.

        Out of memory, it starts again from no gradients with smaller passes. Raises TrainingError when one row alone,
        with activation checkpointing, does not fit.
        """
        supervised = sum(row.supervised_tokens for row in rows)
        while True:
            try:
                # Seeded by step, so that dropout is the same after a resume, an evaluation or another attempt.
                torch.manual_seed(seed)
                total, tokens = torch.zeros((), device=self.device), 0
                for batch in self.passes(rows):
                    self.lengths_in_pass = batch.lengths
                    with self.accelerator.autocast():
                        loss = loss_sum(self.model, batch) / supervised
                    self.accelerator.backward(loss)
                    total += loss.detach()
                    tokens += batch.tokens
                return total, tokens
            except torch.OutOfMemoryError:
                shortage = True
            if shortage:  # outside `except`, whose traceback would keep the tensors of the failed pass alive
                self.optimizer.zero_grad(set_to_none=True)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.use_less_memory(rows)

    def use_less_memory(self, rows: Sequence[Row]) -> None:
        longest = max(rows, key=lambda row: len(row.token_ids))
        length = len(longest.token_ids)
        if self.token_budget > length:
            self.token_budget = max(length, min(self.token_budget, sum(len(r.token_ids) for r in rows)) // 2)
            self.say(events.Note(text=f"out of memory: passes of at most {self.token_budget} tokens from here on"))
        elif not self.checkpointing:
            self.use_checkpointing()
            self.say(events.Note(text="out of memory with one row a pass: activation checkpointing is on from here on"))
        else:
            raise TrainingError(
                f"out of memory with one row a pass and activation checkpointing: the longest row, line {longest.line}, has "
                f"{length} tokens; lower max_seq_length, choose qlora, a lower rank or a smaller base model"
            )

    def warm_up(self) -> None:
        """Run the longest pass that the run contains and allocate the optimizer's state, then undo both.

        What does not fit, or does not compile, shows in the first seconds and not after hours.
        """
        worst = self.longest_step()
        try:
            self.backward(worst, seed=self.config.seed)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self.fall_back_to_eager(str(error).splitlines()[0])
            self.backward(worst, seed=self.config.seed)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not optimizer.state:
            # Zero gradients at rate zero change nothing; those of the pass may have overflowed, and 0 x inf is nan.
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def longest_step(self) -> list[Row]:
        """The rows of the step with the largest single pass."""
        largest, worst = 0, self.rows_of(0)
        # The first epochs stand for all: later orders are drawn alike.
        for step in range(min(self.total_steps, max(self.steps_per_epoch, 1000))):
            rows = self.rows_of(step)
            lengths = [len(row.token_ids) for row in rows]
            for members in plan_passes(lengths, self.token_budget, packed=self.packed):
                inside = [lengths[i] for i in members]
                size = sum(inside) if self.packed else len(inside) * max(inside)
                if size > largest:
                    largest, worst = size, rows
        return worst

    def rows_of(self, step: int) -> list[Row]:
        return [self.rows[i] for i in step_rows(len(self.rows), self.config.rows_per_step, step, self.config.seed)]

    def fall_back_to_eager(self, reason: str) -> None:
        for layer in _decoder_layers(self.model):
            layer.__dict__.pop("forward", None)
        self.optimizer.zero_grad(set_to_none=True)
        self.compiled, self.compiled_reason = False, f"eager: compiling failed ({reason})"
        self.say(events.Note(text=f"compiling failed, training goes on uncompiled: {reason}"))

    def take(self, step: int) -> events.Step:
        """Optimizer step number `step`, counted from 0; returns what is to be said of it. Raises TrainingError."""
        begin = hardware.clock(self.device)
        rows = self.rows_of(step)
        loss, tokens = self.backward(rows, seed=self.config.seed + 1 + step)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.check_finite(step, rows, loss.item(), float(norm))
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = hardware.clock(self.device) - begin
        return events.Step(
            step=step + 1,
            epoch=(step + 1) / self.steps_per_epoch,
            loss=loss.item(),
            learning_rate=rate,
            grad_norm=float(norm) if math.isfinite(norm) else None,
            step_seconds=seconds,
            tokens=tokens,
            supervised_tokens=sum(row.supervised_tokens for row in rows),
            peak_allocated_bytes=self.meter.allocated(),
            peak_reserved_bytes=self.meter.reserved(),
            peak_host_bytes=self.meter.host(),
        )

    def check_finite(self, step: int, rows: Sequence[Row], loss: float, norm: float) -> None:
        """Raises TrainingError before a loss or gradient that is not finite can reach the adapter."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        if math.isfinite(loss) and self.dtype == "fp16":
            self.skipped_in_a_row += 1
            self.say(
                events.Note(text=f"step {step + 1} is skipped: an fp16 gradient overflowed; its loss scale is halved")
            )
            if self.skipped_in_a_row < SKIPPED_STEPS_IN_A_ROW:
                return  # the gradient scaler skips this step and lowers its scale
        what = "the loss" if not math.isfinite(loss) else "the gradient's norm"
        value = loss if not math.isfinite(loss) else norm
        lines = ", ".join(str(row.line) for row in rows)
        raise TrainingError(
            f"step {step + 1}: {what} became {value} (rows of lines {lines}); nothing of it was saved. Lower learning_rate "
            f"(now {self.config.learning_rate:g}), look at those rows, or choose another compute_dtype (now {self.dtype}); "
            "then start again, or resume from the last checkpoint"
        )

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside the adapter. Random numbers are not in it: each step is seeded."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }

    def load_adapter(self, adapter: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, adapter)

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # A run that is continued for more steps goes on where the longer schedule is by now, not where the shorter ended.
        schedule = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, rate, share in schedule:
            group["lr"] = rate * share(self.scheduler.last_epoch)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The longest list of modules of one kind: the decoder's layers in every architecture of transformers."""
    lists = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(layer) for layer in m}) == 1
    ]
    return list(max(lists, key=len, default=[]))
