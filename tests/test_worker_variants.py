"""Variants of adapter and optimizer, early stopping, the best adapter, more steps: each trained and checked by what it leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import (
    StopAfter,
    adapter,
    adapter_bytes,
    dataset,
    eval_losses,
    losses,
    make_run,
    model_folder,
    said,
    train_here,
)

from qlora_core import events, queue
from qlora_core.config import TrainConfig, replace
from qlora_core.data.stored import read_stored
from qlora_core.errors import ConfigError, RunError, TrainingError
from qlora_core.run_status import FINISHED, STOPPED
from qlora_core.runs import Run
from qlora_core.token_cache import make_table
from qlora_core.tokens import load_tokenizer
from qlora_core.worker import loading
from qlora_core.worker.batches import Row
from qlora_core.worker.evaluation import evaluation_loss
from qlora_core.worker.steps import Stepper

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA with rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 8},
    "QLoRA with DoRA": {"method": "qlora", "use_dora": True},
    "LoftQ": {"method": "qlora", "init_lora_weights": "loftq"},
    "LoftQ with alpha of its own": {"method": "qlora", "init_lora_weights": "loftq", "lora_alpha": 3},
    "LoRA+": {"loraplus_lr_ratio": 8},
    "LoRA+ with DoRA and 8 bits": {"loraplus_lr_ratio": 8, "use_dora": True, "optimizer": "adamw_8bit"},
    "NEFTune": {"neftune_noise_alpha": 5},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "paged 8-bit AdamW": {"optimizer": "paged_adamw_8bit"},
    "paged 32-bit AdamW": {"optimizer": "paged_adamw_32bit", "method": "qlora"},
}


def loss_when_loaded(run: Run) -> float:
    """The evaluation loss of the saved adapter on a base loaded anew, as anyone who takes it home would get it."""
    config, base = run.config(), run.base_model()
    model = PeftModel.from_pretrained(
        loading.load_base(base.folder, config, device=CPU, dtype="fp32"), str(run.adapter)
    )
    tokenizer = load_tokenizer(run.adapter)
    rows = list(Row.all_of(make_table(read_stored(run.path / "dataset" / "eval.jsonl"), tokenizer), 512))
    return evaluation_loss(model, rows, token_budget=1000, packed=True, device=CPU)[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_resumes_to_the_same_bits_and_fits_the_original_base(
    variant: str, architecture: str, tmp_path: Path
) -> None:
    if (variant, architecture) == ("OLoRA", "gpt2"):
        return test_olora_is_refused_where_peft_mistakes_transposed_layers(tmp_path)
    values = {"base_model": str(model_folder(architecture)), "save_steps": 2, **VARIANTS[variant]}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train_here(make_run(tmp_path / "whole", **values))
    found = eval_losses(whole)
    assert found[6] < found[0] - 0.05, "it learns"
    assert loss_when_loaded(whole) == pytest.approx(found[6], abs=2e-5)

    stopped = train_here(make_run(tmp_path / "stopped", **values), StopAfter(3))
    assert stopped.status().state == STOPPED
    train_here(stopped)
    assert losses(stopped) == losses(whole) and eval_losses(stopped) == found
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def test_olora_is_refused_where_peft_mistakes_transposed_layers(tmp_path: Path) -> None:
    run = make_run(tmp_path, base_model=str(model_folder("gpt2")), init_lora_weights="olora")
    with pytest.raises(ConfigError, match="'olora': PEFT mistakes the transposed layers.*choose pissa"):
        train_here(run)


def narrow(values: dict[str, Any]) -> dict[str, Any]:
    """The highest rank that key and value of the tiny Llama allow a start that is made of their singular vectors."""
    return {"rank": 32} if values.get("init_lora_weights") in ("pissa", "olora", "loftq") else {}


def test_variants_differ_from_plain_lora_and_from_each_other(tmp_path: Path) -> None:
    """No setting is silently ignored: nothing but the setting differs, and the losses do."""
    # 8-bit optimizers leave tensors of fewer than 4,096 elements in 32 bits.
    seen, common = {}, {"rank": 64, "lora_alpha": 32, "max_steps": 3, "warmup_fraction": 0}
    for number, (name, values) in enumerate({"plain": {}, "plain QLoRA": {"method": "qlora"}, **VARIANTS}.items()):
        (folder := tmp_path / str(number)).mkdir()
        seen[name] = tuple(losses(train_here(make_run(folder, **(common | values | narrow(values))))))
    # 32-bit AdamW rounds as the fused one does, and paging moves states without changing them.
    same = {("8-bit AdamW", "paged 8-bit AdamW"), ("plain QLoRA", "paged 32-bit AdamW")}
    for one in seen:
        for other in seen:
            if one < other and (one, other) not in same and (other, one) not in same:
                assert seen[one] != pytest.approx(seen[other], abs=1e-6), (one, other)
    for one, other in same:
        assert seen[one] == pytest.approx(seen[other], abs=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_over_base_weights_is_written_for_the_base_as_it_was(init: str, tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, init_lora_weights=init, rank=4))
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    assert adapter(run)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (8, 64)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loftq_brings_every_layer_nearer_to_the_original(architecture: str) -> None:
    config = TrainConfig(method="qlora", init_lora_weights="loftq", rank=16, lora_alpha=8)
    folder = model_folder(architecture)
    base = loading.load_base(folder, config, device=CPU, dtype="fp32")
    adapted = loading.add_adapter(base, config, base_name="tiny")
    original = loading.load_base(folder, config, device=CPU, dtype="fp32", four_bit=False)
    layers = {name: m for name, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == (14 if architecture == "llama" else 8)
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight
        weight = weight.T if architecture == "gpt2" else weight
        quantised = loading.dequantize_module_weight(layer.get_base_layer()).float()
        before = (weight - quantised).norm()
        after = (weight - quantised - layer.get_delta_weight("default").reshape(quantised.shape)).norm()
        assert after < 0.8 * before, name


# -- LoRA+ and NEFTune


def stepper(tmp_path: Path, **values: Any) -> Stepper:
    config = TrainConfig(method="lora", rank=4, device="cpu", max_steps=10, **values)
    base = loading.load_base(model_folder(), config, device=CPU, dtype="fp32")
    model = loading.add_adapter(base, config, base_name="tiny").train()
    rows = [Row(i, tuple(range(5, 15 + 7 * i)), (True,) * (10 + 7 * i)) for i in range(4)]
    return Stepper(model, config, rows, device=CPU, dtype="fp32", say=lambda event: None)


def test_loraplus_gives_b_its_own_rate_through_the_schedule(tmp_path: Path) -> None:
    steps = stepper(tmp_path, loraplus_lr_ratio=16, learning_rate=1e-3, warmup_fraction=0, lr_schedule="linear")
    rates: dict[str, set[float]] = {"A": set(), "B": set()}
    names = {id(parameter): name for name, parameter in steps.model.named_parameters()}
    for step in range(3):
        for group in steps.optimizer.param_groups:
            for parameter in group["params"]:
                rates["A" if "lora_A" in names[id(parameter)] else "B"].add(round(group["lr"], 9))
        assert steps.take(step).learning_rate == pytest.approx(1e-3 * (10 - step) / 10)
    assert rates == {"A": {1e-3, 9e-4, 8e-4}, "B": {1.6e-2, 1.44e-2, 1.28e-2}}


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_neftune_noise_is_bounded_by_each_rows_own_length(packing: str, tmp_path: Path) -> None:
    """alpha / sqrt(length x width): a packed or padded neighbour does not make a row's noise smaller."""
    steps = stepper(tmp_path, neftune_noise_alpha=5, packing=packing)
    seen: list[torch.Tensor] = []
    embedding = steps.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    rows = [steps.rows[0], steps.rows[3]]
    steps.passes.backward(rows, seed=1)
    ids, output = seen[0]
    noise = (output - embedding.weight[ids]).abs()
    parts = noise[0].split([31, 10])[::-1] if steps.passes.packed else (noise[1, :10], noise[0, :31])
    assert steps.passes.packed == (packing == "auto")
    for part, length in zip(parts, (10, 31), strict=True):
        most = 5 / (length * 64) ** 0.5
        assert 0.9 * most < part.max() <= most * 1.0001
    steps.model.eval()
    embedding(ids)
    assert torch.equal(seen[-1][1], embedding.weight[ids]), "no noise in an evaluation"


