"""Fused decoder layers on a CPU in fp32: gradients as autograd's through PEFT, dropout, optimizers; refused where wrong."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from test_worker_equality import conversation
from test_worker_variants import VARIANTS, loss_when_loaded
from tiny_models import (
    SHAPES,
    VOCABULARY,
    StopAfter,
    adapter,
    adapter_bytes,
    dataset,
    eval_losses,
    losses,
    make_run,
    model_folder,
    said,
    tokenizer,
    train_here,
)
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_core import events
from qlora_core.config import TrainConfig, replace
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run
from qlora_core.worker import fused, fused_layer, hardware, kernels, loading, passes
from qlora_core.worker.batches import Pass, Row, forward_logits, loss_sum, make_pass
from qlora_core.worker.packed import Packed
from qlora_core.worker.projections import Projection

CPU = torch.device("cpu")
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
TARGETS: tuple[Any, ...] = ("all-linear", ("q_proj", "down_proj"), ("v_proj",), ("k_proj", "o_proj", "up_proj"))
# Relative to the norm of each tensor's gradient, in fp32. Largest seen: 3e-6.
GRADIENT_BOUND = 1e-4


@pytest.fixture(autouse=True)
def fused_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "FUSED_DEVICES", ("cuda", "cpu"))


def rows_of_lengths(lengths: list[int], *, seed: int = 0) -> list[Row]:
    """Random tokens, of which about half are learnt, one at least."""
    chance = random.Random(seed)
    return [
        Row(
            line,
            tuple(chance.randrange(VOCABULARY) for _ in range(length)),
            tuple(i == length - 1 or chance.random() < 0.5 for i in range(length)),
        )
        for line, length in enumerate(lengths)
    ]


def supervised_in(rows: list[Row]) -> int:
    return sum(row.supervised_tokens for row in rows)


def pass_of(rows: list[Row], device: torch.device = CPU) -> Pass:
    return make_pass(rows, packed=True, device=device)


def randomise(model: nn.Module, names: tuple[str, ...], *, around: float, spread: float, seed: int) -> None:
    """Numbers that bf16 holds too, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            numbers = around + spread * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(numbers.bfloat16())


def model_with_adapter(
    architecture: str = "llama",
    *,
    folder: Path | None = None,
    unquantised: str | None = None,
    device: torch.device = CPU,
    dtype: str = "fp32",
    **config: Any,
) -> Any:
    """Norms, adapters and biases hold random numbers: no error hides behind a one or a zero. `unquantised`: the name of the
    linear layers that keep 16 bits."""
    config = TrainConfig(**({"method": "lora", "rank": 4} | config))
    base = loading.load_base(folder or model_folder(architecture), config, device=device, dtype=dtype)
    if unquantised:
        plain = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=hardware.DTYPES[dtype])
        for name, layer in plain.named_modules():
            if name.endswith(unquantised):
                base.set_submodule(name, layer.to(device).requires_grad_(False))
    randomise(base, ("norm",), around=1, spread=0.2, seed=1)
    model = loading.add_adapter(base, config, base_name="tiny")
    randomise(model, ("lora_B",), around=0, spread=0.05, seed=2)
    return model.train()


def fused_model(model: Any, **values: Any) -> fused.FusedModel:
    made = fused.FusedModel(model, **({"dropout": 0.0, "dtype": torch.float32} | values))
    made.refresh()
    return made


