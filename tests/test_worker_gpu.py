"""The worker on a real GPU: what it measures there, out of memory for real, fp16, compiled and fused layers, Triton kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from test_worker_fused import (
    FAMILY,
    by_autograd,
    by_hand,
    distance,
    four_bit_weights,
    fused_model,
    made_folder,
    model_with_adapter,
    numbers,
    own_folder,
    rows_of_lengths,
)
from test_worker_variants import VARIANTS, loss_when_loaded, narrow
from tiny_models import StopAfter, adapter, eval_losses, losses, make_run, model_folder, said, train_here

from qlora_core import devices, events, memory
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run
from qlora_core.worker import kernels
from qlora_core.worker.packed import Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
STEPS = {"max_steps": 6, "eval_steps": 3, "device": "cuda", "compute_dtype": "bf16"}
# bf16 keeps 8 bits; losses of about 7 that took other kernels differ by up to 0.02.
BF16_BOUND = 0.05


def long_rows(count: int, words: int) -> list[dict[str, str]]:
    return [{"instruction": f"Count to {n}.", "input": "", "output": "tick tock " * words} for n in range(count)]


def trained(folder: Path, **config: Any) -> Run:
    folder.mkdir(exist_ok=True)
    torch.cuda.empty_cache()
    return train_here(make_run(folder, **(STEPS | config)))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gpu_memory_is_measured_and_every_path_gets_the_same_losses(method: str, tmp_path: Path) -> None:
    runs = {
        name: trained(tmp_path / name, method=method, **config)
        for name, config in {
            "packed": {},
            "transformers' layers": {"fused_layers": "off"},
            "padded": {"packing": "off"},
            "one row a pass": {"token_budget": 8},
            "checkpointing": {"activation_checkpointing": "full"},
            "offloaded": {"activation_checkpointing": "offloaded", "token_budget": 200},
        }.items()
    }
    for name, run in runs.items():
        started = said(run, events.Started)[0]
        assert started.fused == (name not in ("padded", "transformers' layers")), started.fused_reason
        assert run.status().state == FINISHED
        assert losses(run) == pytest.approx(losses(runs["packed"]), abs=BF16_BOUND)
        step = said(run, events.Step)[-1]
        assert 0 < step.peak_allocated_bytes <= step.peak_reserved_bytes
        assert "NVIDIA" in run.result()["run_info"]["device"]


def test_fp16_trains_with_a_scaled_loss(tmp_path: Path) -> None:
    run = trained(tmp_path, method="qlora", compute_dtype="fp16")
    assert eval_losses(run)[6] < eval_losses(run)[0]


def test_compiled_layers_get_the_losses_of_eager_ones(tmp_path: Path) -> None:
    compiled, eager = (trained(tmp_path / compile, compile=compile, fused_layers="off") for compile in ("on", "off"))
    assert said(compiled, events.Started)[0].compiled
    assert losses(compiled) == pytest.approx(losses(eager), abs=BF16_BOUND)


@pytest.mark.parametrize("layers", ["auto", "off"])
def test_out_of_memory_makes_smaller_passes_and_the_same_losses(layers: str, tmp_path: Path) -> None:
    """Activations are most of the memory here, and all rows fit a pass; then three quarters are allowed of what that took."""
    rows, words = {"auto": (32, 200), "off": (8, 100)}[layers]  # transformers' mask grows with the square of a pass
    config = {
        "train_rows": long_rows(rows, words),
        "max_seq_length": 2048,
        "rows_per_step": rows,
        "fused_layers": layers,
    }
    config |= {"token_budget": 100_000, "activation_checkpointing": "none"}
    free = trained(tmp_path / "free", **config)
    assert said(free, events.Started)[0].fused == (layers == "auto")
    peak = said(free, events.Step)[-1].peak_reserved_bytes
    budget = (0.75 * peak + memory.CONTEXT_BYTES) / devices.GIB
    try:
        tight = trained(tmp_path / "tight", memory_budget_gib=budget, **config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory" in note.text for note in said(tight, events.Note))
    assert losses(tight) == pytest.approx(losses(free), abs=BF16_BOUND)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_and_resumes_on_a_gpu(variant: str, tmp_path: Path) -> None:
    """Ranks high enough that 8-bit states are in 8 bits and large enough to be paged; sums on a GPU may differ in their order."""
    config = (
        {"rank": 64, "lora_alpha": 32, "save_steps": 2, "compute_dtype": "fp32"}
        | VARIANTS[variant]
        | narrow(VARIANTS[variant])
    )
    whole = trained(tmp_path / "whole", **config)
    found = eval_losses(whole)
    assert found[6] < found[0] - 0.05
    (tmp_path / "stopped").mkdir()
    stopped = train_here(make_run(tmp_path / "stopped", **(STEPS | config)), StopAfter(3))
    train_here(stopped)
    assert losses(stopped) == pytest.approx(losses(whole), abs=1e-3)
    for name, tensor in adapter(whole).items():
        torch.testing.assert_close(adapter(stopped)[name], tensor, atol=2e-2, rtol=0)


# -- fused layers


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_fused_layers_get_the_losses_of_transformers_layers(architecture: str, method: str, tmp_path: Path) -> None:
    values = {"method": method, "base_model": str(model_folder(architecture)), "learning_rate": 1e-3}
    run, plain = (trained(tmp_path / layers, fused_layers=layers, **values) for layers in ("auto", "off"))
    assert said(run, events.Started)[0].fused and not said(plain, events.Started)[0].fused
    assert losses(run) == pytest.approx(losses(plain), abs=BF16_BOUND)
    assert eval_losses(run) == pytest.approx(eval_losses(plain), abs=BF16_BOUND)
    assert loss_when_loaded(run) == pytest.approx(eval_losses(run)[6], abs=BF16_BOUND)


def test_fp32_on_a_gpu_is_left_to_transformers_layers(tmp_path: Path) -> None:
    reason = said(trained(tmp_path, compute_dtype="fp32"), events.Started)[0].fused_reason
    assert reason == "transformers' layers: fused ones compute in bf16, this run in fp32"


# No width is a power of two, and the rank is no multiple of 8.
WIDE = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "head_dim": 80, "num_hidden_layers": 3}


def gpu_model(folder: Path, *, dtype: str, **config: Any) -> Any:
    return model_with_adapter(folder=folder, device=GPU, dtype=dtype, **({"rank": 5} | config))


def all_of(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("full_rows", [True, False], ids=["full rows", "rows of many lengths"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_fused_gradients_are_as_near_to_fp32_as_those_of_autograd(
    architecture: str, method: str, full_rows: bool, tmp_path: Path
) -> None:
    """Full rows take another attention kernel, except in Mistral, which has a window."""
    folder = own_folder(tmp_path, architecture, **WIDE | ({"sliding_window": 50} if architecture == "mistral" else {}))
    rows = rows_of_lengths([128] * 4 if full_rows else [200, 7, 90, 33])
    expected_loss, expected = by_autograd(gpu_model(folder, dtype="fp32", method=method), rows)
    model = gpu_model(folder, dtype="bf16", method=method)
    with torch.autocast("cuda", torch.bfloat16):
        plain_loss, plain = by_autograd(model, rows)
    loss, found = by_hand(fused_model(model, dtype=torch.bfloat16, full_length=128), rows)
    assert abs(loss - expected_loss) < max(1.5 * abs(plain_loss - expected_loss), 5e-3)
    apart, plain_apart = (distance(all_of(one), all_of(expected)) for one in (found, plain))
    assert apart < max(1.5 * plain_apart, 5e-3) and apart < 0.05
    for name in expected:
        assert distance(found[name], expected[name]) < max(2 * distance(plain[name], expected[name]), 0.02), name


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), ("v_proj",)])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_recomputed_and_offloaded_layers_get_the_gradients_of_kept_ones(
    method: str, targets: Any, tmp_path: Path
) -> None:
    """Passes that grow and shrink, so that host memory is used again and replaced. FlashAttention adds up in any order."""
    folder = own_folder(tmp_path, "llama", **WIDE | {"num_hidden_layers": 7})
    model = gpu_model(folder, dtype="bf16", method=method, target_modules=targets)
    made = fused_model(model, dtype=torch.bfloat16, dropout=0.1)
    for lengths in ([40, 20], [500, 300, 7], [60]):
        rows = rows_of_lengths(lengths)
        made.checkpointed_layers, made.offloaded = 0, False
        loss, kept = by_hand(made, rows, seed=3)
        for layers, offloaded in ((1, False), (7, False), (1, True), (4, True), (7, True), (7, True)):
            made.checkpointed_layers, made.offloaded = layers, offloaded
            again_loss, again = by_hand(made, rows, seed=3)
            assert again_loss == pytest.approx(loss, abs=1e-6)
            assert distance(all_of(again), all_of(kept)) < 1e-2, (lengths, layers, offloaded)


def test_offloaded_layers_leave_their_inputs_memory_to_others(tmp_path: Path) -> None:
    """Of 24 layers that keep 16 MiB each, three or so are on the GPU at once."""
    folder = own_folder(tmp_path, "llama", **WIDE | {"num_hidden_layers": 24})
    made = fused_model(gpu_model(folder, dtype="bf16"), dtype=torch.bfloat16)
    rows, peaks = rows_of_lengths([2048] * 20), {}
    made.checkpointed_layers = 24
    for made.offloaded in (False, True, False, True):  # what only the first run allocates counts in neither
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        by_hand(made, rows)
        peaks[made.offloaded] = torch.cuda.max_memory_allocated()
    kept = 24 * sum(len(row.token_ids) for row in rows) * WIDE["hidden_size"] * 2
    assert peaks[False] - peaks[True] > 0.6 * kept


RESUMED = {
    "LoRA": {},
    "QLoRA with dropout": {"method": "qlora", "lora_dropout": 0.1},
    "offloaded": {"activation_checkpointing": "offloaded"},
    **{name: VARIANTS[name] for name in ("LoRA+", "NEFTune", "8-bit AdamW", "paged 8-bit AdamW", "paged 32-bit AdamW")},
}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_variant_with_fused_layers_learns_and_resumes_on_a_gpu(variant: str, tmp_path: Path) -> None:
    config = {"rank": 64, "lora_alpha": 32, "save_steps": 2, **RESUMED[variant]}
    whole = trained(tmp_path / "whole", **config)
    found = eval_losses(whole)
    assert said(whole, events.Started)[0].fused
    assert found[6] < found[0] - 0.05
    stopped = train_here(make_run(made_folder(tmp_path / "stopped"), **(STEPS | config)), StopAfter(3))
    train_here(stopped)
    assert said(stopped, events.Resumed)[0].from_step == 3
    assert losses(stopped) == pytest.approx(losses(whole), abs=BF16_BOUND)
    assert eval_losses(stopped)[3] == pytest.approx(found[3], abs=BF16_BOUND)


# -- Triton kernels against plain torch on the CPU, in fp32 on the same numbers of bf16

ROUNDING = 4e-3  # of bf16, relative to a tensor's norm: half a unit in the last of 8 bits


def both(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random numbers of bf16 on the GPU, and in fp32 on the CPU."""
    on_gpu = (numbers(*shape, seed=seed) * scale).bfloat16().cuda()
    return on_gpu, on_gpu.float().cpu()


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float = ROUNDING) -> None:
    assert found.shape == expected.shape and found.isfinite().all()
    assert distance(found.cpu(), expected) < bound


