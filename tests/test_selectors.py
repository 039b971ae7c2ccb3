"""How settings name layers: groups and ranges mean the same layers whichever setting names them; all that is wrong is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner import SMALL
from test_targets import told

from qlora_core import precision, selectors, targets
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.targets import Layer

LLAMA = [layer.name for layer in SMALL.layers]  # 30 decoder layers of 7, and the head
BODY = LLAMA[:-1]


def found(given: str | list[str], names: list[str] = LLAMA) -> list[str]:
    names_found, problems = selectors.find(given, names, [name for name in names if name != "lm_head"])
    assert not problems
    return [name for name in names if name in names_found]


def last_names(given: str | list[str], names: list[str] = LLAMA) -> set[str]:
    return {name.rpartition(".")[2] for name in found(given, names)}


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("query-value", {"q_proj", "v_proj"}),
        ("key-value", {"k_proj", "v_proj"}),
    ],
)
def test_groups_of_a_llama(group: str, expected: set[str]) -> None:
    assert last_names(group) == expected
    assert len(found(group)) == 30 * len(expected)


def test_all_leaves_the_head_alone_and_a_name_may_mean_it() -> None:
    assert found("all") == found("all-linear") == found(["attention", "mlp"]) == BODY
    assert found("lm_head") == ["lm_head"]


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("gpt2", {"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
        ("mpt", {"Wqkv", "out_proj"}, {"up_proj", "down_proj"}),
        ("bloom", {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
        ("lfm2", {"q_proj", "k_proj", "v_proj", "out_proj"}, {"w1", "w2", "w3"}),
    ],
)
def test_groups_of_other_architectures(name: str, attention: set[str], mlp: set[str]) -> None:
    layers = told(name).layers
    by_group = {group: targets.resolve(layers, group) for group in ("attention", "mlp")}
    assert {layer.last_name for layer in by_group["attention"]} == attention
    assert {layer.last_name for layer in by_group["mlp"]} == mlp
    assert not set(by_group["attention"]) & set(by_group["mlp"])


def test_ranges_are_inclusive_and_add_up() -> None:
    assert found("q_proj@28-29") == ["model.layers.28.self_attn.q_proj", "model.layers.29.self_attn.q_proj"]
    assert found("mlp@3") == [name for name in BODY if ".layers.3.mlp." in name]
    assert found(["attention@0-1", "k_proj", "attention@1-1"]) == [
        name for name in BODY if ".k_proj" in name or (".self_attn." in name and selectors.layer_number(name) < 2)
    ]


@given(group=st.sampled_from([*selectors.GROUPS, "o_proj"]), cut=st.integers(0, 28))
def test_two_ranges_that_meet_are_the_whole(group: str, cut: int) -> None:
    assert found([f"{group}@0-{cut}", f"{group}@{cut + 1}-29"]) == found(group)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("q_proj@0-30", "q_proj@0-30 goes beyond the model's decoder layers, 0 to 29"),
        ("lm_head@0", "lm_head@0 fits none: lm_head lies in other layers"),
        (["nope", "k_proj", "nor"], "the model has no linear layer nope, nor"),
    ],
)
def test_what_a_model_does_not_have_is_told(given: str | list[str], says: str) -> None:
    assert selectors.find(given, LLAMA, BODY)[1] == [says]


def test_of_one_matrix_for_query_key_and_value_a_part_cannot_be_named() -> None:
    layers = told("gpt2").layers
    with pytest.raises(
        ConfigError, match=r"no q_proj by itself: .* one matrix, c_attn; name other layers of c_attn, c_fc"
    ):
        targets.resolve(layers, ("q_proj",))
    # A group takes the whole matrix, and the page says so.
    assert {layer.last_name for layer in targets.resolve(layers, "key-value")} == {"c_attn"}
    assert targets.not_apart(layers, ("key-value@0", "mlp")) == "c_attn"
    assert not targets.not_apart(layers, "attention") and not targets.not_apart(SMALL.layers, "key-value")


def test_layers_are_held_in_4_bits_in_int8_or_in_16_and_int8_wins() -> None:
    config = TrainConfig(quantize_modules="attention, mlp@0-1", int8_modules=("v_proj@0-3", "down_proj@9"))
    bits = precision.bits(SMALL.layers, config)
    assert [name for name, width in bits.items() if width == 8] == [
        *(f"model.layers.{n}.self_attn.v_proj" for n in range(4)),
        "model.layers.9.mlp.down_proj",
    ]
    assert len(bits) == 30 * 4 + 2 * 3 + 1 and "model.layers.2.mlp.up_proj" not in bits
    assert precision.sentence(SMALL.layers, config) == "of 210 linear layers 122 in 4 bits, 5 in int8, the rest in 16"
    assert precision.sentence(SMALL.layers, TrainConfig()) == ""
    only_int8 = TrainConfig(quantize_modules="none", int8_modules="all")
    assert set(precision.bits(SMALL.layers, only_int8).values()) == {8}


def test_everything_that_does_not_fit_the_model_is_named_at_once() -> None:
    config = TrainConfig(target_modules="c_attn", quantize_modules="lm_head, mlp@99", int8_modules="nope")
    with pytest.raises(ConfigError) as caught:
        precision.check(SMALL.layers, config)
    assert [problem.partition("; name")[0] for problem in caught.value.problems] == [
        "target_modules is 'c_attn': the model has no linear layer c_attn",
        "quantize_modules is 'lm_head, mlp@99': mlp@99 goes beyond the model's decoder layers, 0 to 29; lm_head of this model "
        "can only be held in 16 bits",
        "int8_modules is 'nope': the model has no linear layer nope",
    ]
    assert all("name other layers of down_proj, " in problem for problem in caught.value.problems)


def test_what_bitsandbytes_cannot_hold_is_no_part_of_a_group() -> None:
    layers = (Layer("h.0.mlp.up", 64, 64, is_quantisable=False), Layer("h.0.mlp.down", 64, 64))
    assert precision.bits(layers, TrainConfig(quantize_modules="mlp")) == {"h.0.mlp.down": 4}
    with pytest.raises(ConfigError, match="all fits none of the model's linear layers; choose method lora"):
        precision.bits(layers[:1], TrainConfig())


def test_loftq_without_a_quantised_layer_under_an_adapter_is_refused() -> None:
    config = TrainConfig(init_lora_weights="loftq", target_modules="attention", quantize_modules="mlp")
    with pytest.raises(
        ConfigError, match="begins with what quantising lost, but no layer with an adapter is quantised"
    ):
        precision.check(SMALL.layers, config)