# -- early stopping and the best adapter

OVERFITS = {"max_steps": 40, "eval_steps": 5, "learning_rate": 0.05, "rows_per_step": 12}


def test_early_stopping_ends_after_so_many_evaluations_without_a_lower_loss(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **OVERFITS, early_stopping_patience=2))
    found = eval_losses(run)
    best, last = min(found, key=found.get), max(found)
    assert last == best + 10 < 40
    status = run.status()
    assert (status.state, status.step) == (FINISHED, last)
    assert f"ended early, at step {last} of 40" in status.detail and f"lowest at step {best}" in status.detail
    assert run.result()["train_info"]["adapter_step"] == last
    assert loss_when_loaded(run) == pytest.approx(found[last], abs=2e-5)


def test_a_resumed_run_stops_early_at_the_same_step(tmp_path: Path) -> None:
    values = {**OVERFITS, "early_stopping_patience": 2, "final_adapter": "best"}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train_here(make_run(tmp_path / "whole", **values))
    stopped = train_here(make_run(tmp_path / "stopped", **values), StopAfter(max(eval_losses(whole)) - 2))
    train_here(stopped)
    assert eval_losses(stopped) == eval_losses(whole) and adapter_bytes(stopped) == adapter_bytes(whole)


def test_the_best_adapter_is_written_when_asked_for(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **OVERFITS, final_adapter="best", keep_checkpoints=1, save_steps=40))
    found = eval_losses(run)
    best = min(found, key=found.get)
    assert 0 < best < 40
    assert run.result()["train_info"]["adapter_step"] == best
    assert loss_when_loaded(run) == pytest.approx(found[best], abs=2e-5)
    assert any(f"step {best} is kept" in note.text for note in said(run, events.Note))


