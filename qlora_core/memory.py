"""(Shape, settings, plan of the passes, row lengths) -> peak memory, part by part, in bytes. Loads nothing; knows no torch."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qlora_core import targets
from qlora_core.activations import PassBytes, fused_pass, plain_pass
from qlora_core.config import TrainConfig
from qlora_core.footprint import adapter_bytes, optimizer_bytes, targeted_layers, weight_bytes
from qlora_core.row_order import DRAWN_STEPS, step_rows, steps_per_epoch
from qlora_core.targets import Architecture

MIB, GIB = 1024**2, 1024**3

# Of a GPU: what cuBLAS holds in torch's pool; the driver's context with its kernels, and what the pool cannot fill.
CUBLAS_BYTES = 32 * MIB
CONTEXT_BYTES, FRAGMENTED = 600 * MIB, 0.1
# Of a CPU: the worker with its libraries before a model is loaded; and of what all layers keep, the share that stays with the
# process for good, in oneDNN's scratchpads and the heap (set by 16 measured runs of three shapes, all within 15 %).
LIBRARIES_BYTES, HELD_BACK = 470 * MIB, 0.5
# A pass of at least so many tokens keeps the device busy, (most, least) that are chosen: on a GPU, on a CPU.
PASS_TOKENS = {True: (8192, 2048), False: (1024, 256)}
ALL_TOKENS = 10**12


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the passes of a run use memory. Of the decoder's layers the first ones are recomputed."""

    fused: bool  # decoder layers with our own few, large kernels (GPU, known architecture), else transformers' layers
    token_budget: int  # tokens a pass may hold
    checkpointed_layers: int  # decoder layers whose activations are recomputed, 0 to all
    offloaded: bool  # what recomputed layers keep (their inputs) lies in host memory


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak. On a GPU `total_bytes` is what torch reports as its allocated peak; `context_bytes`, the driver's
    context and what torch's pool cannot fill, comes on top and counts against the card. On a CPU it is all host memory."""

    weights_bytes: int
    quantisation_constants_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # kept from the forward to the backward pass
    working_bytes: int  # of the one layer that runs, or of the libraries' own workspaces
    logits_bytes: int  # and their gradient; 0 where the peak is in a layer
    libraries_bytes: int  # of a CPU's process; 0 on a GPU
    context_bytes: int
    host_bytes: int  # on a GPU: what lies in host memory instead, of paged optimizer states and offloaded activations
    tokens: int  # of the largest pass
    is_gpu: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())

    @property
    def needed_bytes(self) -> int:
        """What must be free on the device."""
        return self.total_bytes + self.context_bytes

    def parts(self) -> dict[str, int]:
        """Parts of `total_bytes` by their names in the field, in the order in which they come to be."""
        return {
            "libraries": self.libraries_bytes,
            "weights": self.weights_bytes,
            "quantisation constants": self.quantisation_constants_bytes,
            "adapters": self.adapters_bytes,
            "optimizer": self.optimizer_bytes,
            "gradients": self.gradients_bytes,
            "activations": self.activations_bytes,
            "working": self.working_bytes,
            "logits": self.logits_bytes,
        }


