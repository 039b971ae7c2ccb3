"""The memory estimate, each part against what PyTorch, bitsandbytes, PEFT and our own layers hold; and the plans it makes."""

import json
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planner import LLAMA_8B, SMALL
from tiny_models import model_folder
from transformers import AutoModelForCausalLM, LlamaConfig, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from qlora_core import config as settings
from qlora_core.activations import fused_pass, plain_pass
from qlora_core.config import TrainConfig
from qlora_core.footprint import adapter_bytes, allocated, nf4_bytes, optimizer_bytes, targeted_layers, weight_bytes
from qlora_core.memory import GIB, PASS_TOKENS, MemoryEstimate, Plan, Planned, choose_plan, estimate, largest_pass
from qlora_core.row_order import step_rows
from qlora_core.targets import Architecture
from qlora_core.worker.architecture import described, shape_of
from qlora_core.worker.fused import FusedModel
from qlora_core.worker.kernels import Rows
from qlora_core.worker.loading import add_adapter, load_base, trainable_parameters

CPU = torch.device("cpu")
PLAIN = Plan(fused=False, token_budget=8192, checkpointed_layers=0, offloaded=False)
FUSED = replace(PLAIN, fused=True)
LONG = (2048,) * 64


def told(name: str = "llama") -> Architecture:
    return Architecture.from_json(json.loads(json.dumps(described(model_folder(name)))))


def estimated(config: TrainConfig, plan: Plan = FUSED, *, shape: Architecture = LLAMA_8B, **changed) -> MemoryEstimate:
    known = {"row_lengths": LONG, "supervised_share": 1.0, "is_gpu": True, "dtype_bytes": 2}
    return estimate(shape, config, plan, **known | changed)


def planned(
    gib: float,
    *,
    shape: Architecture = LLAMA_8B,
    rows=LONG,
    is_gpu: bool = True,
    host_gib: float | None = None,
    **changed,
) -> Planned:
    config = TrainConfig(**{"method": "qlora", "rank": 16, "max_seq_length": 4096, "rows_per_step": 16} | changed)
    return choose_plan(
        shape, config, row_lengths=rows, supervised_share=1.0, is_gpu=is_gpu, dtype_bytes=2, usable_bytes=round(gib * GIB),
        can_fuse=True, host_bytes=None if host_gib is None else round(host_gib * GIB),
    )  # fmt: skip


# What is held, against the libraries


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_4_bit_weights_and_their_constants_are_those_of_bitsandbytes(name, double_quant):
    config = TrainConfig(method="qlora", double_quant=double_quant)
    model = load_base(model_folder(name), config, device=CPU, dtype="bf16")
    packed = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    states = [weight.quant_state for weight in packed]
    tensors = [
        tensor for s in states for tensor in (s.absmax, s.code, *([s.offset, s.state2.absmax] if s.nested else []))
    ]
    weights, constants = weight_bytes(told(name), config, 2)
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert constants == sum(allocated(tensor.numel() * tensor.element_size()) for tensor in tensors)


def test_4_bits_cost_the_published_4_127():
    assert 8 * nf4_bytes(10**9) / 10**9 == pytest.approx(4.127, abs=5e-4)
    weights, constants = weight_bytes(LLAMA_8B, TrainConfig(method="qlora"), 2)
    assert (weights + constants) / 1e9 == pytest.approx(5.70, rel=0.01), "measured on the 8B shape"