def gradients_in(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_autograd(model: Any, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the mean over all supervised tokens, row by row through PEFT."""
    total, supervised, device = 0.0, supervised_in(rows), next(model.parameters()).device
    for row in rows:
        loss = loss_sum(model, pass_of([row], device)) / supervised
        loss.backward()
        total += loss.item()
    found = gradients_in(model)
    model.zero_grad(set_to_none=True)
    return total, found


def by_hand(
    made: fused.FusedModel, rows: list[Row], *, apart: bool = False, seed: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of fused layers, all rows in one pass or each in its own."""
    made.adapters.gradients.zero_()
    supervised, device = supervised_in(rows), made.head.device
    batches = [pass_of([row], device) for row in rows] if apart else [pass_of(rows, device)]
    total = sum(made.backward(batch, supervised=supervised, seed=seed).item() for batch in batches)
    return total, gradients_in(made.model)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        # A gradient that is all but zero is rounding: it is measured by the largest one's.
        assert (found[name] - gradient).norm() < GRADIENT_BOUND * max(gradient.norm().item(), 1e-3 * largest), name


# -- gradients


@dataclass(frozen=True)
class Case:
    architecture: str
    method: str
    rank: int
    target_modules: str | tuple[str, ...]
    lengths: list[int]
    checkpointed_layers: int
    apart: bool
    unquantised: str | None = None


def cases() -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        architecture=st.sampled_from(FAMILY),
        method=st.sampled_from(["lora", "qlora"]),
        rank=st.integers(1, 17),
        target_modules=st.sampled_from(TARGETS),
        lengths=st.lists(st.integers(2, 50), min_size=1, max_size=5),
        checkpointed_layers=st.integers(0, 2),
        apart=st.booleans(),
        unquantised=st.sampled_from([None, "q_proj", "up_proj", "o_proj"]),
    )


@example(Case("llama", "lora", 8, "all-linear", [40, 2, 17], 0, False))
@example(Case("mistral", "qlora", 3, ("v_proj",), [50, 30], 1, False))
@example(Case("qwen2", "qlora", 5, ("q_proj", "down_proj"), [9, 9, 21], 2, True))
@example(Case("qwen3", "lora", 13, "all-linear", [33, 4], 1, False))
@example(Case("qwen3", "qlora", 3, "all-linear", [33, 4], 2, False, "v_proj"))
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(case=cases())
def test_loss_gradients_and_logits_are_those_of_autograd_through_peft(case: Case) -> None:
    model = model_with_adapter(
        case.architecture,
        unquantised=case.unquantised,
        method=case.method,
        rank=case.rank,
        target_modules=case.target_modules,
    )
    rows = rows_of_lengths(case.lengths)
    expected_loss, expected = by_autograd(model, rows)
    with torch.no_grad():
        logits = torch.cat([forward_logits(model, pass_of([row])) for row in rows], dim=1)
    made = fused_model(model)
    made.checkpointed_layers = case.checkpointed_layers
    loss, found = by_hand(made, rows, apart=case.apart)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)
    assert made.loss_sum(pass_of(rows)).item() == pytest.approx(loss * supervised_in(rows), rel=1e-5)
    torch.testing.assert_close(made.logits(pass_of(rows)), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 48, "rms_norm_eps": 0.1}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
        ("granite", {"attention_multiplier": 0.4}),
    ],
    ids=["a window in one layer of two", "biases", "one key head", "YaRN", "another scale"],
)  # fmt: skip
def test_what_a_config_changes_reaches_the_gradients(architecture: str, values: dict[str, Any], tmp_path: Path) -> None:
    model, plain = (
        model_with_adapter(folder=own_folder(tmp_path / n, architecture, **v))
        for n, v in {"changed": values, "plain": {}}.items()
    )
    rows = rows_of_lengths([40, 25])
    expected_loss, expected = by_autograd(model, rows)
    assert expected_loss != pytest.approx(by_autograd(plain, rows)[0], abs=1e-3), "else it would prove nothing"
    loss, found = by_hand(fused_model(model), rows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)