def estimate(
    shape: Architecture,
    config: TrainConfig,
    plan: Plan,
    *,
    row_lengths: Sequence[int],
    supervised_share: float,
    is_gpu: bool,
    dtype_bytes: int,
) -> MemoryEstimate:
    """Peak of the steps of a run. `row_lengths`: tokens of training rows, a sample or all, cut at max_seq_length already;
    `supervised_share`: of their tokens that are learnt; `dtype_bytes`: of a weight that is not quantised."""
    targeted = targeted_layers(shape, config)
    tokens = largest_pass(config, plan.token_budget, row_lengths)
    sizes = shape, config, targeted, tokens, supervised_share, dtype_bytes
    if plan.fused:
        a_pass = fused_pass(*sizes)
    else:
        longest = max(row_lengths, default=tokens)
        masked = 0 if tokens == longest else tokens if config.packing == "auto" else longest
        a_pass = plain_pass(*sizes, masked=masked, is_gpu=is_gpu)
    # Our layers hold all gradients at once. Autograd's come layer by layer, but are all there in a step's second pass.
    gradients = 4 * targets.trainable_parameters(targeted, config)
    several = largest_pass(config, ALL_TOKENS, row_lengths) > tokens
    held = gradients if plan.fused or several else gradients // max(1, shape.layer_count)
    kept, working, loss = _at_peak(a_pass, plan, shape.layer_count, is_gpu=is_gpu)
    if gradients - held > kept + working + loss:  # the peak is when the optimizer steps, and no pass is under way
        held, kept, working, loss = gradients, 0, 0, 0
    buffers = a_pass.buffers + CUBLAS_BYTES if is_gpu else round(HELD_BACK * shape.layer_count * a_pass.layer)
    weights, constants = weight_bytes(shape, config, dtype_bytes)
    optimizer, paged = optimizer_bytes(targeted, config, is_gpu=is_gpu, fused=plan.fused)
    return MemoryEstimate(
        weights_bytes=weights,
        quantisation_constants_bytes=constants,
        adapters_bytes=adapter_bytes(targeted, config, dtype_bytes, fused=plan.fused) + a_pass.copies,
        gradients_bytes=held,
        optimizer_bytes=optimizer,
        activations_bytes=kept,
        working_bytes=buffers + working,
        logits_bytes=loss,
        libraries_bytes=0 if is_gpu else LIBRARIES_BYTES,
        context_bytes=CONTEXT_BYTES + round(FRAGMENTED * (kept + working + loss)) if is_gpu else 0,
        host_bytes=paged + (plan.checkpointed_layers * a_pass.layer_input if plan.offloaded and is_gpu else 0),
        tokens=tokens,
        is_gpu=is_gpu,
    )


def _at_peak(a_pass: PassBytes, plan: Plan, layers: int, *, is_gpu: bool) -> tuple[int, int, int]:
    """(kept, working, loss): the loss is 0 where the peak is in the backward pass of the last layer, else working is."""
    recomputed = min(plan.checkpointed_layers, layers)
    # On the way to the host and back, three inputs are here at a time.
    inputs = min(3, recomputed) if plan.offloaded and is_gpu else recomputed
    kept = a_pass.around + (layers - recomputed) * a_pass.layer + inputs * a_pass.layer_input
    # The last layer goes back first: where it is recomputed too, all that it keeps comes on top of the inputs.
    working = a_pass.working + (a_pass.layer - a_pass.layer_input if recomputed == layers else 0)
    return (kept, working, 0) if working >= a_pass.loss else (kept, 0, a_pass.loss)


# -- rows


def largest_pass(config: TrainConfig, token_budget: int, row_lengths: Sequence[int]) -> int:
    """Tokens of the largest pass: what the rows of a step fill of the budget, at least the longest row."""
    lengths = tuple(row_lengths) or (config.max_seq_length,) * config.rows_per_step
    longest = max(lengths)
    return max(
        longest, min(token_budget, _largest_step(lengths, config.rows_per_step, config.order_seed, config.packing))
    )


