"""Bases held in 4 bits, int8 and 16 bits at once: what is loaded, learnt, estimated, combined and merged; and int8's products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from test_targets import told
from test_worker_combining import combined
from tiny_models import adapter, dequantized, eval_losses, losses, make_run, model_folder, said, train_here
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_core import events, memory
from qlora_core.combining import create_combined
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, ModelError, RunError
from qlora_core.footprint import allocated, weight_bytes
from qlora_core.row_order import step_rows
from qlora_core.worker import loading, passes
from qlora_core.worker.batches import Row, loss_sum, make_pass
from qlora_core.worker.fused import problem_with
from qlora_core.worker.merging import export_nf4, merge_onto
from qlora_core.worker.quantising import Int8Linear, in_int8

CPU = torch.device("cpu")
# Of two decoder layers: attention of the first in 4 bits but its value, in int8 as the MLP of the second; the rest in 16 bits.
MIXED = {
    "llama": {"quantize_modules": "attention@0", "int8_modules": "v_proj@0,mlp@1"},
    "gpt2": {"quantize_modules": "attention@0", "int8_modules": "mlp@1"},
}
ROWS = [Row(1, tuple(range(5, 45)), (True,) * 40), Row(2, tuple(range(90, 120)), (False,) * 10 + (True,) * 20)]
IDS = torch.tensor([[*range(5, 60), *range(70, 130)]])


def config_of(name: str = "llama", **changed: Any) -> TrainConfig:
    return TrainConfig(**({"method": "qlora", "compute_dtype": "fp32", "rank": 4} | MIXED[name] | changed))


def loaded(name: str = "llama", dtype: str = "fp32", **changed: Any) -> Any:
    return loading.load_base(model_folder(name), config_of(name, **changed), device=CPU, dtype=dtype)


def kinds(model: torch.nn.Module) -> dict[str, str]:
    """Kind of every linear layer of the decoder, without "model.layers." or GPT-2's like."""
    linear = (torch.nn.Linear, Conv1D)
    return {
        name.split(".", 2)[2]: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, linear) and "head" not in name
    }


# -- what is loaded


def test_each_layer_is_held_as_the_config_says() -> None:
    found = kinds(loaded())
    attention = {f"0.self_attn.{name}_proj" for name in "qko"}
    in_int8 = {"0.self_attn.v_proj", *(f"1.mlp.{name}_proj" for name in ("gate", "up", "down"))}
    assert {name for name, kind in found.items() if kind == "Linear4bit"} == attention
    assert {name for name, kind in found.items() if kind == "Int8Linear"} == in_int8
    assert sum(kind == "Linear" for kind in found.values()) == 14 - 3 - 4


def test_layers_of_gpt2_lie_the_other_way_round_and_come_back_so() -> None:
    model = loaded("gpt2")
    found = kinds(model)
    assert found["0.attn.c_attn"] == "Linear4bit" and found["1.mlp.c_proj"] == "Int8Linear"
    assert found["0.mlp.c_fc"] == found["1.attn.c_attn"] == "Conv1D"
    original = loading.load_base(model_folder("gpt2"), config_of(method="lora"), device=CPU, dtype="fp32")
    back = dequantized(model, torch.float32)
    assert set(kinds(back).values()) == {"Conv1D"}
    for name, tensor in original.state_dict().items():
        apart = (back.state_dict()[name] - tensor).norm()
        assert apart <= (0.12 if "0.attn" in name else 0.01) * tensor.norm(), name