def own_folder(folder: Path, architecture: str, **values: Any) -> Path:
    """A random model of a config of its own; biases too are random. bf16 holds all its numbers."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "pad_token_id": 0, "head_dim": 16, **SHAPES["llama"]}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**(shape | values)), dtype=torch.float32)
    randomise(model, ("proj.weight",), around=0, spread=0.08, seed=3)
    randomise(model, ("proj.bias",), around=0, spread=0.1, seed=4)
    model.bfloat16().float().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_many_logits_in_parts_give_the_loss_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_with_adapter(), rows_of_lengths([50, 41, 13])
    made = fused_model(model)
    whole = by_hand(made, rows)
    monkeypatch.setattr(fused, "LOGITS_BYTES", VOCABULARY * 4 * 7)
    monkeypatch.setattr(fused, "ROWS", 7)  # does not divide the supervised tokens
    assert supervised_in(rows) % 7
    parts = by_hand(made, rows)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert_same_gradients(parts[1], whole[1])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_an_optimizer_or_a_checkpoint_writes_is_what_the_next_pass_computes_with(method: str) -> None:
    """Parameters are views of the flat tensors, and products are made with copies."""
    model, rows = model_with_adapter(method=method), rows_of_lengths([20, 30])
    begun = {name: tensor.clone() for name, tensor in loading.adapter_tensors(model).items()}
    made = fused_model(model)
    before = by_hand(made, rows)[0]
    with torch.no_grad():
        for flat in made.adapters.flat:
            flat.mul_(1.5)
    made.refresh()
    changed = by_hand(made, rows)[0]
    assert changed != pytest.approx(before, abs=1e-3)
    assert changed == pytest.approx(plain_loss(model, rows), rel=1e-5)
    set_peft_model_state_dict(model, begun)
    made.refresh()
    assert by_hand(made, rows)[0] == before


@pytest.mark.parametrize("unquantised", [None, "q_proj"])
def test_what_lay_in_the_scratch_tensor_before_is_not_multiplied_with(unquantised: str | None) -> None:
    """Its memory is not cleared: 0 x nan, in columns that only fill up a rank of 3 x 3 to 16, would be nan."""
    model, rows = model_with_adapter(method="qlora", rank=3, unquantised=unquantised), rows_of_lengths([20, 30])
    made = fused_model(model)
    expected_loss, expected = by_hand(made, rows)
    for layer in made.layers:
        layer.down.whole.fill_(float("nan"))
        layer.gate_up.whole.fill_(float("nan"))
    loss, found = by_hand(made, rows)
    assert loss == expected_loss
    assert_same_gradients(found, expected)


def plain_loss(model: Any, rows: list[Row]) -> float:
    with torch.no_grad():
        return sum(loss_sum(model, pass_of([row])).item() for row in rows) / supervised_in(rows)


# -- dropout

DROPOUT = 0.3


def model_that_drops(**config: Any) -> fused.FusedModel:
    return fused_model(model_with_adapter("qwen3", rank=5, **config), dropout=DROPOUT)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_layer_that_is_computed_again_drops_the_same(method: str) -> None:
    made, rows = model_that_drops(method=method), rows_of_lengths([30, 22])
    kept = by_hand(made, rows, seed=7)
    assert by_hand(made, rows, seed=8)[0] != pytest.approx(kept[0], abs=1e-5)
    for made.checkpointed_layers in (0, 1, 2):
        again = by_hand(made, rows, seed=7)
        assert again[0] == kept[0]
        assert_same_gradients(again[1], kept[1])


@pytest.mark.parametrize("targets", ["all-linear", ("k_proj",), ("o_proj",), ("up_proj",), ("down_proj",)])
def test_gradients_under_dropout_are_slopes_of_the_loss_under_the_same_dropout(targets: Any) -> None:
    """Measured along the gradient of each tensor by itself; the largest error seen is 0.4%."""
    made, rows = model_that_drops(target_modules=targets), rows_of_lengths([30, 22])
    _, gradients = by_hand(made, rows, seed=7)
    parameters = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        norm = gradient.norm().item()
        if "layers.1" in name or targets != "all-linear":
            slope = slope_along(made, rows, parameters[name], gradient / norm, reach=min(0.02, 0.02 / norm))
            assert slope == pytest.approx(norm, rel=0.02), name


def slope_along(
    made: fused.FusedModel, rows: list[Row], parameter: nn.Parameter, direction: torch.Tensor, *, reach: float
) -> float:
    """(loss a little further - loss a little back) / the way between them."""
    found, begun = [], parameter.data.clone()
    for way in (reach, -reach):
        parameter.data.copy_(begun + way * direction)
        made.refresh()
        found.append(by_hand(made, rows, seed=7)[0])
    parameter.data.copy_(begun)
    made.refresh()
    return (found[0] - found[1]) / (2 * reach)


def test_the_share_that_is_dropped_is_the_one_asked_for_and_the_rest_makes_up_for_it() -> None:
    ones = torch.ones(400, 500)
    for share in (0.1, 0.5):
        dropped = kernels.dropout(ones, share, 3)
        assert (dropped == 0).float().mean() == pytest.approx(share, abs=0.005)
        torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - share)]))
        assert torch.equal(kernels.dropout(ones, share, 3, onto=ones * 2), dropped + 2)


def test_every_layer_place_step_and_pass_drops_others() -> None:
    made, seen = model_that_drops(), []
    for seed in (42, 43, 42 + 65_537):
        position = fused_layer.Position(None, None, None, seed)
        seen += [seed for layer in made.layers for seed in layer.seeds(position)]
    assert len(seen) == len(set(seen)) == 3 * 2 * 4


def test_the_passes_of_a_run_drop_others_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, whole = [], fused.FusedModel.backward

    def backward(self: fused.FusedModel, batch: Pass, *, supervised: int, seed: int) -> torch.Tensor:
        seeds.append(seed)
        return whole(self, batch, supervised=supervised, seed=seed)

    monkeypatch.setattr(fused.FusedModel, "backward", backward)
    train_here(make_run(tmp_path, token_budget=8, rows_per_step=4, max_steps=3, lora_dropout=DROPOUT))
    assert len(seeds[-12:]) == len(set(seeds[-12:])) == 12  # before them, the warm-up


def test_nothing_is_dropped_in_an_evaluation() -> None:
    made, rows = model_that_drops(), rows_of_lengths([30, 22])
    expected = plain_loss(made.model.eval(), rows) * supervised_in(rows)
    assert made.loss_sum(pass_of(rows)).item() == pytest.approx(expected, rel=1e-5)
    assert by_hand(made, rows, seed=7)[0] * supervised_in(rows) != pytest.approx(expected, rel=1e-4)


# -- layers that compute something else

Patch = Callable[[pytest.MonkeyPatch], None]


def kernel_with(name: str, **changed: Any) -> Patch:
    """That kernel, called with other settings than the layer says."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, **named: whole(*given, **(named | changed)))

    return patch


