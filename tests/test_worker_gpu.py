"""The worker on a real GPU: what it measures there, out of memory for real, fp16 and compiled layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_worker_variants import VARIANTS, narrow
from tiny_models import StopAfter, adapter, eval_losses, losses, make_run, said, train_here

from qlora_core import events
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
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
            "padded": {"packing": "off"},
            "one row a pass": {"token_budget": 8},
            "checkpointing": {"activation_checkpointing": "full"},
        }.items()
    }
    for run in runs.values():
        assert run.status().state == FINISHED
        assert losses(run) == pytest.approx(losses(runs["packed"]), abs=BF16_BOUND)
        step = said(run, events.Step)[-1]
        assert 0 < step.peak_allocated_bytes <= step.peak_reserved_bytes
        assert "NVIDIA" in run.result()["run_info"]["device"]


def test_fp16_trains_with_a_scaled_loss(tmp_path: Path) -> None:
    run = trained(tmp_path, method="qlora", compute_dtype="fp16")
    assert eval_losses(run)[6] < eval_losses(run)[0]


def test_compiled_layers_get_the_losses_of_eager_ones(tmp_path: Path) -> None:
    compiled, eager = trained(tmp_path / "c", compile="on"), trained(tmp_path / "e", compile="off")
    assert said(compiled, events.Started)[0].compiled
    assert losses(compiled) == pytest.approx(losses(eager), abs=BF16_BOUND)


def test_out_of_memory_makes_smaller_passes_and_the_same_losses(tmp_path: Path) -> None:
    config = {"train_rows": long_rows(16, 90), "max_seq_length": 1024, "rows_per_step": 8, "token_budget": 8192}
    free = trained(tmp_path / "free", **config)
    peak = said(free, events.Step)[-1].peak_reserved_bytes
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        tight = trained(tmp_path / "tight", **config)
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
