"""Rows -> loss and gradients: which layers run, in how many passes, and what gives way when memory is short."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from qlora_core import devices, events, memory
from qlora_core.config import TrainConfig, replace
from qlora_core.errors import TrainingError
from qlora_core.worker import fused, hardware, loading
from qlora_core.worker.architecture import shape_of
from qlora_core.worker.batches import Pass, Row, loss_sum, make_pass, packing_proof, plan_passes, proof_pair

# Compiling the layers costs about a minute, an eager step of a large model about half a second more than a compiled one.
COMPILE_FROM_STEPS = 300
# Where fused layers are used. On a CPU they compute the same, and no faster.
FUSED_DEVICES = ("cuda",)
MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
PROOF_TOKENS = 64


class Passes:
    """A model with its adapter, and the path that its rows take: fused layers or transformers' own, packed or padded, compiled
    or not, in passes of how many tokens, with which activations recomputed. Each with the reason, for the person to read."""

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        rows: Sequence[Row],
        *,
        total_steps: int,
        device: torch.device,
        dtype: str,
        say: Callable[[events.Event], None],
    ) -> None:
        self.model, self.config, self.device, self.dtype, self.say = model, config, device, dtype, say
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=MIXED[dtype])
        self.lengths_in_pass: tuple[int, ...] = ()
        self.fused, self.fused_reason = self.fuse(rows)
        self.packed, self.packed_reason = self.prove_packing(rows)
        self.plan_memory(rows)
        self.compiled, self.compiled_reason = self.compile_layers(total_steps)
        if config.neftune_noise_alpha:
            model.get_input_embeddings().register_forward_hook(self.add_noise)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learnt. Of fused layers, all A as one tensor and all B as another."""
        return self.fused.adapters.flat if self.fused else loading.trainable_parameters(self.model)

    # -- the path

    def fuse(self, rows: Sequence[Row]) -> tuple[fused.FusedModel | None, str]:
        """The decoder driven layer by layer, where it is proven to compute what transformers computes."""
        problem = self.why_not_fused()
        if problem:
            return None, f"transformers' layers: {problem}"
        try:
            built = fused.FusedModel(
                self.model,
                dropout=self.config.lora_dropout,
                dtype=hardware.DTYPES[self.dtype],
                full_length=self.config.max_seq_length,
            )
        except torch.OutOfMemoryError:
            return None, "transformers' layers: there is no memory for the buffers of fused ones"
        proof = None
        for longest in (self.config.max_seq_length, PROOF_TOKENS):  # shorter rows where memory is short
            proof = proof or self.prove_fused(built, rows, longest=longest)
        holds, seen = proof or (False, "there is no memory to prove fused ones")
        if holds:
            return built, f"fused: {len(built.layers)} decoder layers; {seen}"
        for parameter in loading.trainable_parameters(self.model):
            parameter.grad = None
        return None, f"transformers' layers: {seen}"

    def prove_fused(self, built: fused.FusedModel, rows: Sequence[Row], *, longest: int) -> tuple[bool, str] | None:
        """Whether fused layers compute what transformers' do, and a sentence; None where memory is short."""
        pair = proof_pair(rows, compared=PROOF_TOKENS, longest=longest)
        few = proof_pair(rows, compared=PROOF_TOKENS, longest=min(PROOF_TOKENS, *(len(row.token_ids) for row in pair)))
        alone = [make_pass([row], packed=True, device=self.device) for row in pair]
        try:
            with self.accelerator.autocast():
                holds, seen = fused.proof(built, self.model, alone, make_pass(pair, packed=True, device=self.device))
            if holds:
                fused.try_backward(built, make_pass(few, packed=True, device=self.device))
            return holds, seen
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # whatever Triton, its C compiler or a driver raise: transformers' layers need none
            said = str(error).strip().splitlines() or [""]
            return False, f"fused ones do not run here ({type(error).__name__}: {said[-1]})"

    def why_not_fused(self) -> str | None:
        config = self.config
        if self.device.type not in FUSED_DEVICES:
            return "on a CPU, fused ones are no faster"
        if config.fused_layers == "off":
            return "fused_layers is off"
        if config.packing == "off":
            return "fused ones always pack, and packing is off"
        if config.use_dora:
            return "fused ones know no DoRA"
        if self.device.type == "cuda" and self.dtype != "bf16":
            return f"fused ones compute in bf16, this run in {self.dtype}"
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] < 8:
            return "this GPU is older than FlashAttention needs (compute capability 8.0)"
        if self.device.type == "cuda" and devices.c_compiler() is None:
            return "there is no C compiler here (install gcc), which Triton needs"
        return fused.problem_with(self.model.get_base_model())

    def plan_memory(self, rows: Sequence[Row]) -> None:
        """The fastest plan that fits the memory there is, or the budget that was set."""
        tokens = sum(len(row.token_ids) for row in rows)
        on_gpu = self.device.type == "cuda"
        planned = memory.choose_plan(
            shape_of(self.model.get_base_model()),
            self.as_the_model_can(),
            row_lengths=[len(row.token_ids) for row in rows],
            supervised_share=sum(row.supervised_tokens for row in rows) / tokens,
            is_gpu=on_gpu,
            dtype_bytes=hardware.DTYPES[self.dtype].itemsize,
            usable_bytes=hardware.usable_bytes(self.device),
            host_bytes=devices.host_memory().available_bytes if on_gpu else None,
            can_fuse=self.fused is not None,
        )
        self.token_budget, self.memory_reason = planned.plan.token_budget, planned.reason
        if self.config.activation_checkpointing in ("full", "offloaded") and not self.can_recompute:
            self.memory_reason += "; this architecture cannot recompute activations"
        self.estimated_peak_bytes, self.estimated_parts = planned.estimate.total_bytes, planned.estimate.parts()
        self.checkpointed_layers, self.offloaded = 0, False
        self.keep_activations(planned.plan.checkpointed_layers, offloaded=planned.plan.offloaded)

    @property
    def can_recompute(self) -> bool:
        return self.fused is not None or self.model.get_base_model().supports_gradient_checkpointing

    def as_the_model_can(self) -> TrainConfig:
        """The settings that memory is planned by: what was asked for, as far as the model can do it."""
        config = self.config if self.packed else replace(self.config, packing="off")
        return config if self.can_recompute else replace(config, activation_checkpointing="none")

    def keep_activations(self, checkpointed_layers: int, *, offloaded: bool) -> None:
        """Recompute the activations of the first layers; `offloaded`, with their inputs in host memory."""
        self.checkpointed_layers, self.offloaded = checkpointed_layers, offloaded
        if self.fused:
            self.fused.checkpointed_layers, self.fused.offloaded = checkpointed_layers, offloaded
        elif checkpointed_layers:
            to_host = offloaded and self.device.type == "cuda"
            self.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, offload=to_host)
            for number, layer in enumerate(_decoder_layers(self.model)):
                layer.gradient_checkpointing = number < checkpointed_layers

    def prove_packing(self, rows: Sequence[Row]) -> tuple[bool, str]:
        if self.fused:
            return True, "packed: attention of fused layers ends with each row"
        if self.config.packing == "off":
            return False, "padded: packing is off"
        try:
            with self.accelerator.autocast():
                return packing_proof(self.model, rows, device=self.device)
        except torch.OutOfMemoryError:
            return False, "padded: there is no memory to prove packing"

    def compile_layers(self, total_steps: int) -> tuple[bool, str]:
        """Compile each decoder layer, with a dynamic length, where that pays and can be done."""
        wanted = self.config.compile
        if self.fused:
            return False, "eager: fused layers have nothing to compile"
        if wanted == "off":
            return False, "eager: compile is off"
        if wanted == "auto" and self.device.type == "cpu":
            return False, "eager: on a CPU compiling takes longer than most runs win back"
        if wanted == "auto" and total_steps < COMPILE_FROM_STEPS:
            return False, f"eager: {total_steps} steps are too few to win back a minute of compiling"
        if devices.c_compiler() is None:
            return False, "eager: there is no C compiler here (install gcc) to compile with"
        layers = _decoder_layers(self.model)
        if not layers:
            return False, "eager: no list of decoder layers was found in this architecture"
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        return True, f"compiled: {len(layers)} decoder layers"

    def fall_back_to_eager(self, reason: str) -> None:
        for layer in _decoder_layers(self.model):
            layer.__dict__.pop("forward", None)
        self.compiled, self.compiled_reason = False, f"eager: compiling failed ({reason})"
        self.say(events.Note(text=f"compiling failed, training goes on uncompiled: {reason}"))

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

    # -- the work

    def plan(self, rows: Sequence[Row]) -> list[list[int]]:
        """Which rows share a pass."""
        return plan_passes([len(row.token_ids) for row in rows], self.token_budget, packed=self.packed)

    def made_of(self, rows: Sequence[Row]) -> list[Pass]:
        plan = self.plan(rows)
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
                if self.fused:
                    self.fused.refresh()
                total, tokens = torch.zeros((), device=self.device), 0
                for number, batch in enumerate(self.made_of(rows)):
                    self.lengths_in_pass = batch.lengths
                    if self.fused:
                        loss = self.fused.backward(batch, supervised=supervised, seed=seed + 65_537 * number)
                    else:
                        with self.accelerator.autocast():
                            loss = loss_sum(self.model, batch) / supervised
                        self.accelerator.backward(loss)
                    total += loss.detach()
                    tokens += batch.tokens
                return total, tokens
            except torch.OutOfMemoryError:
                shortage = True
            if shortage:  # outside `except`, whose traceback would keep the tensors of the failed pass alive
                self.clear_gradients()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.use_less_memory(rows)

    def clear_gradients(self) -> None:
        if self.fused:
            self.fused.adapters.gradients.zero_()
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def loss_of(self, batch: Pass) -> torch.Tensor:
        """The summed loss of a pass, without gradients."""
        return self.fused.loss_sum(batch) if self.fused else loss_sum(self.model, batch)

    def use_less_memory(self, rows: Sequence[Row]) -> None:
        """Half the tokens a pass, then more and more layers recomputed, then host memory. Raises TrainingError at the end."""
        longest = max(rows, key=lambda row: len(row.token_ids))
        length, layers = len(longest.token_ids), max(1, len(_decoder_layers(self.model)))
        if self.token_budget > length:
            self.token_budget = max(length, min(self.token_budget, sum(len(r.token_ids) for r in rows)) // 2)
            text = f"out of memory: passes of at most {self.token_budget} tokens from here on"
        elif self.can_recompute and self.checkpointed_layers < layers:
            more = min(layers, self.checkpointed_layers + max(1, layers // 4))
            self.keep_activations(more, offloaded=False)
            which = "all activations" if more == layers else f"the activations of {more} of {layers} layers"
            text = f"out of memory with one row a pass: {which} are recomputed from here on"
        elif self.can_recompute and not self.offloaded and self.device.type == "cuda":
            self.keep_activations(self.checkpointed_layers, offloaded=True)
            text = "out of memory with one row a pass: what is kept of the layers lies in host memory from here on"
        else:
            raise TrainingError(
                f"out of memory with one row a pass{' and activations recomputed' if self.can_recompute else ''}: the longest "
                f"row, line {longest.line}, has {length} tokens; {self.remedies()}"
            )
        self.memory_reason = f"{self.memory_reason}; {text}"
        self.say(events.Note(text=text))

    def remedies(self) -> str:
        options = ["lower max_seq_length"]
        if self.config.memory_budget_gib is not None:
            options.append("raise memory_budget_gib")
        if self.config.method != "qlora":
            options.append("choose qlora")
        return ", ".join([*options, "choose a lower rank or a smaller base model"])


def _decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The longest list of modules of one kind: the decoder's layers in every architecture of transformers."""
    lists = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(layer) for layer in m}) == 1
    ]
    return list(max(lists, key=len, default=[]))
