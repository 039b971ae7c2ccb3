"""Combined adapters: what each method gives, the loss recorded beside it, runs of their own, and what goes wrong on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import wait_for
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import dataset, eval_losses, make_run, model_folder, reset_accelerate, said, train_here

from qlora_core import events, queue
from qlora_core.combining import create_combined
from qlora_core.errors import LabError, RunError
from qlora_core.events import Launched
from qlora_core.run_status import FINISHED, STOPPED
from qlora_core.runs import Run
from qlora_core.tokens import load_tokenizer
from qlora_core.worker import loading
from qlora_core.worker.combining import combine, of_rank
from qlora_core.worker.merging import merge_onto
from qlora_core.worker.reading import read_rows

CPU = torch.device("cpu")
IDS = torch.tensor([[*range(5, 60), *range(70, 130)]])


def trained(folder: Path, **changed: Any) -> Run:
    return train_here(make_run(folder, **({"max_steps": 3, "eval_steps": 3} | changed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combined")


@pytest.fixture(scope="module")
def parts(folder: Path) -> list[Run]:
    """Two adapters of one rank: of other rows, another seed, another scale."""
    return [trained(folder, name="one"), trained(folder, name="two", seed=7, lora_alpha=16)]


@pytest.fixture(scope="module")
def pissa(folder: Path) -> Run:
    """Saved as a plain adapter of rank 6 with rsLoRA's scale, on query and value alone."""
    return trained(
        folder, name="three", rank=3, use_rslora=True, init_lora_weights="pissa", target_modules="query-value", seed=9
    )


def combine_here(run: Run, stop: Any = False) -> Run:
    """As worker and queue do it, in this process."""
    reset_accelerate()
    attempt = 1 + sum(isinstance(event, Launched) for event in run.events()[0])
    events.append(run.events_path, Launched(attempt=attempt))
    combine(run, stop)
    return run


def combined(runs: list[Run], *weights: float, **how: Any) -> Run:
    return combine_here(create_combined(runs, weights, **({"method": "svd", "name": "sum"} | how)))


def updates(run: Run) -> dict[str, torch.Tensor]:
    """Scale times B·A of each layer, from the files alone."""
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    return {
        name.replace(".lora_A.weight", ""): scale * tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if "lora_A" in name
    }


def weighted_sum(runs: list[Run], *weights: float) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for run, weight in zip(runs, weights, strict=True):
        for name, update in updates(run).items():
            total[name] = total.get(name, 0) + weight * update
    return total


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, within: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).norm() <= within * expected[name].norm(), name


@torch.no_grad()
def logits(run: Run) -> torch.Tensor:
    """Of the run's base with its adapter, as anybody loads it."""
    base = loading.load_base(run.base_model().folder, run.config(), device=CPU, dtype="fp32")
    return PeftModel.from_pretrained(base, run.adapter).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["linear", "svd", "cat"])
def test_weights_one_and_zero_give_the_first_adapter(parts: list[Run], method: str) -> None:
    run = combined(parts, 1, 0, method=method)
    assert_equal(updates(run), updates(parts[0]))
    torch.testing.assert_close(logits(run), logits(parts[0]), rtol=1e-4, atol=1e-4)
    assert (logits(run) - logits(parts[1])).abs().max() > 0.05


def test_cat_is_the_weighted_sum_and_svd_the_nearest_of_its_rank(parts: list[Run], pissa: Run) -> None:
    """Also of adapters of different ranks, scales and layers, and with a negative weight. rsLoRA first: PEFT, left to
    itself, would multiply the whole by the root of the rank."""
    runs, weights = [pissa, *parts], (-0.4, 0.5, 0.7)
    exact = weighted_sum(runs, *weights)
    run = combined(runs, *weights, method="cat")
    assert run.config().rank == 6 + 4 + 4
    assert_equal(updates(run), exact)
    wide = combined(runs, *weights, method="svd", rank=14)
    assert_equal(updates(wide), exact)
    near = combined(runs, *weights, method="svd")
    assert near.config().rank == 6 == json.loads((near.adapter / "adapter_config.json").read_text())["r"]
    for name, update in updates(near).items():
        lost = torch.linalg.svdvals(exact[name])[6:].norm()  # Eckart-Young: no matrix of rank 6 loses less
        assert torch.linalg.matrix_rank(update, rtol=1e-5) <= 6
        assert abs((update - exact[name]).norm() - lost) < 1e-4 * exact[name].norm()