@lru_cache(maxsize=8)
def _largest_step(lengths: tuple[int, ...], rows_per_step: int, seed: int, packing: str) -> int:
    """Tokens of the largest of the steps that are drawn, in the worker's own order where these are all its rows."""
    if len(lengths) < rows_per_step:
        return max(lengths) * rows_per_step if packing == "off" else sum(lengths)
    per_epoch, largest = steps_per_epoch(len(lengths), rows_per_step), 0
    for step in range(-(-DRAWN_STEPS // per_epoch) * per_epoch):
        rows = [lengths[i] for i in step_rows(len(lengths), rows_per_step, step, seed)]
        largest = max(largest, max(rows) * len(rows) if packing == "off" else sum(rows))
    return largest


# -- the plan


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The fastest plan that fits, or the one that needs least where none does; `reason` is a sentence."""

    plan: Plan
    estimate: MemoryEstimate
    reason: str
    fits: bool


def choose_plan(
    shape: Architecture,
    config: TrainConfig,
    *,
    row_lengths: Sequence[int],
    supervised_share: float,
    is_gpu: bool,
    dtype_bytes: int,
    usable_bytes: int,
    can_fuse: bool,
    host_bytes: int | None = None,
) -> Planned:
    """The fastest plan that needs at most `usable_bytes`, or the config's own budget where that is lower, and of a GPU's host
    at most `host_bytes` where they are known. What the config sets itself is kept. Context and fragmentation are among what
    must fit."""
    lengths = tuple(row_lengths) or (config.max_seq_length,) * config.rows_per_step
    known = {"row_lengths": lengths, "supervised_share": supervised_share, "is_gpu": is_gpu, "dtype_bytes": dtype_bytes}
    if config.memory_budget_gib is not None:
        usable_bytes = min(usable_bytes, round(config.memory_budget_gib * GIB))
    fused = can_fuse and is_gpu and config.fused_layers == "auto"

    def needed(plan: Plan) -> int:
        return estimate(shape, config, plan, **known).needed_bytes

    def fits_host(plan: Plan) -> bool:
        return host_bytes is None or estimate(shape, config, plan, **known).host_bytes <= host_bytes

    every = list(_plans(shape, config, max(lengths), is_gpu=is_gpu, fused=fused))
    plans = [plan for plan in every if fits_host(plan)]
    found = next((plan for plan in plans if needed(plan) <= usable_bytes), None)
    if found is None:
        plan = min(plans or every, key=needed)
        least = estimate(shape, config, plan, **known)
        reason = _remedies(config, least, usable_bytes) if plans else _remedy_of_host(least, host_bytes)
        return Planned(plan=plan, estimate=least, reason=reason, fits=False)
    if config.activation_checkpointing == "auto" and found.checkpointed_layers and not found.offloaded:
        counts = range(1, found.checkpointed_layers + 1)  # all of them fit: as few as do
        some = bisect_left(counts, True, key=lambda n: needed(replace(found, checkpointed_layers=n)) <= usable_bytes)
        found = replace(found, checkpointed_layers=counts[some])
    reason = _reason(found, shape)
    return Planned(plan=found, estimate=estimate(shape, config, found, **known), reason=reason, fits=True)


def _plans(shape: Architecture, config: TrainConfig, longest: int, *, is_gpu: bool, fused: bool) -> Iterator[Plan]:
    """Fastest first, all layers recomputed or none. Smaller passes cost little, recomputing a third, host memory more."""
    most, least = PASS_TOKENS[is_gpu]
    if config.token_budget is not None:
        budgets = [config.token_budget]
    else:
        budgets = [most]
        while budgets[-1] > max(longest, least):
            budgets.append(max(longest, least, budgets[-1] // 2))
    layers, asked = shape.layer_count, config.activation_checkpointing
    first = {"none": 0, "auto": 0}.get(asked, layers)
    offload = is_gpu and asked in ("auto", "offloaded")

    def plan(budget: int, layers: int, offloaded: bool) -> Plan:
        return Plan(fused=fused, token_budget=budget, checkpointed_layers=layers, offloaded=offloaded)

    for budget in budgets:
        yield plan(budget, first, asked == "offloaded")
    if asked == "auto":
        yield plan(budgets[-1], layers, False)
    if offload:
        yield plan(budgets[-1], layers, True)
    while config.token_budget is None and budgets[-1] > longest:
        budgets.append(max(longest, budgets[-1] // 2))
        yield plan(budgets[-1], layers if asked == "auto" else first, offload)


def _reason(plan: Plan, shape: Architecture) -> str:
    passes = f"passes of up to {plan.token_budget:,} tokens"
    count, layers = plan.checkpointed_layers, shape.layer_count
    if not count:
        return f"{passes}, nothing is recomputed"
    which = "all layers are recomputed" if count >= layers else f"{count} of {layers} layers are recomputed"
    return f"{passes}, {which}" + (", with their inputs in host memory" if plan.offloaded else "")


def _remedy_of_host(needed: MemoryEstimate, host_bytes: int) -> str:
    return (
        f"does not fit: {needed.host_bytes / GIB:.1f} GiB of host memory for offloaded activations and paged states, "
        f"{host_bytes / GIB:.1f} are free; what would help: no offloading, an optimizer that is not paged, shorter rows"
    )


def _remedies(config: TrainConfig, needed: MemoryEstimate, usable_bytes: int) -> str:
    """What would make it fit, the largest gain first."""
    options = []
    if config.method != "qlora":
        options.append("QLoRA, which holds the base in 4 bits")
    if config.rank > 8:
        options.append(f"a lower rank than {config.rank}")
    if config.optimizer == "adamw_torch_fused":
        options.append("an 8-bit or paged optimizer")
    if config.activation_checkpointing == "none":
        options.append("recomputed activations")
    options.append("shorter rows")
    options.append("a smaller base model")
    gib = f"{needed.needed_bytes / GIB:.1f} GiB at the least, {usable_bytes / GIB:.1f} may be used"
    return f"does not fit: {gib}; what would help: {', '.join(options)}"