def norms_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, weight, *a, **n: whole(x, torch.ones_like(weight), *a, **n))


def gate_and_up_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda gate_up, out: whole(gate_up.roll(gate_up.shape[1] // 2, 1), out))


def rows_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.Rows
    monkeypatch.setattr(kernels, "Rows", lambda lengths, *given, **named: whole([sum(lengths)], *given, **named))


def no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Projection, "_bias", lambda self: None)


def no_head_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "HEAD_NORMS", ())
    monkeypatch.setattr(fused, "problem_with", lambda model: None)


BROKEN: dict[str, tuple[str, Patch]] = {
    "rotated the other way": ("llama", kernel_with("rotate", backward=True)),
    "another scale of attention": ("llama", kernel_with("attention", scale=0.2)),
    "norms without weights": ("llama", norms_without_weights),
    "gate and up exchanged": ("llama", gate_and_up_exchanged),
    "rows that see each other": ("llama", rows_that_see_each_other),
    "no window": ("mistral", kernel_with("attention", window=None)),
    "a window too narrow by one": ("mistral", kernel_with("attention", window=15)),
    "no bias": ("qwen2", no_bias),
    "no norms of heads": ("qwen3", no_head_norms),
}


def random_base(folder: Path, architecture: str) -> str:
    """With norms whose weights are not all one."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    randomise(model, ("norm",), around=1, spread=0.2, seed=1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("fault", BROKEN)
def test_layers_that_compute_otherwise_are_refused_and_the_run_goes_on_without(
    fault: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, patch = BROKEN[fault]
    values = {"method": method, "base_model": random_base(tmp_path / "base", architecture), "max_steps": 3}
    plain = train_here(make_run(made_folder(tmp_path / "plain"), fused_layers="off", **values))
    patch(monkeypatch)
    run = train_here(make_run(made_folder(tmp_path / "run"), **values))
    started = said(run, events.Started)[0]
    assert not started.fused and started.fused_reason.startswith("transformers' layers: logits differ from")
    assert_same_run(run, plain)


FAILING = {
    "going forward": ("attention", RuntimeError("no kernel image"), "no kernel image"),
    "going back": ("attention_backward", RuntimeError("no kernel image"), "no kernel image"),
    "whatever its length": ("attention", torch.OutOfMemoryError(), "there is no memory to prove fused ones"),
}


@pytest.mark.parametrize("case", FAILING)
def test_layers_that_do_not_run_here_are_refused_before_the_first_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, error, words = FAILING[case]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    plain = train_here(make_run(made_folder(tmp_path / "plain"), fused_layers="off", max_steps=3))
    monkeypatch.setattr(kernels, name, fail)
    run = train_here(make_run(made_folder(tmp_path / "run"), max_steps=3))
    started = said(run, events.Started)[0]
    assert (
        not started.fused
        and started.fused_reason.startswith("transformers' layers: ")
        and words in started.fused_reason
    )
    assert_same_run(run, plain)


def test_where_long_rows_have_no_memory_for_the_proof_short_ones_prove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, whole = [], fused.proof

    def short_of_memory(built: Any, model: Any, pair: list[Pass], together: Pass) -> tuple[bool, str]:
        lengths.append(together.tokens)
        if max(together.lengths) > passes.PROOF_TOKENS:
            raise torch.OutOfMemoryError
        return whole(built, model, pair, together)

    monkeypatch.setattr(fused, "proof", short_of_memory)
    rows = [{"prompt": "long " * 60, "completion": "yes"}, *dataset(12)]
    run = train_here(make_run(tmp_path, train_rows=rows, max_seq_length=256, max_steps=1))
    assert said(run, events.Started)[0].fused and len(lengths) == 2 and lengths[1] <= 2 * passes.PROOF_TOKENS


def made_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def assert_same_run(run: Run, expected: Run) -> None:
    assert run.status().state == FINISHED
    assert losses(run) == pytest.approx(losses(expected), abs=1e-5)
    assert eval_losses(run) == pytest.approx(eval_losses(expected), abs=1e-5)


REFUSED = {
    "GPT-2": ({"base_model": "gpt2"}, "fused ones are proven for Llama, Mistral.*not for GPT2LMHeadModel"),
    "Gemma 2": ({"base_model": "gemma2"}, "fused ones are proven for .*not for Gemma2ForCausalLM"),
    "DoRA": ({"use_dora": True}, "fused ones know no DoRA"),
    "QLoRA with DoRA": ({"use_dora": True, "method": "qlora"}, "fused ones know no DoRA"),
    "padding": ({"packing": "off"}, "fused ones always pack, and packing is off"),
    "turned off": ({"fused_layers": "off"}, "fused_layers is off"),
    "an adapter of the head": (
        {"base_model": "untied", "target_modules": ("q_proj", "lm_head")},
        "its head has a bias, or head or embedding an adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused_says_why_and_trains_as_before(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, words = REFUSED[case]
    values = (
        {"base_model": base_of(tmp_path / "base", values.get("base_model", "llama"))}
        | {"max_steps": 3}
        | {name: value for name, value in values.items() if name != "base_model"}
    )
    run = train_here(make_run(made_folder(tmp_path / "run"), **values))
    started = said(run, events.Started)[0]
    assert not started.fused and re.fullmatch(f"transformers' layers: {words}.*", started.fused_reason)
    assert started.fused_reason in str(run.result())
    monkeypatch.setattr(passes, "FUSED_DEVICES", ())
    assert_same_run(run, train_here(make_run(made_folder(tmp_path / "plain"), **values)))


def base_of(folder: Path, architecture: str) -> str:
    """A tiny model, or "untied": a Llama whose head is a layer of its own."""
    return str(own_folder(folder, "llama") if architecture == "untied" else model_folder(architecture))


def test_on_a_cpu_layers_are_not_fused_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = train_here(make_run(tmp_path, max_steps=1))
    assert said(run, events.Started)[0].fused_reason == "transformers' layers: on a CPU, fused ones are no faster"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_row_are_refused(rope_type: str, tmp_path: Path) -> None:
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 140}
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0} | (
        factors if rope_type == "longrope" else {}
    )
    base = own_folder(tmp_path / "base", "llama", rope_parameters=parameters)
    run = train_here(make_run(tmp_path, base_model=str(base), max_steps=1))
    assert "follow the longest row of a pass" in said(run, events.Started)[0].fused_reason


# Built like Llama, module for module; what of it computes otherwise, the proof alone can see.
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "CWM": ("cwm", {}),
    "Ernie": ("ernie4_5", {}),
    "Flint": ("flint", {}),
    "Granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "Granite with another scale of logits": ("granite", {"logits_scaling": 4.0}),
    "Helium": ("helium", {}),
    "InternLM": ("internlm3", {}),
    "Ministral": ("ministral", {}),
    "Ministral 3": ("ministral3", {}),
    "Seed": ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Gemma with SiLU": ("gemma", {"hidden_activation": "silu", "hidden_act": "silu"}),
    "Seed with its dropout": ("seed_oss", {}),
    "Llama with dropout in attention": ("llama", {"attention_dropout": 0.2}),
    "Llama whose config holds a window that it ignores": ("llama", {"sliding_window": 150}),
    "Mistral with a window longer than the proof's rows": ("mistral", {"sliding_window": 150}),
    "Qwen 3 with such a window in a layer": (
        "qwen3",
        {"sliding_window": 150, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "Ministral 3 past the positions that it was pretrained on": (
        "ministral3",
        {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 140,
                "llama_4_scaling_beta": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_model_built_like_llama_trains_as_with_transformers_whether_fused_or_refused(
    name: str, tmp_path: Path
) -> None:
    """On rows of 150 to 250 tokens, longer than those of the proof."""
    architecture, changed = ALIKE[name]
    values = {
        "base_model": str(own_folder(tmp_path / "base", architecture, **changed)),
        "train_rows": [conversation(i, 100 + 10 * i, 30 + 5 * i) for i in range(8)],
        "eval_rows": [conversation(9, 180, 50)],
        "max_steps": 2,
    }
    run, plain = (
        train_here(make_run(made_folder(tmp_path / layers), fused_layers=layers, **values))
        for layers in ("auto", "off")
    )
    assert_same_run(run, plain)


# -- runs

OPTIMIZED: dict[str, dict[str, Any]] = {
    "fused AdamW": {},
    "paged 32-bit AdamW": {"optimizer": "paged_adamw_32bit"},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "paged 8-bit AdamW": {"optimizer": "paged_adamw_8bit"},
    "LoRA+": {"loraplus_lr_ratio": 8},
    "LoRA+ in 8 bits": {"loraplus_lr_ratio": 8, "optimizer": "adamw_8bit"},
    "DoRA's neighbours": {"use_rslora": True, "target_modules": ("q_proj", "down_proj"), "rank": 5},
}
COMMON = {"weight_decay": 0.1, "max_grad_norm": 0.3, "learning_rate": 2e-3}


@pytest.mark.parametrize("case", OPTIMIZED)
def test_an_optimizer_learns_the_same_adapter_from_flat_tensors(case: str, tmp_path: Path) -> None:
    """8-bit states are quantised in blocks of 256 numbers, which begin elsewhere in a flat tensor; seen: 2% on average."""
    values = COMMON | OPTIMIZED[case]
    run, plain = (
        train_here(make_run(made_folder(tmp_path / name), fused_layers=name, **values)) for name in ("auto", "off")
    )
    assert said(run, events.Started)[0].fused and not said(plain, events.Started)[0].fused
    rough = "8bit" in values.get("optimizer", "")
    assert losses(run) == pytest.approx(losses(plain), abs=2e-3 if rough else 1e-5)
    norms, plain_norms = ([step.grad_norm for step in said(one, events.Step)] for one in (run, plain))
    assert norms == pytest.approx(plain_norms, rel=2e-2 if rough else 1e-4)
    expected, way = adapter(plain), sum(step.learning_rate for step in said(plain, events.Step))
    assert adapter(run).keys() == expected.keys()
    for name, tensor in adapter(run).items():
        rate = values.get("loraplus_lr_ratio", 1) if "lora_B" in name else 1
        apart = (tensor - expected[name]).abs() / (way * rate)  # a share of what AdamW can move a weight by
        assert apart.mean() < (5e-2 if rough else 1e-4), name


RESUMED = {name: values for name, values in VARIANTS.items() if not values.get("use_dora")} | {
    "dropout": {"lora_dropout": 0.2},
    "checkpointed": {"activation_checkpointing": "full", "token_budget": 100, "method": "qlora"},
}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_variant_with_fused_layers_learns_resumes_to_the_same_bits_and_fits_the_original_base(
    variant: str, tmp_path: Path
) -> None:
    values = {"save_steps": 2, "base_model": str(model_folder("qwen3")), **RESUMED[variant]}
    whole = train_here(make_run(made_folder(tmp_path / "whole"), **values))
    assert said(whole, events.Started)[0].fused
    found = eval_losses(whole)
    assert found[6] < found[0] - 0.05, "it learns"
    assert loss_when_loaded(whole) == pytest.approx(found[6], abs=2e-5)
    stopped = train_here(make_run(made_folder(tmp_path / "stopped"), **values), StopAfter(3))
    train_here(stopped)
    assert losses(stopped) == losses(whole) and eval_losses(stopped) == found
    assert adapter_bytes(stopped) == adapter_bytes(whole)


@pytest.mark.parametrize("variant", ["rsLoRA", "gaussian", "orthogonal", "PiSSA", "OLoRA", "LoftQ"])
def test_a_start_of_the_adapter_gets_the_losses_of_transformers_layers(variant: str, tmp_path: Path) -> None:
    values = {"base_model": str(model_folder("qwen2")), "learning_rate": 1e-3, **VARIANTS[variant]}
    run, plain = (
        train_here(make_run(made_folder(tmp_path / name), fused_layers=name, **values)) for name in ("auto", "off")
    )
    assert said(run, events.Started)[0].fused
    assert_same_run(run, plain)


@pytest.mark.parametrize(("before", "after"), [("auto", "off"), ("off", "auto")])
@pytest.mark.parametrize("case", ["fused AdamW", "8-bit AdamW", "LoRA+"])
def test_a_run_may_be_resumed_with_the_other_layers(before: str, after: str, case: str, tmp_path: Path) -> None:
    """fused_layers, packing and the device are no part of what a checkpoint is made for: each may change in between."""
    values = {"learning_rate": 2e-3, **OPTIMIZED[case]}
    whole = train_here(make_run(made_folder(tmp_path / "whole"), fused_layers=before, **values))
    run = train_here(make_run(made_folder(tmp_path / "run"), fused_layers=before, **values), StopAfter(3))
    run.change_config(replace(run.config(), fused_layers=after))
    train_here(run)
    assert said(run, events.Resumed)[0].from_step == 3
    assert losses(run) == pytest.approx(losses(whole), abs=5e-2)  # AdamW's averages may begin anew
    assert losses(run)[3] == pytest.approx(losses(whole)[3], abs=1e-5), "of the adapter that was saved"
    rates = [step.learning_rate for step in said(run, events.Step)]
    assert rates == pytest.approx([step.learning_rate for step in said(whole, events.Step)])


@pytest.mark.parametrize(("asked", "layers"), [("none", set()), ("full", {0, 1})])
def test_layers_are_computed_again_where_asked(
    asked: str, layers: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, whole = set(), fused.FusedLayer.forward

    def forward(self: fused.FusedLayer, x: torch.Tensor, position: Any, *, again: bool = False) -> Any:
        seen.update({self.number} if again else set())
        return whole(self, x, position, again=again)

    monkeypatch.setattr(fused.FusedLayer, "forward", forward)
    run = train_here(make_run(tmp_path, max_steps=1, activation_checkpointing=asked))
    assert seen == layers
    assert said(run, events.Started)[0].checkpointed_layers == len(layers)


@pytest.mark.parametrize(("before", "after"), [("auto", "off"), ("off", "auto")])
def test_one_adapted_layer_is_resumed_with_the_other_layers_too(before: str, after: str, tmp_path: Path) -> None:
    """Both kinds of layers then have two tensors that learn, of other shapes."""
    values = {"target_modules": "model.layers.0.self_attn.q_proj", "learning_rate": 1e-3}
    run = train_here(make_run(tmp_path, fused_layers=before, **values), StopAfter(3))
    run.change_config(replace(run.config(), fused_layers=after))
    train_here(run)
    assert run.status().state == FINISHED and len(losses(run)) == 6
    before_and_now = {"off": ("fused", "transformers'"), "auto": ("transformers'", "fused")}[after]
    told = "they were saved by {} layers, and {} ones train now".format(*before_and_now)
    assert any(note.text.endswith(told) for note in said(run, events.Note))


def test_noise_on_the_embeddings_is_bounded_by_each_rows_own_length(tmp_path: Path) -> None:
    """NEFTune, as with transformers' layers: none in an evaluation, and the same losses under the same seed."""
    values = {"neftune_noise_alpha": 5, "token_budget": 8, "learning_rate": 1e-3}
    run, plain, none = (
        train_here(make_run(made_folder(tmp_path / name), **(values | changed)))
        for name, changed in {
            "auto": {},
            "off": {"fused_layers": "off"},
            "none": {"neftune_noise_alpha": None},
        }.items()
    )
    assert said(run, events.Started)[0].fused
    assert_same_run(run, plain)
    assert losses(run) != pytest.approx(losses(none), abs=1e-4)
    assert eval_losses(run)[0] == eval_losses(none)[0]


