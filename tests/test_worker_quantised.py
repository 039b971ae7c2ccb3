"""Base models as the worker loads them: 4 bits as asked for, safetensors only, and whole after an evaluation on a CPU."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_models import eval_losses, losses, make_run, model_folder, train_here
from transformers import AutoModelForCausalLM

from qlora_core import devices
from qlora_core.config import TrainConfig
from qlora_core.errors import ModelError
from qlora_core.worker import hardware, loading
from qlora_core.worker.batches import Row, loss_sum, make_pass
from qlora_core.worker.evaluation import evaluation_loss

CPU = torch.device("cpu")
ROWS = [Row(1, tuple(range(5, 45)), (True,) * 40), Row(2, tuple(range(90, 120)), (False,) * 10 + (True,) * 20)]


def quantised(**changed: Any) -> Any:
    config = TrainConfig(**({"method": "qlora", "compute_dtype": "bf16", "rank": 4} | changed))
    return config, loading.load_base(model_folder(), config, device=CPU, dtype=config.compute_dtype)


def four_bit_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def gradients_of_a_step(*, evaluate_first: bool) -> dict[str, torch.Tensor]:
    config, base = quantised()
    model = loading.add_adapter(base, config, base_name="tiny").train()
    with torch.no_grad():  # B starts at zero, then A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    with torch.autocast("cpu", torch.bfloat16):
        if evaluate_first:
            evaluation_loss(model, ROWS, token_budget=100, packed=True, device=CPU)
        loss_sum(model, make_pass(ROWS, packed=True, device=CPU)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_an_evaluation_leaves_later_gradients_as_they_are() -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on CPUs with AVX512-BF16; gradients are then silently wrong."""
    untouched, evaluated = (gradients_of_a_step(evaluate_first=flag) for flag in (False, True))
    assert len(untouched) == 28 and untouched.keys() == evaluated.keys()  # A and B of 7 layers in 2 blocks
    for name, gradient in untouched.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, evaluated[name]), name


@pytest.mark.skipif("avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="this CPU repacks nothing")
@pytest.mark.filterwarnings("ignore:bitsandbytes.*gemv_4bit")
def test_the_corruption_is_still_there_without_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, bitsandbytes has mended it and forbid_cpu_repacking can go."""
    untouched = gradients_of_a_step(evaluate_first=False)
    monkeypatch.setattr(loading, "forbid_cpu_repacking", lambda model: None)
    broken = gradients_of_a_step(evaluate_first=True)
    off = [name for name, gradient in untouched.items() if (broken[name] - gradient).norm() > 0.1 * gradient.norm()]
    assert off


def test_no_layer_may_repack_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layers = four_bit_layers(quantised()[1])
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantisation_is_what_the_config_says(quant_type: str, double_quant: bool, dtype: str) -> None:
    """transformers' own defaults are fp4, single quantisation and fp32."""
    _, model = quantised(quant_type=quant_type, double_quant=double_quant, compute_dtype=dtype)
    layers = four_bit_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == (
            quant_type,
            double_quant,
            hardware.DTYPES[dtype],
        )
        assert layer.weight.dtype == torch.uint8
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_input_embeddings().weight.dtype == hardware.DTYPES[dtype]  # frozen weights are not upcast


def test_the_default_of_qlora_is_nf4_with_double_quantisation() -> None:
    config = TrainConfig()
    assert (config.method, config.quant_type, config.double_quant) == ("qlora", "nf4", True)


def test_lora_and_qlora_of_one_seed_start_from_the_same_adapter() -> None:
    found = []
    for method in ("lora", "qlora"):
        config, base = quantised(method=method)
        model = loading.add_adapter(base, config, base_name="tiny")
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) and p.dtype == torch.float32 for name, p in found[1].items())


def test_four_bits_change_the_model_and_less_so_in_nf4() -> None:
    ids = torch.tensor([ROWS[0].token_ids])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)(input_ids=ids).logits
        apart = {
            kind: (quantised(quant_type=kind, compute_dtype="fp32")[1](input_ids=ids).logits - plain).norm()
            / plain.norm()
            for kind in ("nf4", "fp4")
        }
    assert 0.005 < apart["nf4"] < apart["fp4"] < 0.5


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """Also where they appear after the folder was checked."""
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder(), folder)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \.safetensors weights.*safe_serialization"):
        make_run(tmp_path, base_model=str(folder))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_base(folder, TrainConfig(method="lora"), device=CPU, dtype="fp32")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"damaged: cannot be loaded"):
        train_here(make_run(tmp_path, base_model=str(folder)))


def test_bf16_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda has=has: has)
        assert hardware.choose_dtype(TrainConfig(), CPU) == dtype


def test_qlora_learns_in_bf16_on_a_cpu(tmp_path: Path) -> None:
    """Evaluations between the steps included."""
    run = train_here(make_run(tmp_path, method="qlora", compute_dtype="bf16", max_steps=12, eval_steps=2))
    found = eval_losses(run)
    assert found[12] < found[0] - 0.1 and losses(run)[-1] < losses(run)[0]
