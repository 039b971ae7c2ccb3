"""Measured drift: a faithful merge is told from an unfaithful one, on the run's own held-out rows, before one is chosen."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fake_gpus, held_by_another_process
from safetensors.torch import load_file, save_file
from tiny_models import dataset, eval_losses, make_run, model_folder, said, train_here

from qlora_core import cli, drift, events, merging
from qlora_core.errors import RunError
from qlora_core.jobs import Cancelled
from qlora_core.model_card import model_card
from qlora_core.runs import Run, lock
from qlora_core.worker import drift as worker

# Rounding the sum to bf16 leaves a KL divergence of 5e-8 in fp32; NF4 beneath the original base instead one of 4e-5.
FAITHFUL = 2e-6


def trained(folder: Path, **config: Any) -> Run:
    base = str(model_folder(dtype=torch.bfloat16))
    return train_here(make_run(folder, **({"base_model": base, "max_steps": 20, "eval_steps": 20} | config)))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("lora"), method="lora")


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Measured by a process of its own, as from the page."""
    run = trained(tmp_path_factory.mktemp("qlora"), method="qlora")
    drift.measure(run)
    return run


@pytest.fixture
def copied(tmp_path: Path, lora_run: Run) -> Run:
    """A run that a test may damage."""
    run = Run(tmp_path / "home" / "runs" / lora_run.run_id, lora_run.settings)
    shutil.copytree(lora_run.path, run.path, ignore=shutil.ignore_patterns("merged-*", drift.DRIFT))
    return run


def measured_here(run: Run, tmp_path: Path) -> dict[str, Any]:
    (scratch := tmp_path / "scratch").mkdir()
    return worker.measure(run, scratch)


def test_the_merge_onto_the_dequantised_base_is_what_was_trained(qlora_run: Run) -> None:
    found = drift.read_drift(qlora_run)
    assert found and list(found["ways"]) == ["original", "original-nf4", "dequantized"] == list(drift.ways(qlora_run))
    original, dequantised = found["ways"]["original"], found["ways"]["dequantized"]
    assert dequantised["kl"] < FAITHFUL < 5 * FAITHFUL < original["kl"]
    assert abs(dequantised["loss_difference"]) < abs(original["loss_difference"])
    assert dequantised["top1"] == 1.0


def test_the_trained_model_has_the_loss_that_its_run_has_evaluated(qlora_run: Run) -> None:
    """The same rows, tokens and base in 4 bits: here all held-out rows are within the limits."""
    found = drift.read_drift(qlora_run)
    assert found and found["trained"]["loss"] == pytest.approx(eval_losses(qlora_run)[20], rel=1e-4)
    assert (found["rows"], found["held_out_rows"]) == (5, 5)
    assert found["tokens"] == said(qlora_run, events.Evaluation)[-1].tokens
    way = found["ways"]["original"]
    assert way["loss"] - found["trained"]["loss"] == pytest.approx(way["loss_difference"])


def test_a_lora_merge_is_what_was_trained(lora_run: Run, tmp_path: Path) -> None:
    found = measured_here(lora_run, tmp_path)
    assert list(found["ways"]) == ["original", "original-nf4"] == list(drift.ways(lora_run))
    assert found["ways"]["original"]["kl"] < FAITHFUL < found["ways"]["original-nf4"]["kl"]
    assert found["device"].startswith("CPU") and found["dtype"] == "fp32" and "torch" in found["packages"]


def test_a_broken_merge_shows(copied: Run, tmp_path: Path) -> None:
    """What is measured is the folder that would be pushed. Larger norms change how sure it is, exchanged tokens what it says."""
    weights = merging.merge(copied, onto="original") / "model.safetensors"
    right = load_file(weights)
    scaled = {name: tensor * 2 if "norm" in name else tensor for name, tensor in right.items()}
    exchanged = {name: tensor.roll(1, 0) if "embed" in name else tensor for name, tensor in right.items()}
    found = []
    for number, tensors in enumerate((scaled, exchanged)):
        save_file(tensors, weights, metadata={"format": "pt"})
        (tmp_path / str(number)).mkdir()
        found.append(measured_here(copied, tmp_path / str(number))["ways"]["original"])
    assert found[0]["kl"] > 0.01 and abs(found[0]["loss_difference"]) > 0.01
    assert found[1]["kl"] > 0.01 and found[1]["top1"] < 0.5