def test_a_stop_writes_the_best_adapter_so_far_and_goes_on_from_the_last(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train_here(make_run(tmp_path / "whole", **OVERFITS, final_adapter="best"))
    stopped = train_here(make_run(tmp_path / "stopped", **OVERFITS, final_adapter="best"), StopAfter(30))
    assert loss_when_loaded(stopped) == pytest.approx(min(eval_losses(stopped).values()), abs=2e-5)
    train_here(stopped)
    assert said(stopped, events.Resumed)[0].from_step == 30
    assert losses(stopped) == losses(whole) and adapter_bytes(stopped) == adapter_bytes(whole)


def test_a_lost_best_checkpoint_is_told_and_the_last_adapter_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, **OVERFITS, final_adapter="best")
    train_here(run, StopAfter(38))
    best = min(found := eval_losses(run), key=found.get)
    shutil.rmtree(run.path / "checkpoints" / f"checkpoint-{best}")
    train_here(run)
    assert any("gone or damaged: the last adapter is kept" in note.text for note in said(run, events.Note))
    assert run.result()["train_info"]["adapter_step"] == 40


# -- more steps, and checkpoints of another run


def test_a_finished_run_goes_on_for_more_steps_as_if_they_had_been_planned(tmp_path: Path) -> None:
    """With a constant rate the schedule does not depend on the end, so that continuing gives the very same run."""
    values = {"lr_schedule": "constant", "warmup_fraction": 0, "eval_steps": 3, "lora_dropout": 0.1}
    for name in ("whole", "continued"):
        (tmp_path / name).mkdir()
    whole = train_here(make_run(tmp_path / "whole", **values, max_steps=9))
    run = train_here(make_run(tmp_path / "continued", **values, max_steps=6))
    with pytest.raises(RunError, match="is finished; to continue it, say for how many steps"):
        queue.resume(run)
    with pytest.raises(RunError, match="max_steps is 6; it has made 6 steps"):
        queue.resume(run, max_steps=6)
    queue.resume(run, max_steps=9)
    train_here(run)
    assert losses(run) == losses(whole) and eval_losses(run) == eval_losses(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert (run.config().max_steps, run.result()["train_info"]["steps"]) == (9, 9)


def test_a_continued_run_follows_the_schedule_of_its_new_length(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, max_steps=4, lr_schedule="linear", warmup_fraction=0, learning_rate=0.01))
    queue.resume(run, max_steps=8)
    train_here(run)
    rates = [step.learning_rate for step in said(run, events.Step)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.005, 0.00375, 0.0025, 0.00125])