def test_weights_are_those_of_a_base_that_is_held_in_one_way() -> None:
    """4 bits to the bit, 16 bits untouched, int8 within half a step of each row's largest magnitude."""
    model = loaded()
    whole = loading.load_base(
        model_folder(), config_of(quantize_modules="all", int8_modules="none"), device=CPU, dtype="fp32"
    )
    plain = loading.load_base(model_folder(), config_of(method="lora"), device=CPU, dtype="fp32")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(module.weight.data, whole.get_submodule(name).weight.data)
        elif isinstance(module, Int8Linear):
            original, held = plain.get_submodule(name).weight, dequantize_module_weight(module)
            steps = original.abs().amax(dim=1, keepdim=True) / 127
            assert ((held - original).abs() <= 0.501 * steps).all() and not torch.equal(held, original)
        elif isinstance(module, torch.nn.Linear):
            assert torch.equal(module.weight, plain.get_submodule(name).weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "changed",
    [{}, {"quantize_modules": "none", "int8_modules": "all"}, {"int8_modules": "none", "double_quant": False}],
)
def test_estimated_bytes_are_those_of_the_loaded_model(name: str, changed: dict[str, Any]) -> None:
    config, model = config_of(name, **changed), loaded(name, "bf16", **changed)
    weights, constants = weight_bytes(told(name), config, 2)
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())
    held = [module.weight for module in model.modules() if isinstance(module, (Linear4bit, Int8Linear))]
    tensors = []
    for weight in held:
        if weight.dtype == torch.int8:
            tensors.append(weight.SCB)
        else:
            state = weight.quant_state
            tensors += [state.absmax, state.code, *([state.offset, state.state2.absmax] if state.nested else [])]
    assert constants == sum(allocated(tensor.nbytes) for tensor in tensors)


def test_layers_that_are_none_of_the_models_are_refused_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_core.worker.shards.LazyTensor.__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError) as caught:
        loaded(quantize_modules="c_attn", int8_modules="mlp@0-7")
    assert len(caught.value.problems) == 2


def test_a_base_that_was_saved_in_4_bits_cannot_be_held_otherwise(tmp_path: Path) -> None:
    loaded(quantize_modules="all", int8_modules="none").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="was saved quantised, so it cannot be held otherwise; leave quantize_modules"):
        loading.load_base(tmp_path, config_of(), device=CPU, dtype="fp32")


def test_mamba_can_be_quantised_but_for_the_layer_that_it_multiplies_with_itself() -> None:
    model = loading.load_base(model_folder("mamba"), TrainConfig(quantize_modules="in_proj"), device=CPU, dtype="fp32")
    assert {name.rpartition(".")[2] for name, kind in kinds(model).items() if kind == "Linear4bit"} == {"in_proj"}
    for changed in ({"int8_modules": "dt_proj"}, {"quantize_modules": "all"}):
        with pytest.raises(ModelError, match="dt_proj in 4 bits or int8; choose method lora, or name other layers"):
            loading.load_base(model_folder("mamba"), TrainConfig(**changed), device=CPU, dtype="fp32")


# -- products


def int8_layer(outputs: int = 48, inputs: int = 64) -> Int8Linear:
    torch.manual_seed(0)
    layer = Int8Linear(inputs, outputs, True, has_fp16_weights=False)
    layer.weight = in_int8(0.05 * torch.randn(outputs, inputs))
    return layer.requires_grad_(False)


def test_int8_products_are_those_of_the_dequantised_weights_whoever_shares_the_pass() -> None:
    """bitsandbytes' own would round the inputs too, in evaluation only, and look for large columns in the whole pass."""
    layer, x = int8_layer(), torch.randn(1, 30, 64)
    x[0, 3, 5], x[0, 20, 9] = 40.0, 9.0
    weight = dequantize_module_weight(layer)
    x.requires_grad_()
    out = layer.train()(x)
    torch.testing.assert_close(out, x @ weight.T + layer.bias)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], 2 * out.detach() @ weight)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), out)
        torch.testing.assert_close(layer(x[:, 10:15]), out[:, 10:15])