def test_a_measurement_stays_until_the_adapter_changes(qlora_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drift.read_drift(qlora_run)

    def no_process(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(drift.subprocess, "Popen", no_process)
    assert drift.measure(qlora_run) == found
    weights = qlora_run.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    try:
        save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
        assert drift.read_drift(qlora_run) is None, "a page must not show it any more"
        with pytest.raises(AssertionError, match="measured again"):
            drift.measure(qlora_run)
    finally:
        weights.write_bytes(before)


def test_nothing_is_left_of_the_merges_that_were_made_for_it(qlora_run: Run) -> None:
    assert not [path.name for path in qlora_run.path.iterdir() if path.name.startswith(("merged-", ".drift"))]


def test_a_run_without_held_out_rows_says_so(copied: Run) -> None:
    (copied.path / "dataset" / "eval.jsonl").write_text("")
    with pytest.raises(RunError, match="none of its held-out rows has a token to learn") as caught:
        drift.measure(copied)
    assert "Traceback" not in str(caught.value)
    assert drift.read_drift(copied) is None


@pytest.mark.parametrize(
    ("limit", "value"), [("ROWS", 3), ("TOKENS", 150), ("REFERENCE_BYTES", 4 * 264 * 100)], ids=str
)
def test_what_is_measured_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    """And rows are taken from all over the file."""
    run = trained(tmp_path, max_steps=1, eval_steps=1, eval_rows=dataset(40, seed=2))
    monkeypatch.setattr(drift, limit, value)
    found = measured_here(run, tmp_path)
    assert found["held_out_rows"] == 40 and 0 < found["rows"] < 20
    if limit == "REFERENCE_BYTES":
        assert found["tokens"] <= 100


def test_it_can_be_cancelled(copied: Run) -> None:
    """The process ends, and neither half a record nor a merge is left."""

    def report(doing: str, done: int, total: int, unit: str) -> None:
        if "merge onto" in doing:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        drift.measure(copied, report=report)
    assert drift.read_drift(copied) is None
    assert not list(copied.path.glob(".drift-*"))
    with lock(copied.path / "merge.lock") as held:
        assert held is not None


def test_it_takes_turns_with_merges_and_with_runs(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        held_by_another_process(copied.path / "merge.lock"),
        pytest.raises(RunError, match="is being merged, or its merges are measured, already"),
    ):
        drift.measure(copied)
    used: list[str] = []
    fake_gpus(monkeypatch, "GPU-a", "GPU-b")
    monkeypatch.setattr(drift, "_ask", lambda run, device, locks, report: used.append(device))
    copied.settings.locks.mkdir(parents=True, exist_ok=True)
    config = json.loads((copied.path / "config.json").read_text())
    (copied.path / "config.json").write_text(json.dumps(config | {"device": "auto"}))
    no_record = pytest.raises(RunError, match="adapter changed")  # no worker has written anything
    with held_by_another_process(copied.settings.locks / "GPU-a.lock"):
        with no_record:
            drift.measure(copied)
        with lock(copied.settings.locks / "GPU-b.lock"), no_record:
            drift.measure(copied)
    assert used == ["GPU-b", "cpu"]


def test_a_merge_that_does_not_fit_the_gpu_is_measured_on_the_cpu(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card on which qlora trained need not hold the merge in 16 bits."""
    load = worker.load_base

    def too_large(*arguments: Any, device: torch.device, **how: Any) -> Any:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(*arguments, device=device, **how)

    monkeypatch.setattr(worker, "load_base", too_large)
    monkeypatch.setattr(worker, "choose_device", lambda config: torch.device("cuda", 0))
    assert measured_here(copied, tmp_path)["device"].startswith("CPU")


def test_a_run_without_an_adapter_has_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no adapter yet; only a finished or stopped run can be measured"):
        drift.measure(make_run(tmp_path))


def test_a_worker_that_dies_is_told(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied.adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(merging.ModelError, match=r"the measurement of its merges failed: .*drift-log\.txt"):
        drift.measure(copied)


def test_the_command_prints_what_was_measured(qlora_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(qlora_run.settings.home)
    assert cli.main(["drift", qlora_run.run_id, "--home", home, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == drift.read_drift(qlora_run)
    assert cli.main(["drift", qlora_run.run_id, "--home", home]) == 0
    told = capsys.readouterr().out
    assert "merged onto the dequantised 4-bit base" in told and "5 of 5 held-out rows" in told


def test_the_card_of_a_merged_model_shows_it(qlora_run: Run) -> None:
    shown = drift.for_card(drift.read_drift(qlora_run))
    assert shown and list(shown) == ["original", "dequantized"]
    text = model_card(qlora_run, what="merged", repo_id="me/it", onto="original", drift=shown).text
    (line,) = [line for line in text.splitlines() if "dequantised 4-bit base" in line and "|" in line]
    assert "100.0%" in line and f"{shown['dequantized']['kl']:.4g}" in line