# -- kernels: on a CPU plain torch, of which autograd gives the gradients


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_swiglu_and_its_way_back() -> None:
    gate_up, gradient = numbers(7, 20).requires_grad_(), numbers(7, 10, seed=1)
    product = nn.functional.silu(gate_up[:, :10]) * gate_up[:, 10:]
    (expected,) = torch.autograd.grad(product, gate_up, gradient)
    found, out, activated = gate_up.detach().clone(), torch.empty(7, 13), gradient.clone()
    kernels.swiglu(found, out[:, :10])
    torch.testing.assert_close(out[:, :10], product)
    kernels.swiglu_backward_(found, activated)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(activated, product)


def test_a_norm_and_its_way_back() -> None:
    x, added, weight, gradient = numbers(6, 30), numbers(6, 30, seed=1), numbers(30, seed=2), numbers(6, 30, seed=3)
    inside = (x + added).requires_grad_()
    normed = nn.functional.rms_norm(inside, (30,), weight, 1e-3)
    (expected,) = torch.autograd.grad(normed, inside, gradient)
    total, out, begun = x.clone(), torch.empty(6, 32), numbers(6, 30, seed=4)
    rstd = kernels.rms_norm(total, weight, 1e-3, out=out[:, :30], added=added)
    torch.testing.assert_close(total, x + added)
    torch.testing.assert_close(out[:, :30], normed)
    found = begun.clone()
    kernels.norm_backward_(found, gradient, total, weight, rstd)
    torch.testing.assert_close(found, begun + expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_rotation_and_its_way_back(in_place: bool) -> None:
    """Two heads of three in a row, as transformers rotates them."""
    whole, angles, gradient = numbers(5, 3 * 8), numbers(5, 4, seed=1), numbers(5, 2, 8, seed=2)
    cos, sin = torch.cat([angles.cos()] * 2, dim=1), torch.cat([angles.sin()] * 2, dim=1)
    heads = whole[:, :16].reshape(1, 5, 2, 8).transpose(1, 2).clone().requires_grad_()
    turned, _ = apply_rotary_pos_emb(heads, heads, cos[None], sin[None])
    (expected,) = torch.autograd.grad(turned, heads, gradient.transpose(0, 1)[None])

    def by_token(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0].transpose(0, 1).flatten(1)

    source = whole.clone()
    target = source if in_place else torch.full_like(whole, 9.0)
    beside = target[:, 16:].clone()
    kernels.rotate(source, target, cos, sin, heads=2)
    torch.testing.assert_close(target[:, :16], by_token(turned))
    assert torch.equal(target[:, 16:], beside), "values are not rotated"
    back = gradient.flatten(1).clone()
    kernels.rotate(back, back, cos, sin, heads=2, backward=True)
    torch.testing.assert_close(back, by_token(expected))


def test_cross_entropy_and_its_gradient() -> None:
    logits, targets = (3 * numbers(9, 50)).requires_grad_(), torch.arange(9) * 5
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() * 0.3, logits)
    found = logits.detach().clone()
    torch.testing.assert_close(kernels.cross_entropy_(found, targets, gradient=False), expected)
    assert torch.equal(found, logits), "left as they are where no gradient is wanted"
    torch.testing.assert_close(kernels.cross_entropy_(found, targets, scale=0.3), expected)
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_and_its_way_back(kv_heads: int, window: int | None) -> None:
    """Against softmax written out, row by row and head by head."""
    lengths, scale = [7, 1, 12], 0.3
    q, k, v = (numbers(20, heads, 8, seed=i).requires_grad_() for i, heads in enumerate((4, kv_heads, kv_heads)))
    parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    expected = torch.cat([attention_written_out(*part, scale=scale, window=window) for part in parts])
    gradient = numbers(20, 4, 8, seed=9)
    gradients = torch.autograd.grad(expected, (q, k, v), gradient)
    rows, how = kernels.Rows(lengths, CPU), {"scale": scale, "window": window}
    with torch.no_grad():
        out, saved = kernels.attention(q, k, v, rows, **how)
        found = kernels.attention_backward(gradient, q, k, v, out, saved, rows, **how)
    torch.testing.assert_close(out, expected)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


