"""Packing: every row once and within the budget, the plain loss, and only where rows are proven not to see each other."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TARGETS, VOCABULARY, model_folder

from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.row_order import step_rows
from qlora_core.worker import loading
from qlora_core.worker.batches import Row, loss_sum, make_pass, packing_proof, plan_passes

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(2, 200), min_size=1, max_size=60)
PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gptj", "gpt_neox", "gemma2", "gemma3_text")
# What each of these would do wrong, were it packed: OPT counts positions itself, the others see the row before.
LEAKY = ("opt", "falcon", "bloom", "mpt", "mamba", "qwen3_next", "lfm2", "bamba")


def row(length: int, *, seed: int = 0, line: int = 1) -> Row:
    chance = random.Random(seed * 1000 + length)
    ids = tuple(chance.randrange(VOCABULARY - 5) for _ in range(length))
    return Row(line, ids, tuple(i >= length // 2 for i in range(length)))


def adapted(architecture: str, *, method: str = "lora", dtype: str = "fp32", spread: float = 4.0) -> Any:
    config = TrainConfig(method=method, target_modules=TARGETS.get(architecture, "all-linear"), rank=4)
    base = loading.load_base(model_folder(architecture, spread=spread), config, device=CPU, dtype=dtype)
    return loading.add_adapter(base, config, base_name="tiny").train()


@given(lengths=LENGTHS, budget=st.integers(8, 400), packed=st.booleans())
def test_a_plan_holds_every_row_once_within_the_budget(lengths: list[int], budget: int, packed: bool) -> None:
    plan = plan_passes(lengths, budget, packed=packed)
    assert sorted(i for members in plan for i in members) == list(range(len(lengths)))
    for members in plan:
        held = [lengths[i] for i in members]
        assert len(members) == 1 or (sum(held) if packed else max(held) * len(held)) <= budget


@given(lengths=LENGTHS, packed=st.booleans())
def test_a_large_budget_needs_one_pass_and_a_small_one_a_pass_a_row(lengths: list[int], packed: bool) -> None:
    assert len(plan_passes(lengths, 200 * 60, packed=packed)) == 1
    assert len(plan_passes(lengths, 1, packed=packed)) == len(lengths)


@given(
    rows=st.integers(1, 50), rows_per_step=st.integers(1, 60), epoch=st.integers(0, 3), seed=st.integers(0, 2**31 - 1)
)
def test_every_epoch_holds_every_row_once(rows: int, rows_per_step: int, epoch: int, seed: int) -> None:
    per_epoch = -(-rows // rows_per_step)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    order = [step_rows(rows, rows_per_step, step, seed) for step in steps]
    assert order == [step_rows(rows, rows_per_step, step, seed) for step in steps]
    assert Counter(i for chosen in order for i in chosen) == Counter(range(rows))
    assert all(len(chosen) == rows_per_step for chosen in order[:-1])


def test_orders_differ_by_epoch_and_by_seed() -> None:
    orders = [step_rows(30, 30, epoch, seed) for epoch in (0, 1) for seed in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_of_a_pass_is_the_plain_loss_of_its_rows(architecture: str, packed: bool) -> None:
    """Against the model's own loss with labels, row by row: a mean over the supervised tokens of a row."""
    model = adapted(architecture)
    rows = [row(length) for length in (7, 40, 23, 2)]
    expected = 0.0
    for one in rows:
        ids = torch.tensor([one.token_ids])
        labels = torch.where(torch.tensor([one.supervised]), ids, -100)
        expected += model(input_ids=ids, labels=labels).loss.item() * one.supervised_tokens
    found = loss_sum(model, make_pass(rows, packed=packed, device=CPU)).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_row_without_a_predictable_first_token_still_counts_right() -> None:
    """Everything supervised, the first token included: nothing predicts it."""
    one = Row(1, (5, 6, 7), (True, True, True))
    assert one.supervised_tokens == 2
    for packed in (True, False):
        batch = make_pass([one, one], packed=packed, device=CPU)
        assert (batch.targets != -100).sum() == 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_packing_is_proven_where_rows_keep_apart(architecture: str, method: str, dtype: str) -> None:
    """Seen: a change of 0 by other tokens in the row before; packed against alone 1e-7 (fp32), up to 9e-4 (bf16)."""
    packed, reason = proof(adapted(architecture, method=method, dtype=dtype), dtype)
    assert packed, reason


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("architecture", LEAKY)
def test_packing_is_refused_where_a_row_sees_another(architecture: str, spread: float, dtype: str) -> None:
    """Seen: the row before changes logits by 1e-3 (LFM2 at its start, where the mean hides it) up to 1.5 of their spread."""
    packed, reason = proof(adapted(architecture, dtype=dtype, spread=spread), dtype)
    assert not packed and reason.startswith("padded: "), reason


def proof(model: Any, dtype: str) -> tuple[bool, str]:
    rows = [row(length, seed=i) for i, length in enumerate((20, 33, 47, 60, 80, 150, 12))]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        return packing_proof(model, rows, device=CPU)


def test_the_proof_notices_positions_that_do_not_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cannot see each other, but stand at the wrong place: the second test of the proof."""
    model = adapted("gpt2")
    transformer = model.get_base_model().transformer
    whole = transformer.wpe.forward
    monkeypatch.setattr(transformer.wpe, "forward", lambda positions: whole(torch.arange(positions.shape[-1])[None]))
    packed, reason = proof(model, "fp32")
    assert not packed and "other logits than alone" in reason


def test_one_row_or_two_equal_rows_can_be_proven() -> None:
    model = adapted("llama")
    for rows in ([row(9)], [row(9), row(9)], [row(2), row(2)]):
        assert packing_proof(model, rows, device=CPU)[0]
    leaky = adapted("falcon")
    assert not packing_proof(leaky, [row(9)], device=CPU)[0]


def test_layers_that_peft_refuses_are_named_with_what_to_choose(tmp_path: Path) -> None:
    """Mamba's out_proj, which all-linear leaves out: its kernel bypasses the layer."""
    with pytest.raises(ConfigError, match=r"(?s)'out_proj'.*name other layers of .*in_proj.*x_proj"):
        adapted_with = TrainConfig(method="lora", target_modules=("out_proj",))
        base = loading.load_base(model_folder("mamba"), adapted_with, device=CPU, dtype="fp32")
        loading.add_adapter(base, adapted_with, base_name="tiny")