@pytest.mark.parametrize("changed", [{}, {"use_dora": True}, {"target_modules": "query-value"}])
def test_the_adapters_bytes_are_pefts(changed):
    config = TrainConfig(method="lora", rank=4, **changed)
    model = add_adapter(load_base(model_folder("llama"), config, device=CPU, dtype="fp32"), config, base_name="x")
    held = sum(parameter.numel() * parameter.element_size() for parameter in trainable_parameters(model))
    assert adapter_bytes(targeted_layers(told(), config), config, 4, fused=False) == held


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw_torch_fused", torch.optim.AdamW), ("adamw_8bit", bnb.optim.AdamW8bit)]
)
def test_the_optimizers_bytes_are_its_states(name, kind):
    """Of 8 bits: tensors below 4,096 elements keep 32."""
    config = TrainConfig(method="lora", rank=64, optimizer=name)
    model = add_adapter(load_base(model_folder("llama"), config, device=CPU, dtype="fp32"), config, base_name="x")
    parameters = trainable_parameters(model)
    optimizer = kind(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shared = {}
    for state in optimizer.state.values():
        shared |= {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for key, tensor in state.items()
            if isinstance(tensor, torch.Tensor) and "qmap" not in key
        }
    device, paged = optimizer_bytes(targeted_layers(told(), config), config, is_gpu=False, fused=False)
    assert (device, paged) == (pytest.approx(sum(shared.values()), rel=0.12), 0), "small tensors are rounded up"


def test_paged_states_lie_in_host_memory_from_100_000_elements_on():
    config = TrainConfig(optimizer="paged_adamw_32bit", rank=16)
    one_by_one = optimizer_bytes(targeted_layers(SMALL, config), config, is_gpu=True, fused=False)
    flat = optimizer_bytes(targeted_layers(SMALL, config), config, is_gpu=True, fused=True)
    assert one_by_one[1] == 0 < one_by_one[0], "every tensor of the 135M shape is small"
    assert flat[0] < 2000 < flat[1]
    assert estimated(config, shape=SMALL).host_bytes == flat[1]


# What a pass keeps, against autograd and our own layers


def tiny_llama(dtype: torch.dtype, layers: int) -> AutoModelForCausalLM:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return model


def kept_by_autograd(model: AutoModelForCausalLM, config: TrainConfig, *, tokens: int, packed: bool) -> int:
    """Bytes of the distinct tensors that one forward pass saves, apart from the model's own."""
    dtype, model = model.dtype, add_adapter(model, config, base_name="x").train()
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        small = tensor.dim() == 2 and config.rank in tensor.shape and tokens not in tensor.shape  # copies of A and B
        if storage.data_ptr() not in own and not small:
            seen[storage.data_ptr()] = storage
        return tensor

    ids, half = torch.randint(0, 512, (1, tokens)), torch.arange(tokens // 2)
    positions = torch.cat([half, half])[None] if packed else None
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(input_ids=ids, position_ids=positions, use_cache=False).logits.sum()
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("changed", [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"target_modules": "query-value"}])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_transformers_keeps_what_autograd_saves(dtype, packed, changed):
    config, tokens = TrainConfig(method="lora", rank=8, **changed), 256
    found = [kept_by_autograd(tiny_llama(dtype, n), config, tokens=tokens, packed=packed) for n in (2, 3)]
    shape = shape_of(tiny_llama(dtype, 2))
    sizes = shape, config, targeted_layers(shape, config), tokens, 1.0, dtype.itemsize
    expected = plain_pass(*sizes, masked=tokens if packed else 0, is_gpu=False)
    assert expected.layer == pytest.approx(found[1] - found[0], rel=0.03)


@pytest.mark.parametrize("int8", ["none", "all", "mlp,k_proj"])
def test_a_quantised_layer_keeps_what_autograd_saves(int8, tmp_path):
    config, tokens, found = TrainConfig(method="qlora", rank=8, int8_modules=int8), 256, []
    for layers in (2, 3):
        tiny_llama(torch.bfloat16, layers).save_pretrained(tmp_path / str(layers))
        model = load_base(tmp_path / str(layers), config, device=CPU, dtype="bf16")
        found.append(kept_by_autograd(model, config, tokens=tokens, packed=True))
    shape = shape_of(tiny_llama(torch.bfloat16, 2))
    sizes = shape, config, targeted_layers(shape, config), tokens, 1.0, 2
    assert plain_pass(*sizes, masked=tokens, is_gpu=False).layer == pytest.approx(found[1] - found[0], rel=0.03)


def test_a_model_that_was_loaded_by_its_text_part_is_described():
    """Auto classes know no such config."""
    config = MllamaTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        shape = shape_of(MllamaForCausalLM(config))
    assert (shape.layer_count, shape.hidden_size, shape.key_value_heads, shape.fusable) == (3, 64, 2, False)


@pytest.mark.parametrize(
    "held",
    [{"method": "lora"}, {"method": "qlora"}, {"quantize_modules": "k_proj@0,o_proj,down_proj@1"}],
    ids=["16 bits", "4 bits", "mixed"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_fused_layer_keeps_what_the_worker_keeps(name, held):
    """To the byte, but for the logarithms of attention's sums, which only a GPU's kernel keeps."""
    config, tokens, shape = TrainConfig(rank=8, **held), 48, told(name)
    model = add_adapter(load_base(model_folder(name), config, device=CPU, dtype="bf16"), config, base_name="x")
    fused = FusedModel(model, dropout=0.0, dtype=torch.bfloat16)
    x = torch.randn(tokens, shape.hidden_size, dtype=torch.bfloat16)
    cos, sin = fused.rotary(x[None], position_ids=torch.arange(tokens)[None])
    position = type("P", (), {"rows": Rows([tokens], CPU), "cos": cos[0], "sin": sin[0], "seed": None})
    with torch.no_grad():
        fused.refresh()
        _, kept = fused.layers[0].forward(x, position)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in vars(kept).values() if torch.is_tensor(t)}
    expected = fused_pass(shape, config, targeted_layers(shape, config), tokens, 1.0, 2)
    assert expected.layer - 4 * tokens * shape.attention_heads == sum(s.nbytes() for s in storages.values())
    # Of layers that share an input, one of them in 4 bits, one scratch tensor for all; 16-bit ones have their adapters beside.
    projections = [p for layer in fused.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    scratch = {p.whole.untyped_storage().nbytes() for p in projections if not p.is_held}
    beside = sum(p.whole.numel() - p.outputs * p.inputs for p in projections if p.is_held)
    assert (expected.buffers, expected.copies) == (sum(scratch), 2 * beside)
    assert len(scratch) == (config.method == "qlora")
    held = fused.adapters.weights.numel() * 4 + fused.adapters.copies.numel() * 2
    assert adapter_bytes(targeted_layers(shape, config), config, 2, fused=True) == held


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_the_largest_pass_is_that_of_the_workers_own_order(packing):
    lengths = [7 * number % 190 + 10 for number in range(150)]
    config = TrainConfig(rows_per_step=8, packing=packing)
    steps = [[lengths[i] for i in step_rows(len(lengths), 8, step, config.seed)] for step in range(1000)]
    largest = max(sum(rows) if packing == "auto" else max(rows) * len(rows) for rows in steps)
    assert largest_pass(config, 10**9, lengths) == largest
    assert largest_pass(config, 500, lengths) == 500
    assert largest_pass(config, 50, lengths) == max(lengths), "a row is never parted"


# The estimate as a whole


@pytest.mark.parametrize(("method", "measured_gib"), [("lora", 1.13), ("qlora", 0.89)], ids=["LoRA", "QLoRA"])
def test_the_demo_on_an_h100_is_within_a_tenth(method, measured_gib):
    """README: transformers' layers, SmolLM2-135M, 799 tokens in the largest pass, of which 30 % are learnt."""
    shape = replace(SMALL, parameters=134_515_008)
    config = TrainConfig(method=method, rank=8)
    rows = {"row_lengths": (399, 400), "supervised_share": 0.304}
    assert estimated(config, PLAIN, shape=shape, **rows).total_bytes / GIB == pytest.approx(measured_gib, rel=0.1)


@pytest.mark.parametrize("is_gpu", [True, False])
@pytest.mark.parametrize("recomputed", [0, 16, 32])
def test_the_parts_add_up_and_the_context_comes_on_top(recomputed, is_gpu):
    plan = replace(FUSED, fused=is_gpu, checkpointed_layers=recomputed)
    found = estimated(TrainConfig(method="qlora"), plan, is_gpu=is_gpu)
    assert found.total_bytes == sum(found.parts().values())
    assert found.needed_bytes == found.total_bytes + found.context_bytes
    assert all(size >= 0 for size in found.parts().values())
    assert (found.context_bytes > 0, found.libraries_bytes > 0) == (is_gpu, not is_gpu)


def test_qlora_saves_weights_alone():
    lora, qlora = (estimated(TrainConfig(method=method)) for method in ("lora", "qlora"))
    assert qlora.weights_bytes < 0.4 * lora.weights_bytes and lora.quantisation_constants_bytes == 0
    assert qlora.activations_bytes == lora.activations_bytes


def test_recomputing_and_offloading_each_take_less():
    plans = [FUSED, *(replace(FUSED, checkpointed_layers=count) for count in (8, 31, 32))]
    plans.append(replace(plans[-1], offloaded=True))
    found = [estimated(TrainConfig(), plan) for plan in plans]
    needed = [entry.needed_bytes for entry in found]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    assert found[-1].host_bytes == 32 * 8192 * 4096 * 2 and found[-2].host_bytes == 0


SIZES = st.tuples(st.integers(1, 300), st.integers(8, 4096))
CONFIGS = st.builds(
    TrainConfig,
    method=st.sampled_from(["lora", "qlora"]),
    rank=st.sampled_from([1, 4, 8, 64, 256]),
    lora_dropout=st.sampled_from([0.0, 0.1]),
    target_modules=st.sampled_from(["all-linear", "attention", "query-value"]),
    optimizer=st.sampled_from(["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]),
    rows_per_step=st.sampled_from([1, 4, 16, 128]),
    activation_checkpointing=st.sampled_from(["auto", "none", "full", "offloaded"]),
    token_budget=st.sampled_from([None, 300, 20_000]),
    packing=st.sampled_from(["auto", "off"]),
)


@given(config=CONFIGS, sizes=SIZES, is_gpu=st.booleans(), fused=st.booleans(), learnt=st.floats(0, 1))
def test_more_tokens_and_a_higher_rank_never_take_less(config, sizes, is_gpu, fused, learnt):
    count, length = sizes
    plan = replace(FUSED, fused=fused and is_gpu)
    known = {"is_gpu": is_gpu, "supervised_share": learnt, "shape": SMALL}
    here = estimated(config, plan, row_lengths=(length,) * count, **known).needed_bytes
    assert here <= estimated(config, plan, row_lengths=(length + 64,) * count, **known).needed_bytes
    higher = settings.replace(config, rank=2 * config.rank, optimizer="adamw_torch_fused")
    same = settings.replace(config, optimizer="adamw_torch_fused")
    here = estimated(same, plan, row_lengths=(length,) * count, **known).needed_bytes
    assert here <= estimated(higher, plan, row_lengths=(length,) * count, **known).needed_bytes


# The plan


def test_with_much_memory_nothing_is_given_up():
    found = planned(80)
    assert found.fits and found.plan == replace(FUSED, token_budget=8192)
    assert found.reason == "passes of up to 8,192 tokens, nothing is recomputed"


def test_with_less_memory_the_cheapest_things_go_first():
    """Smaller passes, then a few layers, then all, then host memory, then the smallest passes."""
    given_up = []
    for gib in (80, 25, 14, 11, 9.5, 8.3, 7.9, 7.4, 7.0):
        found = planned(gib, rows=(512,) * 64)
        if not found.fits:
            break
        assert found.estimate.needed_bytes <= gib * GIB
        given_up.append((-found.plan.token_budget, found.plan.checkpointed_layers, found.plan.offloaded))
    assert given_up == sorted(given_up, key=lambda plan: (plan[2], plan[1], plan[0]))
    budgets, layers = [-plan[0] for plan in given_up], [plan[1] for plan in given_up]
    assert 8192 in budgets and 2048 in budgets
    assert any(0 < count < 32 for count in layers) and given_up[-1][1] == 32


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"token_budget": 6000}, lambda plan: plan.token_budget == 6000),
        ({"activation_checkpointing": "none"}, lambda plan: plan.checkpointed_layers == 0),
        ({"activation_checkpointing": "full"}, lambda plan: plan.checkpointed_layers == 32 and not plan.offloaded),
        ({"activation_checkpointing": "offloaded"}, lambda plan: plan.checkpointed_layers == 32 and plan.offloaded),
        ({"fused_layers": "off"}, lambda plan: not plan.fused),
    ],
)
@pytest.mark.parametrize("gib", [80, 12, 2])
def test_what_a_person_sets_is_kept_however_little_memory_there_is(changed, kept, gib):
    assert kept(planned(gib, **changed).plan)


def test_a_budget_holds_where_there_is_more():
    found = planned(80, memory_budget_gib=12.0)
    assert found.fits and found.estimate.needed_bytes <= 12 * GIB < planned(80).estimate.needed_bytes


def test_where_nothing_fits_the_least_is_told_with_what_would_help():
    found = planned(4, method="lora", rank=64)
    assert not found.fits and found.reason.startswith("does not fit: ") and "4.0 may be used" in found.reason
    for remedy in ("QLoRA", "a lower rank than 64", "8-bit or paged optimizer", "shorter rows"):
        assert remedy in found.reason
    assert found.plan.offloaded and found.plan.token_budget == 2048, "the longest row"
    spent = planned(1, method="qlora", rank=8, optimizer="paged_adamw_8bit").reason
    assert not any(word in spent for word in ("QLoRA", "rank", "optimizer"))


def test_nothing_is_offloaded_to_a_host_without_room():
    assert planned(7.5).plan.offloaded and not planned(7.5, host_gib=0.2).plan.offloaded
    asked = planned(80, host_gib=0.2, activation_checkpointing="offloaded")
    assert not asked.fits and "0.2 are free" in asked.reason and "no offloading" in asked.reason


def test_a_cpu_has_smaller_passes_and_no_second_memory():
    found = planned(40, shape=SMALL, rows=(100,) * 64, is_gpu=False)
    assert found.fits and found.plan == replace(PLAIN, token_budget=PASS_TOKENS[False][0])
    least = planned(0.1, shape=SMALL, rows=(100,) * 64, is_gpu=False, activation_checkpointing="offloaded")
    assert not least.fits and least.estimate.host_bytes == 0


@given(config=CONFIGS, sizes=SIZES, is_gpu=st.booleans(), gib=st.floats(0.5, 100))
def test_a_plan_fits_or_says_that_it_does_not(config, sizes, is_gpu, gib):
    count, length = sizes
    known = {"row_lengths": (length,) * count, "supervised_share": 0.5, "is_gpu": is_gpu, "dtype_bytes": 2}
    found = choose_plan(LLAMA_8B, config, **known, usable_bytes=round(gib * GIB), can_fuse=True)
    assert found.fits == (found.estimate.needed_bytes <= round(gib * GIB))
    assert found.estimate == estimate(LLAMA_8B, config, found.plan, **known)
    if found.fits:
        more = choose_plan(LLAMA_8B, config, **known, usable_bytes=round((gib + 1) * GIB), can_fuse=True)
        assert more.fits and more.plan.checkpointed_layers <= found.plan.checkpointed_layers
        assert more.plan.token_budget >= found.plan.token_budget