def test_an_int8_layer_keeps_nothing_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(1, 30, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = int8_layer()(x)
    assert not kept and out.requires_grad


def gradients(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():  # B starts at zero, then A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    loss_sum(model.train(), make_pass(ROWS, packed=True, device=CPU)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_on_all_three_kinds_learn_what_they_would_on_the_dequantised_base(name: str) -> None:
    config = config_of(name)
    found = gradients(loading.add_adapter(loaded(name), config, base_name="tiny"))
    plain = dequantized(loaded(name), torch.float32)
    layers = len(kinds(plain))
    expected = gradients(loading.add_adapter(plain, config, base_name="tiny"))
    assert found.keys() == expected.keys() and len(found) == 2 * layers
    for key, gradient in expected.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7)


def test_lora_starts_from_the_same_adapter_however_the_base_is_held() -> None:
    starts = []
    for config in (config_of(), config_of(method="lora")):
        base = loading.load_base(model_folder(), config, device=CPU, dtype="fp32")
        starts.append(loading.adapter_tensors(loading.add_adapter(base, config, base_name="tiny")))
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_loftq_brings_layers_of_both_kinds_nearer_to_the_original() -> None:
    config = config_of(init_lora_weights="loftq", rank=16)
    adapted = loading.add_adapter(loaded(), config, base_name="tiny")
    original = loading.load_base(model_folder(), config, device=CPU, dtype="fp32", four_bit=False)
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        update = layer.get_delta_weight("default")
        if not isinstance(layer.get_base_layer(), (Linear4bit, Int8Linear)):
            assert not update.any(), name
            continue
        lost = original.get_submodule(name).weight - dequantize_module_weight(layer.get_base_layer())
        assert (lost - update).norm() < 0.8 * lost.norm(), name
    alone = config_of(init_lora_weights="loftq", target_modules="attention@1")
    with pytest.raises(ConfigError, match="no layer with an adapter is quantised"):
        loading.add_adapter(loaded(), alone, base_name="tiny")


# -- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bf16"), ("gpt2", "fp32")])
def test_a_run_learns_and_is_merged_onto_the_base_that_it_saw(name: str, dtype: str, folder: Path) -> None:
    """Evaluations between the steps, and the merged folder loaded as anyone would."""
    values = {"method": "qlora", "base_model": str(model_folder(name)), "compute_dtype": dtype, "max_steps": 12}
    run = train_here(make_run(folder, name=name, **(values | MIXED[name]), eval_steps=4))
    assert eval_losses(run)[12] < eval_losses(run)[0] - 0.1 and losses(run)[-1] < losses(run)[0]
    base = loading.load_base(run.base_model().folder, run.config(), device=CPU, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        expected = PeftModel.from_pretrained(base, run.adapter).eval()(input_ids=IDS).logits.float()
    apart = {}
    for onto in ("dequantized", "original"):
        merged = AutoModelForCausalLM.from_pretrained(merge_onto(run, onto), dtype=torch.bfloat16).eval()
        with torch.no_grad():
            apart[onto] = ((merged(input_ids=IDS).logits.float() - expected).norm() / expected.norm()).item()
    assert apart["dequantized"] < 0.012 and 2 * apart["dequantized"] < apart["original"]
    export = AutoModelForCausalLM.from_pretrained(export_nf4(run, "dequantized"))
    assert set(kinds(export).values()) == {"Linear4bit"}


def test_int8_layers_train_with_transformers_layers_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "FUSED_DEVICES", ("cpu",))
    (mixed := tmp_path / "mixed").mkdir()
    run = train_here(make_run(mixed, method="qlora", **MIXED["llama"], max_steps=2))
    (told_of,) = said(run, events.Started)
    assert (
        not told_of.fused and "other ones than linear ones of 4 or 16 bits, such as int8 ones" in told_of.fused_reason
    )
    assert problem_with(loaded(int8_modules="none")) is None, "4 and 16 bits are fused"


@pytest.mark.parametrize("changed", [{"use_dora": True}, {"activation_checkpointing": "full", "token_budget": 70}])
def test_what_else_a_run_may_be_works_on_int8_layers_too(changed: dict[str, Any], tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, method="qlora", **MIXED["llama"], max_steps=8, eval_steps=8, **changed))
    assert eval_losses(run)[8] < eval_losses(run)[0]


