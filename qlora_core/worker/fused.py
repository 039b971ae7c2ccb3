"""A model's decoder driven layer by layer, without autograd: which models can be, the loss and its gradients, the proof."""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_core.activations import LOGITS_BYTES
from qlora_core.worker import kernels
from qlora_core.worker.batches import Pass, forward_logits
from qlora_core.worker.fused_layer import FusedLayer, Position, groups_of
from qlora_core.worker.host_memory import HostMemory
from qlora_core.worker.projections import Adapters, Projection

# Architectures whose losses and adapters are tested to equal those of transformers.Trainer. Others are built alike, module for
# module, and compute otherwise (other scales, layers without rotation), which rounding could hide from the proof.
PROVEN = {f"{name}ForCausalLM": name for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
# Rounding in bf16 adds up with the layers: 0.05 of the logits' spread were measured in a random model of 32, 0.16 in one of 80.
MOST_APART, APART_LAYERS = 0.1, 32
# Logits are made for a multiple of so many tokens at a time, which tensor cores take at once.
ROWS = 128


def problem_with(model: Any) -> str | None:
    """Why the layers of a transformers model cannot be fused, or None. It may lie on the meta device, or have adapters."""
    if type(model).__name__ not in PROVEN:
        return f"fused ones are proven for {', '.join(PROVEN.values())}, not for {type(model).__name__}"
    base, head = model.model, model.lm_head
    if type(head) is not nn.Linear or head.bias is not None or type(base.embed_tokens) is not nn.Embedding:
        return "its head has a bias, or head or embedding an adapter"
    if getattr(base.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        return "its rotary frequencies follow the longest row of a pass, so rows that share one would change each other"
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if not all(_is_linear(linear) for group in groups_of(layer) for linear in group):
            return "its layers hold other ones than linear ones of 4 or 16 bits, such as int8 ones"
        if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"its activation is {type(mlp.act_fn).__name__}"
        if attention.attention_dropout:
            return "attention has a dropout of its own"
    return None


def _is_linear(module: Any) -> bool:
    base = getattr(module, "base_layer", module)
    return type(base) in (nn.Linear, Linear4bit)


class FusedModel:
    """A PeftModel's decoder, driven layer by layer. `checkpointed_layers` of them compute their activations again in the
    backward pass; with `offloaded`, what those layers keep, their input, lies in host memory meanwhile."""

    def __init__(self, model: Any, *, dropout: float, dtype: torch.dtype, full_length: int = 0) -> None:
        whole = model.get_base_model()
        base = whole.model
        self.embed, self.rotary, self.head = base.embed_tokens, base.rotary_emb, whole.lm_head.weight
        self.norm, self.model = (base.norm.weight.data, base.norm.variance_epsilon), model
        self.checkpointed_layers, self.offloaded, self.full_length = 0, False, full_length
        groups = [
            [module for module in group if isinstance(module, LoraLayer)]
            for layer in base.layers
            for group in groups_of(layer)
        ]
        self.adapters, self.dropout = Adapters([group for group in groups if group], dtype), dropout

        def project(*layers: Any) -> Projection:
            return Projection(layers, self.adapters, dropout=dropout)

        self.layers = [FusedLayer(layer, number, project, whole.config) for number, layer in enumerate(base.layers)]
        projections = [
            projection for layer in self.layers for projection in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ]
        device = self.head.device
        needed = max((p.shape[0] * p.shape[1] for p in projections if not p.is_held), default=0)
        scratch = torch.empty(needed, dtype=dtype, device=device)
        for projection in projections:
            projection.use_scratch(scratch)
        held = [projection for projection in projections if projection.is_held]
        pairs = [pair for p in held for pair in (*p.place_of_a(), *p.places_of_b())]
        self.held_copies = [list(side) for side in zip(*pairs, strict=True)]
        self.room = max(max(layer.o.room, layer.down.room) for layer in self.layers)
        self.host = HostMemory(device) if device.type == "cuda" else None

    def refresh(self) -> None:
        """Take over what was learnt, or loaded, into the tensors that products are made with."""
        self.adapters.refresh()
        if self.held_copies:
            torch._foreach_copy_(*self.held_copies)

    def begin(self, batch: Pass, seed: int | None) -> tuple[torch.Tensor, Position]:
        x = self.embed(batch.input_ids)
        cos, sin = self.rotary(x, position_ids=batch.position_ids)
        rows = kernels.Rows(batch.lengths, x.device, full_length=self.full_length)
        return x[0], Position(rows, cos[0].contiguous(), sin[0].contiguous(), seed if self.dropout else None)

    @torch.no_grad()
    def hidden(self, batch: Pass) -> torch.Tensor:
        """What the head reads, at the columns that predict a supervised token: [len(keep), hidden]."""
        self.refresh()
        x, position = self.begin(batch, None)
        for layer in self.layers:
            x = layer.forward(x, position)[0]
        chosen = x[batch.keep]
        kernels.rms_norm(chosen, *self.norm, out=chosen)
        return chosen

    @torch.no_grad()
    def logits(self, batch: Pass) -> torch.Tensor:
        """[1, len(keep), vocabulary]"""
        return (self.hidden(batch) @ self.head.T)[None]

    @torch.no_grad()
    def loss_sum(self, batch: Pass) -> torch.Tensor:
        """Cross-entropy in fp32, summed over the supervised tokens of the pass."""
        total = torch.zeros((), device=self.head.device)
        for part, targets in self._chunks(self.hidden(batch), batch.targets[0]):
            total += kernels.cross_entropy_(part @ self.head.T, targets, gradient=False).sum()
        return total

    @torch.no_grad()
    def backward(self, batch: Pass, *, supervised: int, seed: int) -> torch.Tensor:
        """Add to the adapters' gradients those of the pass's loss, summed over its tokens and divided by `supervised`; returns
        that loss, in fp32."""
        x, position = self.begin(batch, seed)
        kept: list[Any] = []
        offloaded = self.offloaded and self.host is not None
        if offloaded:
            self.host.begin(x)
        for number, layer in enumerate(self.layers):
            out, saved = layer.forward(x, position)
            if number >= self.checkpointed_layers:
                kept.append(saved)
            elif offloaded:
                kept.append(None)
                self.host.put(number, x)
            else:
                kept.append(x)
            x = out
            del saved, out
        loss, gradient = self._loss_and_gradient(x, batch, supervised)
        del x
        for number in reversed(range(len(self.layers))):
            saved, layer = kept.pop(), self.layers[number]
            if number < self.checkpointed_layers:
                x = self.host.take(number) if offloaded else saved
                saved = layer.forward(x, position, again=True)[1]
                del x
            layer.backward(gradient, saved, position)
            del saved
        return loss

    def _loss_and_gradient(self, x: torch.Tensor, batch: Pass, supervised: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, its gradient for the last layer's output [tokens, hidden + room for x·A^T])"""
        chosen = x[batch.keep]
        normed = torch.empty_like(chosen)
        rstd = kernels.rms_norm(chosen, *self.norm, out=normed)
        losses = []
        for part, targets in self._chunks(normed, batch.targets[0]):
            logits = part @ self.head.T
            losses.append(kernels.cross_entropy_(logits, targets, scale=1 / supervised).sum())
            torch.mm(logits, self.head, out=part)  # from here on the gradient of what it was
            del logits
        gradient = x.new_zeros(len(x), x.shape[1] + self.room)
        of_chosen = torch.zeros_like(chosen)
        kernels.norm_backward_(of_chosen, normed, chosen, self.norm[0], rstd)
        gradient[:, : x.shape[1]].index_copy_(0, batch.keep, of_chosen)
        return torch.stack(losses).sum() / supervised, gradient

    def _chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        size = max(1, LOGITS_BYTES // (self.head.shape[0] * hidden.element_size() * ROWS) * ROWS)
        return zip(hidden.split(size), targets.split(size), strict=True)


@torch.no_grad()
def proof(fused: FusedModel, model: Any, pair: Sequence[Pass], together: Pass) -> tuple[bool, str]:
    """Whether two rows that share a fused pass get the logits that transformers gives each alone, and a sentence that says
    what was seen."""
    was_training = model.training
    model.eval()
    try:
        alone = torch.cat([forward_logits(model, batch) for batch in pair], dim=1)
        found = fused.logits(together)
    finally:
        model.train(was_training)
    apart = ((found.float() - alone.float()).abs().mean() / alone.float().std()).item()
    holds = apart < (1e-4 if alone.dtype == torch.float32 else _most_apart(fused))
    return holds, f"logits differ from transformers' by {apart:.1e} of their spread"


@torch.no_grad()
def try_backward(fused: FusedModel, batch: Pass) -> None:
    """Run the kernels of a backward pass once, on rows of few tokens, so that what does not run here shows before the first
    step. cuDNN's attention is given up where it does not run, or gives other gradients than FlashAttention.

    Raises what the kernels raise, and FloatingPointError for gradients that are not finite.
    """
    full_length, (longest, *_) = fused.full_length, batch.lengths
    try:
        fused.full_length = 0
        packed = _gradients(fused, batch)
        if not packed.isfinite().all():
            raise FloatingPointError("gradients are not finite")
        if len(set(batch.lengths)) == 1 and full_length:
            fused.full_length = longest
            full_length = full_length if _are_close(fused, batch, packed) else 0
    finally:
        fused.full_length = full_length
        fused.adapters.gradients.zero_()


def _are_close(fused: FusedModel, batch: Pass, packed: torch.Tensor) -> bool:
    """Whether attention over full rows runs here, and gives the gradients that packed rows get."""
    try:
        return bool((_gradients(fused, batch) - packed).norm() / packed.norm() < _most_apart(fused))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False


def _most_apart(fused: FusedModel) -> float:
    return MOST_APART * max(1, len(fused.layers) / APART_LAYERS)


def _gradients(fused: FusedModel, batch: Pass) -> torch.Tensor:
    """What one pass gives, flat; none are left behind."""
    fused.refresh()
    fused.backward(batch, supervised=batch.targets.numel(), seed=0)
    found = fused.adapters.gradients.clone()
    fused.adapters.gradients.zero_()
    return found