def test_linear_adds_the_factors_apart(parts: list[Run]) -> None:
    """As the help text says: products of one adapter's A with another's B are in it, so it is not the weighted sum."""
    run = combined(parts, 0.5, 0.5, method="linear")
    a, b = (
        {
            kind: sum((0.5 * scale) ** 0.5 * load_file(part.adapter / "adapter_model.safetensors")[name] for part, scale in
            zip(parts, (2, 4), strict=True))
            for kind, name in ((n, n) for n in load_file(parts[0].adapter / "adapter_model.safetensors") if factor in n)
        }
        for factor in ("lora_A", "lora_B")
    )  # fmt: skip
    expected = {n.replace(".lora_A.weight", ""): b[n.replace("lora_A", "lora_B")] @ a[n] for n in a}
    assert_equal(updates(run), expected)
    exact = weighted_sum(parts, 0.5, 0.5)
    assert all((expected[name] - exact[name]).norm() > 0.05 * exact[name].norm() for name in exact)


@pytest.mark.parametrize(
    "method",
    ["ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"],
)  # fmt: skip
def test_methods_that_prune(parts: list[Run], method: str) -> None:
    """They run, the random ones twice alike, and differ from the sum. A base's layers are narrower than some ranks."""
    rank = 80 if method == "ties_svd" else None
    run = combined(parts, 0.6, 0.4, method=method, density=0.6, rank=rank)
    found = updates(run)
    if rank:  # what is left of an update after pruning has every direction, and so many ranks hold them all
        assert all(torch.linalg.matrix_rank(update, rtol=1e-4) > 50 for update in found.values() if len(update) >= 64)
    again = updates(combined(parts, 0.6, 0.4, method=method, density=0.6, rank=rank))
    assert all(torch.equal(found[name], again[name]) for name in found)
    exact = weighted_sum(parts, 0.6, 0.4)
    assert all((found[name] - exact[name]).norm() > 0.05 * exact[name].norm() for name in exact)
    assert run.combination()["density"] == 0.6 and logits(run).isfinite().all()


def test_our_svd_gives_what_pefts_gives(parts: list[Run]) -> None:
    base = loading.load_base(parts[0].base_model().folder, parts[0].config(), device=CPU, dtype="fp32")
    model = PeftModel.from_pretrained(base, parts[0].adapter, adapter_name="one")
    model.load_adapter(parts[1].adapter, "two")
    with torch.no_grad():
        model.add_weighted_adapter(["one", "two"], [0.3, 0.9], "sum", combination_type="svd")
    tensors = loading.get_peft_model_state_dict(model, adapter_name="sum", save_embedding_layers=False)
    expected = {
        name.replace(".lora_A.weight", ""): tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if "lora_A" in name
    }
    assert_equal(updates(combined(parts, 0.3, 0.9)), expected, within=1e-4)


def test_a_layer_with_fewer_directions_than_the_rank_is_padded() -> None:
    a, b = of_rank(torch.randn(3, 8), torch.randn(2, 3), 5)
    assert a.shape == (5, 8) and b.shape == (2, 5)
    a, b = torch.randn(6, 8), torch.randn(4, 6)
    a5, b5 = of_rank(a, b, 5)
    assert a5.shape == (5, 8) and b5.shape == (4, 5)
    torch.testing.assert_close(b5 @ a5, b @ a)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_recorded_loss_is_what_a_fresh_load_gives(tmp_path: Path, architecture: str, method: str) -> None:
    """On the first run's evaluation rows, by their plain mean over supervised tokens."""
    settings = {"base_model": str(model_folder(architecture)), "method": method}
    runs = [trained(tmp_path, name=f"run {seed}", seed=seed, **settings) for seed in (1, 2)]
    run = combined(runs, 0.8, 0.6)
    base = loading.load_base(run.base_model().folder, run.config(), device=CPU, dtype="fp32")
    model = PeftModel.from_pretrained(base, run.adapter).eval()
    total, tokens = 0.0, 0
    for row in read_rows(run, load_tokenizer(run.adapter)).evaluation:
        targets = torch.tensor([t if learnt else -100 for t, learnt in zip(row.token_ids, row.supervised, strict=True)])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row.token_ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(output, targets[1:], reduction="sum").item()
        tokens += row.supervised_tokens
    assert run.status().eval_loss == pytest.approx(total / tokens, rel=1e-4)
    assert eval_losses(run) == {0: run.status().eval_loss}
    assert abs(run.status().eval_loss - eval_losses(runs[0])[3]) > 1e-3