def attention_written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    heads = []
    for head in range(q.shape[1]):
        own = head // (q.shape[1] // k.shape[1])
        scores = scale * q[:, head] @ k[:, own].T
        place = torch.arange(len(q))
        hidden = place[None] > place[:, None]
        if window is not None:
            hidden |= place[None] <= place[:, None] - window
        heads.append(scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v[:, own])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_4_bit_weights_below_each_other_with_b_beside_them(kind: str, nested: bool) -> None:
    weights = four_bit_weights(kind=kind, nested=nested)
    expected = torch.cat([dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    joined, b, out = Packed(weights), numbers(56, 3), torch.full((56, 128 + 8), 9.0)
    kernels.dequantize(joined, out, b)
    assert torch.equal(out[:, :128], expected)
    beside = torch.zeros(56, 8)
    beside[:24, :3], beside[24:, 3:6] = b[:24], b[24:]
    assert torch.equal(out[:, 128:], beside)
    for weight, part in zip(weights, expected.split([24, 32]), strict=True):
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), part), (
            "as the layers themselves go on reading"
        )


def four_bit_weights(
    *,
    kind: str,
    nested: bool,
    outputs: tuple[int, ...] = (24, 32),
    inputs: int = 128,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    layers = [Linear4bit(inputs, size, bias=False, quant_type=kind, compress_statistics=nested) for size in outputs]
    for number, layer in enumerate(layers):
        layer.weight.data = (numbers(*layer.weight.shape, seed=number) * (number + 1)).to(dtype)
    return [layer.to(device).weight for layer in layers]  # quantised on the way