WIDTHS = [8, 576, 1000, 1027, 5003]


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_kernels(width: int) -> None:
    """Rows lie apart, as where the projection leaves room beside its outputs; what lies between stays as it was."""
    pairs = [(wide, wide[:, : 2 * width]) for wide in both(37, 2 * width + 24)]
    outs, gradients = both(37, width + 8, seed=1), both(37, width, seed=2)
    untouched = [wide[:, 2 * width :].clone() for wide, _ in pairs], [out[:, width:].clone() for out in outs]
    for (_, gate_up), out, activated in zip(pairs, outs, gradients, strict=True):
        kernels.swiglu(gate_up, out[:, :width])
        kernels.swiglu_backward_(gate_up, activated)
    assert_near(outs[0][:, :width], outs[1][:, :width])
    assert_near(pairs[0][1], pairs[1][1])
    assert_near(*gradients)
    assert torch.equal(pairs[0][0][:, 2 * width :], untouched[0][0])
    assert torch.equal(outs[0][:, width:], untouched[1][0])


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("head_width", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [1, 6, 9])
def test_rotation_kernel(heads: int, head_width: int, backward: bool) -> None:
    angles = numbers(37, head_width // 2) * 9
    cos, sin = (torch.cat([table] * 2, dim=1).bfloat16() for table in (angles.cos(), angles.sin()))
    sources = both(37, heads * head_width + 40)
    for in_place in (False, True):
        targets = sources if in_place else both(37, heads * head_width + 16, seed=1)
        beside = targets[0][:, heads * head_width :].clone()
        tables = ((cos.cuda(), sin.cuda()), (cos.float(), sin.float()))
        for source, target, table in zip(sources, targets, tables, strict=True):
            kernels.rotate(source, target, *table, heads=heads, backward=backward)
        assert_near(targets[0][:, : heads * head_width], targets[1][:, : heads * head_width])
        assert torch.equal(targets[0][:, heads * head_width :], beside)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_kernels(width: int, added: bool) -> None:
    xs, more, outs = both(37, width), both(37, width, seed=1), both(37, width + 8, seed=2)
    weights, of_normed, gradients = both(width, seed=3), both(37, width, seed=4), both(37, width + 8, seed=5)
    beside = outs[0][:, width:].clone(), gradients[0][:, width:].clone()
    rstds = []
    for x, extra, out, weight, normed, gradient in zip(xs, more, outs, weights, of_normed, gradients, strict=True):
        rstds.append(kernels.rms_norm(x, weight, 1e-2, out=out[:, :width], added=extra if added else None))
        kernels.norm_backward_(gradient[:, :width], normed, x, weight, rstds[-1])
    assert_near(*xs)
    assert_near(outs[0][:, :width], outs[1][:, :width])
    assert_near(*rstds, bound=1e-3)
    assert_near(gradients[0][:, :width], gradients[1][:, :width])
    assert torch.equal(outs[0][:, width:], beside[0]) and torch.equal(gradients[0][:, width:], beside[1])


@pytest.mark.parametrize("nested", [True, False], ids=["double quant", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [((40,), 64), ((24, 8, 16), 192), ((96, 32, 32), 4160), ((320, 320), 1088)]
)
def test_4_bit_weights_are_unpacked_to_the_bits_of_bitsandbytes(
    outputs: tuple[int, ...], inputs: int, kind: str, nested: bool
) -> None:
    """Layers of less than 256 blocks and of more, and scales that are shared by blocks of two rows."""
    weights = four_bit_weights(
        kind=kind, nested=nested, outputs=outputs, inputs=inputs, device="cuda", dtype=torch.bfloat16
    )
    expected = torch.cat([dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    joined, rank = Packed(weights), 3
    assert expected.dtype == torch.bfloat16
    again = torch.cat([dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    assert torch.equal(again, expected), "as the layers themselves go on reading"
    room = -(-len(outputs) * rank // 8) * 8
    bs = both(sum(outputs), rank, seed=9)
    found, beside = torch.full((sum(outputs), inputs + room), 9.0).bfloat16().cuda(), torch.zeros(sum(outputs), room)
    kernels.dequantize(joined, found, bs[0])
    first = 0
    for number, size in enumerate(outputs):
        beside[first : first + size, number * rank : (number + 1) * rank] = bs[1][first : first + size]
        first += size
    assert torch.equal(found[:, :inputs], expected)
    assert torch.equal(found[:, inputs:].float().cpu(), beside)
    narrow_one = torch.full((sum(outputs), inputs), 9.0).bfloat16().cuda()
    kernels.dequantize(joined, narrow_one, None)
    assert torch.equal(narrow_one, expected)


@pytest.mark.parametrize("vocabulary", [50, 8192, 8193, 32003, 151_936])
def test_cross_entropy_kernel(vocabulary: int) -> None:
    """Of large logits and small; the first and the last token are aimed at too."""
    logits = both(33, vocabulary, scale=8.0)
    logits[0][5], logits[1][5] = logits[0][5] / 100, logits[1][5] / 100
    logits = logits[0], logits[0].float().cpu()
    targets = torch.randint(0, vocabulary, (33,), generator=torch.Generator().manual_seed(1))
    targets[0], targets[1] = 0, vocabulary - 1
    untouched = logits[0].clone()
    expected = kernels.cross_entropy_(logits[1], targets, gradient=False)
    found = kernels.cross_entropy_(logits[0], targets.cuda(), gradient=False)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(logits[0], untouched)
    found = kernels.cross_entropy_(logits[0], targets.cuda(), scale=1 / 37)
    kernels.cross_entropy_(logits[1], targets, scale=1 / 37)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
    for row in range(33):
        assert_near(logits[0][row], logits[1][row])


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("width", [10, 1000, 1027, 4096])
def test_dropout_kernel(width: int, share: float) -> None:
    rows = 400_000 // width
    ones = torch.ones(rows, width + 8, dtype=torch.bfloat16, device=GPU)[:, :width]  # rows lie apart
    kept = kernels.dropout(ones, share, 5) != 0
    assert kept.float().mean().item() == pytest.approx(1 - share, abs=0.005)
    by_column, by_row = kept.float().mean(dim=0), kept.float().mean(dim=1)
    assert (by_column - 1 + share).abs().max() < 6 * (share * (1 - share) / rows) ** 0.5
    assert width < 100 or (by_row - 1 + share).abs().max() < 6 * (share * (1 - share) / width) ** 0.5
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(4, 1), kernels.dropout(ones, share, 6) != 0):
        alike = (shifted == kept).float().mean().item()
        assert alike == pytest.approx(share**2 + (1 - share) ** 2, abs=0.01), (
            "neighbours and seeds know nothing of each other"
        )
    x, begun = (numbers(rows, width, seed=seed).bfloat16().cuda() for seed in (1, 2))
    expected = torch.where(kept, x.float() / (1 - share), 0.0)
    assert_near(kernels.dropout(x, share, 5), expected.cpu())
    onto = begun.clone()
    assert kernels.dropout(x, share, 5, onto=onto) is onto
    assert_near(onto, (begun.float() + expected).cpu())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_width", [64, 80, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_kernels(heads: tuple[int, int], head_width: int, window: int | None) -> None:
    """Full rows (dense) and the same rows as any others (varlen), against plain torch; inputs are columns of a wider tensor."""
    lengths, how = [96] * 5, {"scale": head_width**-0.5, "window": window}
    queries, keys = heads
    wide = both(sum(lengths), (queries + 2 * keys) * head_width + 8)
    gradient = both(sum(lengths), queries, head_width, seed=1)
    found = {}
    for name, tensor, of_out, full_length in (
        ("dense", wide[0], gradient[0], 96),
        ("varlen", wide[0], gradient[0], 0),
        ("plain", wide[1], gradient[1], 0),
    ):
        rows = kernels.Rows(lengths, tensor.device, full_length=full_length)
        assert rows.are_full == (name == "dense")
        parts = tensor[:, : (queries + 2 * keys) * head_width].unflatten(1, (-1, head_width))
        q, k, v = parts.split([queries, keys, keys], dim=1)
        out, saved = kernels.attention(q, k, v, rows, **how)
        found[name] = out, *kernels.attention_backward(of_out, q, k, v, out, saved, rows, **how)
    for name in ("dense", "varlen"):
        for one, expected in zip(found[name], found["plain"], strict=True):
            assert_near(one, expected, bound=2 * ROUNDING)


@pytest.mark.parametrize("window", [None, 1, 20])
def test_attention_ends_with_its_row_and_its_window(window: int | None) -> None:
    lengths = [1, 130, 7, 64]
    parts = [both(sum(lengths), heads, 64, seed=seed) for seed, heads in enumerate((6, 2, 2, 6))]
    found = []
    for q, k, v, gradient in zip(*parts, strict=True):
        rows, how = kernels.Rows(lengths, q.device), {"scale": 0.2, "window": window}
        out, saved = kernels.attention(q, k, v, rows, **how)
        found.append((out, *kernels.attention_backward(gradient, q, k, v, out, saved, rows, **how)))
    for one, expected in zip(*found, strict=True):
        if expected.norm() > 1e-3:  # of a window of one token, queries and keys have no gradient
            assert_near(one, expected, bound=2 * ROUNDING)
        else:
            assert one.float().norm() < 1e-1
