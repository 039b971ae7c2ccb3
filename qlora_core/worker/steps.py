"""The step: rows -> gradients -> clipped -> optimizer. Knows the rows and how they are passed, but no file."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.row_order import DRAWN_STEPS, step_rows, steps_per_epoch
from qlora_core.worker import hardware
from qlora_core.worker.batches import Row
from qlora_core.worker.passes import Passes

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
    """The steps of a run: which rows each one reads, the optimizer and its schedule. `passes` makes the gradients."""

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
        self.meter = hardware.MemoryMeter(device)
        self.steps_per_epoch = steps_per_epoch(len(rows), config.rows_per_step)
        self.total_steps = config.max_steps or max(1, round(self.steps_per_epoch * config.num_epochs))
        self.skipped_in_a_row = 0
        self.passes = Passes(model, config, rows, total_steps=self.total_steps, device=device, dtype=dtype, say=say)
        self.accelerator, self.parameters = self.passes.accelerator, self.passes.parameters
        self.optimizer, self.scheduler = self.make_optimizer()

    def make_optimizer(self) -> tuple[Any, Any]:
        config = self.config
        kind, options = (OPTIMIZERS | (UNPAGED if self.device.type == "cpu" else {}))[config.optimizer]
        rate = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.loraplus_lr_ratio is None:
            optimizer = kind(self.parameters, **rate, **options)
        elif self.passes.fused:
            a, b = self.parameters
            groups = [{"params": [a]}, {"params": [b], "lr": config.learning_rate * config.loraplus_lr_ratio}]
            optimizer = kind(groups, **rate, **options)
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

    def warm_up(self) -> None:
        """Run the longest pass that the run contains and allocate the optimizer's state, then undo both.

        What does not fit, or does not compile, shows in the first seconds and not after hours.
        """
        worst = self.longest_step()
        try:
            self.passes.backward(worst, seed=self.config.seed)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self.passes.clear_gradients()
            self.passes.fall_back_to_eager(str(error).splitlines()[0])
            self.passes.backward(worst, seed=self.config.seed)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not optimizer.state:
            # Zero gradients at rate zero change nothing; those of the pass may have overflowed, and 0 x inf is nan.
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.forget_state(optimizer)
        self.passes.clear_gradients()

    @staticmethod
    def forget_state(optimizer: torch.optim.Optimizer) -> None:
        if not getattr(optimizer, "is_paged", False):
            optimizer.state.clear()
            return
        for (
            state
        ) in optimizer.state.values():  # bitsandbytes never frees paged memory; a step of zeros has left zeros in it
            state["step"] = 0

    def longest_step(self) -> list[Row]:
        """The rows of the step with the largest single pass."""
        largest, worst = 0, self.rows_of(0)
        # The first epochs stand for all: later orders are drawn alike.
        for step in range(min(self.total_steps, max(self.steps_per_epoch, DRAWN_STEPS))):
            rows = self.rows_of(step)
            for members in self.passes.plan(rows):
                inside = [len(rows[i].token_ids) for i in members]
                size = sum(inside) if self.passes.packed else len(inside) * max(inside)
                if size > largest:
                    largest, worst = size, rows
        return worst

    def rows_of(self, step: int) -> list[Row]:
        return [
            self.rows[i] for i in step_rows(len(self.rows), self.config.rows_per_step, step, self.config.order_seed)
        ]

    def take(self, step: int) -> events.Step:
        """Optimizer step number `step`, counted from 0; returns what is to be said of it. Raises TrainingError."""
        begin = hardware.clock(self.device)
        rows = self.rows_of(step)
        loss, tokens = self.passes.backward(rows, seed=self.config.seed + 1 + step)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        loss, norm = torch.stack([loss, norm.to(loss.device, loss.dtype)]).tolist()  # waits for the device once
        self.check_finite(step, rows, loss, norm)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        self.passes.clear_gradients()
        seconds = hardware.clock(self.device) - begin
        return events.Step(
            step=step + 1,
            epoch=(step + 1) / self.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm if math.isfinite(norm) else None,
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
            "fused": self.passes.fused is not None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }

    def load_adapter(self, adapter: dict[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, adapter)

    def load_state(self, state: dict[str, Any]) -> None:
        fused = self.passes.fused is not None
        if state["fused"] == fused:
            self.optimizer.load_state_dict(state["optimizer"])
        else:  # its tensors are others: all A in one and all B in another, or each by itself
            before, now = ("transformers'", "fused") if fused else ("fused", "transformers'")
            text = f"the optimizer's averages begin anew: they were saved by {before} layers, and {now} ones train now"
            self.say(events.Note(text=text))
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scheduler._step_count = state["scheduler"]["_step_count"]
        # A run that is continued for more steps goes on where the longer schedule is by now, not where the shorter ended.
        schedule = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, rate, share in schedule:
            group["lr"] = rate * share(self.scheduler.last_epoch)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