def test_continuing_an_early_stopped_run_does_not_stop_at_once(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **OVERFITS, early_stopping_patience=1))
    ended = run.status().step
    queue.resume(run, max_steps=ended + 3)
    train_here(run)
    assert run.status().step == ended + 3
    assert any("early stopping is off" in note.text for note in said(run, events.Note))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rank": 8, "learning_rate": 0.02}, ["rank 4, this run has 8", "learning_rate 0.01, this run has 0.02"]),
        ({"method": "qlora"}, ["method 'lora', this run has 'qlora'"]),
        ({"seed": 7, "optimizer": "adamw_8bit"}, ["seed 42, this run has 7", "optimizer 'adamw_torch_fused'"]),
        ({"base_model": "other"}, ["base model", "weights of the base model (SHA-256)"]),
        ({"train_rows": dataset(9, seed=9)}, ["training rows (SHA-256)"]),
    ],
)
def test_checkpoints_of_another_run_are_refused_naming_all_that_differs(
    changed: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    if changed.get("base_model"):
        changed = {"base_model": str(model_folder("llama", spread=2.0))}
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = train_here(make_run(tmp_path / "one"), StopAfter(3))
    other = make_run(tmp_path / "other", **changed)
    shutil.copytree(one.path / "checkpoints", other.path / "checkpoints")
    with pytest.raises(TrainingError) as caught:
        train_here(other)
    for words in (*named, "bring back what was changed, or remove"):
        assert any(words in problem for problem in caught.value.problems), caught.value.problems
    assert (other.path / "checkpoints" / "checkpoint-3").is_dir(), "nothing is lost"


def test_settings_that_do_not_shape_the_steps_may_change_before_a_resume(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path), StopAfter(3))
    run.change_config(replace(run.config(), token_budget=100, keep_checkpoints=5, activation_checkpointing="full"))
    assert train_here(run).status().state == FINISHED


@pytest.mark.parametrize("file", ["adapter.safetensors", "state.pt", "made_for.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_checkpoint_with_a_file_missing_or_cut_is_skipped_by_name(file: str, how: str, tmp_path: Path) -> None:
    for name in ("whole", "hurt"):
        (tmp_path / name).mkdir()
    whole = train_here(make_run(tmp_path / "whole", save_steps=2))
    run = train_here(make_run(tmp_path / "hurt", save_steps=2), StopAfter(4))
    path = run.path / "checkpoints" / "checkpoint-4" / file
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    train_here(run)
    resumed = said(run, events.Resumed)[0]
    assert resumed.from_step == 3 and resumed.skipped[0].startswith("checkpoint-4 skipped: ")
    assert adapter_bytes(run) == adapter_bytes(whole)


@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("lora", "olora"), ("qlora", "loftq")])
def test_a_rank_above_a_layers_narrower_side_is_refused_where_the_start_needs_as_many_directions(
    method: str, init: str, tmp_path: Path
) -> None:
    """Key and value of the tiny Llama have 32 outputs; the saved adapter could not be loaded again."""
    run = make_run(tmp_path, method=method, init_lora_weights=init, rank=48)
    with pytest.raises(
        ConfigError, match="with rank 48: some layers of .* can give 32 directions only; set rank to 32"
    ):
        train_here(run)


def test_a_finished_run_taken_out_of_the_queue_again_is_still_finished(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, max_steps=2))
    queue.resume(run, max_steps=4)
    run.request_stop()
    assert run.status().state == FINISHED
