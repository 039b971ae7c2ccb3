"""TrainConfig: wrong settings are refused together and before anything starts; right ones survive every notation."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config import TEMPLATES, TrainConfig, replace
from qlora_core.errors import ConfigError
from qlora_core.selectors import syntax_problem


def strategy(spec: Any) -> st.SearchStrategy[Any]:
    """Valid values of a field, from its own limits."""
    limits, kind = spec.metadata, str(spec.type)
    names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
    if spec.name == "template":
        return st.sampled_from([*TEMPLATES, "{% for m in messages %}\n{{ m.content }}: é\n{% endfor %}"])
    if "choices" in limits:
        values: st.SearchStrategy[Any] = st.sampled_from(limits["choices"])
    elif spec.type is bool:
        values = st.booleans()
    elif "presets" in limits:
        named = st.sampled_from(["q_proj@0-7", "mlp@3"]) | names.filter(lambda name: not syntax_problem([name]))
        values = st.sampled_from(limits["presets"]) | st.lists(named, min_size=1, max_size=3).map(tuple)
    elif spec.name == "score_fields":
        values = st.just(())
    elif "int" in kind:
        values = st.integers(limits["least"], limits["most"])
    elif "float" in kind:
        above = limits.get("above")
        values = st.floats(
            above if above is not None else limits["least"], limits["most"], exclude_min=above is not None
        )
    else:
        values = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    return values | st.none() if limits.get("optional") else values


def possible(values: dict[str, Any]) -> TrainConfig:
    """A config of the values; what PEFT cannot combine is left at its default."""
    try:
        return TrainConfig(**values)
    except ConfigError:
        return TrainConfig(**{name: value for name, value in values.items() if name != "init_lora_weights"})


CONFIGS = st.fixed_dictionaries({}, optional={spec.name: strategy(spec) for spec in fields(TrainConfig)}).map(possible)


@settings(max_examples=200, deadline=None)
@given(config=CONFIGS)
def test_config_survives_json_and_yaml(config: TrainConfig) -> None:
    assert TrainConfig.from_mapping(config.to_json()) == config
    assert TrainConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


def test_yaml_file_round_trip_names_only_what_differs(tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(tmp_path / "rows.jsonl"), rank=16, target_modules="q_proj, v_proj", learning_rate=5e-5
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert list(yaml.safe_load(path.read_text())) == ["data", "rank", "target_modules", "learning_rate"]
    assert TrainConfig.from_yaml(path) == config
    assert config.target_modules == ("q_proj", "v_proj")


def test_every_wrong_and_unknown_field_is_named_at_once() -> None:
    values = {"rank": 0, "learning_rat": 1e-4, "zzz": 1, "method": "dora", "double_quant": "yes", "eval_fraction": 0}
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_mapping(values, where="run.yaml")
    assert len(error.value.problems) == 6
    assert all(problem.startswith("run.yaml: ") for problem in error.value.problems)
    text = str(error.value)
    assert "learning_rat is not a setting; did you mean learning_rate?" in text
    assert "zzz is not a setting\n" in text
    assert "choose one of lora, qlora" in text


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("rank", 0, "at least 1"),
        ("rank", -1, "rank is -1"),
        ("rank", 10_000, "at most 1024"),
        ("rank", 8.5, "a whole number"),
        ("rank", True, "a whole number"),
        ("rank", None, "a whole number"),
        ("rank", "eight", "'eight'"),
        ("rank", float("inf"), "a whole number"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("learning_rate", 5, "at most 0.1"),
        ("learning_rate", float("inf"), "learning_rate is inf"),
        ("learning_rate", 10**400, "a number"),
        ("learning_rate", "nan", "learning_rate is nan"),
        ("learning_rate", [1e-4], "a number"),
        ("eval_fraction", 0, "above 0"),
        ("eval_fraction", 0.6, "at most 0.5"),
        ("max_steps", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at most"),
        ("double_quant", 1, "true or false"),
        ("quant_type", "int8", "nf4, fp4"),
        ("target_modules", [], "target_modules"),
        ("target_modules", " , ", "a list of names"),
        ("target_modules", ["q_proj", 3], "a list of names"),
        ("target_modules", "q_proj@7-3, k_proj", "'q_proj@7-3' ends before it begins; write q_proj@3-7"),
        ("target_modules", "@0-3", "names no layers; write all@0-3"),
        ("quantize_modules", "mlp@x", "no range of layers after @; write mlp@0-7, or mlp@5"),
        ("int8_modules", ["mlp@-1"], "no range of layers"),
        ("int8_modules", 8, "a list of names"),
        ("score_fields", "priority", "a list of names"),
        ("data", 7, "a text"),
        ("name", None, "a text"),
    ],
)
def test_wrong_value_is_refused_with_field_value_and_remedy(field: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_mapping({field: value})
    (problem,) = error.value.problems
    assert field in problem
    assert says in problem


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("'2e-4'", 2e-4), ("0.0002", 2e-4)])
def test_numbers_of_yaml_may_be_written_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "run.yaml").write_text(f"learning_rate: {text}\nrank: 16.0\nmax_steps: '30'\n")
    config = TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert (config.learning_rate, config.rank, config.max_steps) == (value, 16, 30)
    assert isinstance(config.rank, int)


def test_yaml_names_its_data_relative_to_itself_and_overrides_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "run.yaml"
    path.write_text("data: ../rows.jsonl\neval_data: held_out.jsonl\nrank: 4\n")
    monkeypatch.chdir("/")
    config = TrainConfig.from_yaml(path, rank=32)
    assert config.data == str(tmp_path / "rows.jsonl")
    assert config.eval_data == str(tmp_path / "configs" / "held_out.jsonl")
    assert config.rank == 32
    path.write_text("data: /elsewhere/rows.jsonl\n")
    assert TrainConfig.from_yaml(path).data == "/elsewhere/rows.jsonl"
    path.write_text("data: ~/rows.jsonl\n")
    assert TrainConfig.from_yaml(path).data == str(Path.home().resolve() / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank: [", "cannot be read as YAML"),
        ("\xff", "cannot be read as YAML"),
        ("name: 2024-13-45", "cannot be read as YAML"),
        ("a: " + "[" * 3000, "cannot be read as YAML"),
        ("- rank", "expected fields and values, found list"),
        ("name: 2024-12-04", "must be a text"),
    ],
)
def test_yaml_that_cannot_be_used_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says) as error:
        TrainConfig.from_yaml(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        TrainConfig.from_yaml(tmp_path / "missing.yaml")


def test_empty_yaml_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert TrainConfig.from_yaml(tmp_path / "run.yaml") == TrainConfig()


def test_config_is_frozen_and_derived_values_are_checked_again() -> None:
    config = TrainConfig(data="tickets.jsonl")
    with pytest.raises(FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]
    with pytest.raises(ConfigError, match="rank is 0"):
        replace(config, rank=0)
    assert (replace(config, rank=16).alpha, replace(config, lora_alpha=5).alpha) == (32.0, 5.0)
    assert config.run_name() == "tickets-qlora-r8"
    assert replace(config, name="mine").run_name() == "mine"
    assert replace(config, seed=7).order_seed == 7 and replace(config, seed=7, row_order_seed=0).order_seed == 0


def test_every_field_says_what_it_is_and_has_a_place_in_the_form() -> None:
    for spec in fields(TrainConfig):
        assert len(spec.metadata["help"]) > 10, spec.name
        assert spec.metadata["group"], spec.name


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "qlora", "init_lora_weights": "pissa"}, r"'pissa' with method qlora.*method lora, or .*loftq"),
        ({"method": "qlora", "init_lora_weights": "olora"}, r"'olora' with method qlora.*method lora, or .*loftq"),
        ({"method": "lora", "init_lora_weights": "loftq"}, r"'loftq' with method lora.*choose method qlora"),
        (
            {"method": "qlora", "quantize_modules": "none"},
            r"would quantise nothing; name layers.*choose method lora",
        ),
        ({"init_lora_weights": "loftq", "quant_type": "fp4"}, r"'loftq' with quant_type fp4; set quant_type to nf4"),
        ({"init_lora_weights": "orthogonal", "rank": 7}, r"'orthogonal' with rank 7; it needs an even rank"),
        (
            {"method": "lora", "use_dora": True, "init_lora_weights": "pissa"},
            r"use_dora with .*'pissa'.*one of the two",
        ),
    ],
)
def test_what_peft_cannot_combine_is_refused_with_the_remedy(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("all", "all"),
        (["attention"], "attention"),
        ("attention, mlp@0-3", ("attention", "mlp@0-3")),
        ("none", ()),
        ([], ()),
        (["none"], ()),
    ],
)
def test_quantised_layers_are_named_in_every_notation(written: Any, meant: Any) -> None:
    config = TrainConfig(quantize_modules=written, int8_modules="mlp")
    assert config.quantize_modules == meant
    assert TrainConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


def test_all_impossible_combinations_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(method="lora", init_lora_weights="loftq", quant_type="fp4")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("values", "scale"),
    [({"rank": 8}, 2), ({"rank": 8, "lora_alpha": 4}, 0.5), ({"rank": 64, "use_rslora": True}, 2)],
)
def test_the_scale_of_the_update(values: dict[str, Any], scale: float) -> None:
    assert TrainConfig(**values).adapter_scale == scale