def test_adapters_of_one_mixed_base_combine_and_those_of_another_do_not(folder: Path) -> None:
    one, two, other = (
        train_here(make_run(folder, name=name, method="qlora", max_steps=2, eval_steps=2, seed=seed, **layers))
        for name, seed, layers in (
            ("one", 1, MIXED["llama"]),
            ("two", 2, MIXED["llama"]),
            ("other", 2, {"quantize_modules": ("attention@0", "mlp")}),
        )
    )
    run = combined([one, two], 1, 0)
    assert eval_losses(run)[0] == pytest.approx(eval_losses(one)[2], abs=1e-4)
    with pytest.raises(RunError) as caught:
        create_combined([one, other], [1, 1], method="svd", name="sum")
    (found,) = caught.value.problems
    assert "in 4 bits attention@0; in int8 v_proj@0 and mlp@1" in found and "in 4 bits attention@0 and mlp)" in found


# -- the row order


def test_a_row_order_of_its_own_changes_nothing_but_the_order(tmp_path: Path) -> None:
    runs = {}
    for name, values in {"plain": {}, "same": {"row_order_seed": 42}, "other": {"row_order_seed": 7}}.items():
        (tmp_path / name).mkdir()
        runs[name] = train_here(make_run(tmp_path / name, target_modules="q_proj@1", max_steps=3, **values))
    assert losses(runs["same"]) == losses(runs["plain"]) != losses(runs["other"])
    assert eval_losses(runs["other"])[0] == eval_losses(runs["plain"])[0]
    assert sum(losses(runs["other"])) == pytest.approx(sum(losses(runs["plain"])), rel=0.02), (
        "an epoch of the same rows"
    )
    starts = [loading.add_adapter(loaded(), c, base_name="x") for c in (config_of(), config_of(row_order_seed=7))]
    first, second = (loading.adapter_tensors(model) for model in starts)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {name.split(".")[4] for name in adapter(runs["other"])} == {"1"}


def test_the_estimate_sees_the_rows_in_that_order_too() -> None:
    lengths = [7 * number % 190 + 10 for number in range(150)]
    for config in (TrainConfig(seed=3), TrainConfig(seed=3, row_order_seed=11)):
        steps = [[lengths[i] for i in step_rows(150, 8, step, config.order_seed)] for step in range(1000)]
        assert memory.largest_pass(config, 10**9, lengths) == max(map(sum, steps))


# -- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merge_on_a_cpu_finds_the_weights_that_a_gpu_trained_with(name: str) -> None:
    config, folder = config_of(name), model_folder(name, torch.bfloat16)
    bases = [loading.load_base(folder, config, device=torch.device(kind), dtype="bf16") for kind in ("cuda", "cpu")]
    assert bases[0].is_loaded_in_4bit and bases[0].is_loaded_in_8bit
    on_gpu, on_cpu = (dequantized(base, torch.bfloat16).state_dict() for base in bases)
    assert all(torch.equal(tensor, on_gpu[key].cpu()) for key, tensor in on_cpu.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_every_way_of_training_a_mixed_base_on_a_gpu_gets_the_same_losses(tmp_path: Path) -> None:
    """4 and 16 bits fused; with int8 transformers' layers, which also recompute, offload and compile."""
    four, int8 = MIXED["llama"] | {"int8_modules": "none"}, MIXED["llama"]
    values = {"method": "qlora", "device": "cuda", "compute_dtype": "bf16", "learning_rate": 1e-3}
    runs = {}
    for name, changed in {
        "fused": four,
        "not fused": four | {"fused_layers": "off"},
        "int8": int8,
        "int8 offloaded": int8 | {"activation_checkpointing": "offloaded", "token_budget": 200},
        "int8 compiled": int8 | {"compile": "on"},
        "int8 on a CPU": int8 | {"device": "cpu"},
    }.items():
        (tmp_path / name).mkdir()
        runs[name] = train_here(make_run(tmp_path / name, **(values | changed)))
        (started,) = said(runs[name], events.Started)
        assert started.fused == (name == "fused") and started.compiled == (name == "int8 compiled"), started
    for name, run in runs.items():
        plain = runs["not fused" if name == "fused" else "int8"]
        assert losses(run) == pytest.approx(losses(plain), abs=0.05), name
        assert eval_losses(run) == pytest.approx(eval_losses(plain), abs=0.05), name