def test_a_combination_is_a_run_with_lineage_that_can_be_merged(parts: list[Run]) -> None:
    run = combined(parts, 0.5, 0.5, name="both")
    status, result = run.status(), run.result()
    assert (status.state, status.name, status.rank, status.step) == (FINISHED, "both", 4, 0)
    assert status.detail == "combined from 2 adapters by svd"
    told = result["run_info"]["combination"]
    assert [part["run_id"] for part in told["parts"]] == [part.run_id for part in parts]
    assert [part["eval_loss"] for part in told["parts"]] == [eval_losses(part)[3] for part in parts]
    assert all(part["same_eval_rows"] and len(part["adapter_sha256"]) == 64 for part in told["parts"])
    info = result["train_info"]
    assert info["eval_losses"][0]["loss"] == status.eval_loss and info["train_rows"] == info["steps"] == 0
    assert info["adapter_bytes"] > 4 * info["trainable_parameters"] > 0
    note = said(run, events.Note)[-1].text
    assert note.startswith(f"0.5 x one (alone {eval_losses(parts[0])[3]:.4f}) + 0.5 x two (alone ")
    merged = merge_onto(run, "original")
    assert (merged / "config.json").exists()
    # A combination is an adapter like any other, so it can be combined in its turn.
    assert_equal(updates(combined([run, parts[0]], 1, 0.5)), updates_near(run, parts[0]), within=1e-4)


def updates_near(run: Run, other: Run) -> dict[str, torch.Tensor]:
    """The nearest of rank 4 to run + other / 2."""
    found = {}
    for name, update in weighted_sum([run, other], 1, 0.5).items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        found[name] = (u[:, :4] * s[:4]) @ v[:4]
    return found


def test_a_part_that_changed_or_went_is_refused(tmp_path: Path) -> None:
    runs = [trained(tmp_path, seed=seed) for seed in (1, 2)]
    waiting = create_combined(runs, [1, 1], method="svd", name="late")
    weights = runs[0].adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    (runs[1].adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError) as caught:
        combine_here(waiting)
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "its adapter has changed since; combine the runs again",
        "its adapter is gone; combine other runs",
    ]


def test_a_stopped_combination_leaves_no_adapter_and_begins_anew(parts: list[Run]) -> None:
    run = create_combined(parts, [1, 1], method="cat", name="stopped")
    combine_here(run, stop=True)
    assert (run.status().state, run.status().detail) == (STOPPED, "stopped before the adapters were combined")
    assert not run.adapter.exists() and run.result() is None
    combine_here(run)
    assert run.status().state == FINISHED and len(said(run, events.Evaluation)) == 1
    with pytest.raises(RunError, match="combines adapters and has no steps"):
        queue.resume(run, max_steps=9)


def test_rows_that_a_part_was_trained_on_are_told(tmp_path: Path, parts: list[Run]) -> None:
    rows = dataset(12)
    held_out = rows[:2] + dataset(3, seed=5)
    first = trained(tmp_path, train_rows=dataset(8, seed=8), eval_rows=held_out)
    second = trained(tmp_path, train_rows=rows, eval_rows=dataset(5, seed=2))
    run = combined([first, second], 1, 1)
    assert any("2 of 5 evaluation rows are also training rows" in note.text for note in said(run, events.Note))
    assert [part["same_eval_rows"] for part in run.combination()["parts"]] == [True, False]


def test_a_combination_goes_through_the_queue(parts: list[Run]) -> None:
    """A worker process of its own, with the GPU's lock and a log, as for any other run."""
    run = create_combined(parts, [0.5, 0.5], method="svd", name="queued")
    queue.add(run)
    queue.start_next(run.settings)
    wait_for(lambda: run.status().state not in ("queued", "running"), seconds=120)
    assert run.status().state == FINISHED, run.log_tail()
    assert_equal(updates(run), updates(combined(parts, 0.5, 0.5, name="here")))


def test_a_sum_that_is_no_number_ends_with_a_reason(tmp_path: Path) -> None:
    """Weights so large that the sum is no number."""
    runs = [trained(tmp_path, seed=seed) for seed in (1, 2)]
    run = create_combined(runs, [1e38, 1e38], method="cat", name="huge")
    with pytest.raises(LabError, match="evaluation loss is (nan|inf); choose smaller weights"):
        combine_here(run)
    assert not run.adapter.exists()


def test_orthogonal_start_and_odd_rank(tmp_path: Path) -> None:
    """PEFT would start the new adapter as the first part did, which refuses odd ranks."""
    runs = [trained(tmp_path, init_lora_weights="orthogonal", seed=seed, rank=4) for seed in (1, 2)]
    assert combined(runs, 1, 1, method="magnitude_prune_svd", density=0.9, rank=3).config() == replace(
        runs[0].config(), name="sum", rank=3, lora_alpha=3.0, init_lora_weights="default"
    )
