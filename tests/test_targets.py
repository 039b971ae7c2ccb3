"""Which layers get an adapter: what the page says before a run equals what PEFT does in the worker."""

import json
import subprocess

import pytest
import torch
from helpers import settings_in
from peft.tuners.lora import LoraLayer
from tiny_models import SHAPES, model_folder

from qlora_core import architecture, models, targets
from qlora_core.config import TARGET_PRESETS, TrainConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.targets import Architecture, Layer
from qlora_core.worker.architecture import described
from qlora_core.worker.loading import add_adapter, load_base

CPU = torch.device("cpu")


def told(name: str) -> Architecture:
    return Architecture.from_json(json.loads(json.dumps(described(model_folder(name)))))


def adapted(name: str, config: TrainConfig):
    return add_adapter(load_base(model_folder(name), config, device=CPU, dtype="fp32"), config, base_name=name)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*shared_expert_gate")
@pytest.mark.parametrize("name", SHAPES)
def test_the_page_names_the_modules_that_peft_adapts(name):
    architecture = told(name)
    for number, target_modules in enumerate(TARGET_PRESETS):
        config = TrainConfig(method="lora", rank=4, target_modules=target_modules, use_dora=number == 0)
        try:
            expected = targets.resolve(architecture.layers, config.target_modules)
        except ConfigError as refused:
            with pytest.raises(ConfigError) as same:
                adapted(name, config)
            assert str(same.value) == str(refused)
            continue
        model = adapted(name, config)
        modules = model.get_base_model().named_modules()
        assert [n for n, module in modules if isinstance(module, LoraLayer)] == [layer.name for layer in expected]
        assert not any(layer.is_head for layer in expected)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert targets.trainable_parameters(expected, config) == trained


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3_next", "bamba"])
def test_the_numbers_are_those_of_the_loaded_model(name):
    """Tied embeddings count once, and 4 bits hold what bitsandbytes really quantises."""
    found = told(name)
    plain = load_base(model_folder(name), TrainConfig(method="lora"), device=CPU, dtype="fp32")
    assert found.parameters == sum(parameter.numel() for parameter in plain.parameters())
    quantised = load_base(model_folder(name), TrainConfig(method="qlora"), device=CPU, dtype="fp32")
    packed = [m for m in quantised.modules() if type(m).__name__ == "Linear4bit"]
    assert found.quantised_parameters == sum(m.in_features * m.out_features for m in packed)
    assert (found.vocabulary, found.hidden_size) == tuple(plain.get_input_embeddings().weight.shape)
    assert found.layer_count == plain.config.num_hidden_layers


def llama_like(count: int = 3) -> tuple[Layer, ...]:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    body = [Layer(f"model.layers.{i}.{name}", 8, 16) for i in range(count) for name in names]
    return (*body, Layer("lm_head", 8, 100, is_head=True))


def test_the_sentence_counts_modules_layers_and_weights():
    sizes = {"vocabulary": 100, "hidden_size": 8, "layer_count": 3, "intermediate_size": 16}
    heads = {"attention_heads": 2, "key_value_heads": 1, "head_dim": 4}
    small = Architecture(
        model_type="llama", layers=llama_like(), parameters=100_000, fusable=True,
        **sizes, **heads,
    )  # fmt: skip
    said = targets.sentence(small, TrainConfig(rank=4))
    assert said == ("q_proj, k_proj, v_proj, o_proj, … in 3 layers: 15 modules, 1,440 trainable weights (1.4 %)")
    one = targets.sentence(small, TrainConfig(rank=4, target_modules=("layers.1.mlp.up_proj",)))
    assert one.startswith("up_proj in 1 layer: 1 module, 96 trainable")


def test_a_name_that_the_model_does_not_have_is_told_with_those_it_has():
    with pytest.raises(
        ConfigError, match=r"no linear layer query, out; name other layers of k_proj, lm_head, .*v_proj"
    ):
        targets.resolve(llama_like(), ("q_proj", "query", "out"))


@pytest.mark.parametrize(("name", "refused"), [("mamba", "out_proj"), ("qwen3_next", "gate_proj")])
def test_what_peft_cannot_adapt_is_refused_by_name(name, refused):
    with pytest.raises(ConfigError, match=f"PEFT cannot adapt {refused} .*name other layers of .*in_proj") as told_here:
        targets.resolve(told(name).layers, (refused,))
    with pytest.raises(ConfigError) as in_the_worker:
        adapted(name, TrainConfig(method="lora", target_modules=(refused,)))
    assert str(in_the_worker.value) == str(told_here.value)


def test_query_and_value_are_missed_only_where_a_model_has_them_apart():
    layers = llama_like()

    def misses(*names: str) -> bool:
        return targets.misses_query_or_value(layers, targets.resolve(layers, names))

    assert misses("q_proj") and misses("up_proj") and not misses("q_proj", "v_proj")
    fused = (Layer("h.0.attn.c_attn", 8, 24), Layer("h.0.mlp.c_fc", 8, 32))
    assert not targets.misses_query_or_value(fused, fused)
    assert not targets.misses_query_or_value((Layer("x.0.in", 8, 8),), (Layer("x.0.in", 8, 8),))


def test_a_worker_is_asked_once_and_a_damaged_answer_is_made_again(tmp_path, monkeypatch):
    settings = settings_in(tmp_path)
    base = str(model_folder("gpt2"))
    assert architecture.read(base, settings) == told("gpt2")
    (kept,) = (settings.home / "architectures").glob("*.json")
    answer, asked = kept.read_text(), []
    monkeypatch.setattr(architecture, "_asked", lambda *_: asked.append(1) or answer)
    assert architecture.read(base, settings) == told("gpt2") and not asked
    for damaged in (answer[:100], "{}", "[]", '{"layers": 3}', ""):
        kept.write_text(damaged)
        assert architecture.read(base, settings) == told("gpt2")
        assert kept.read_text() == answer
    assert len(asked) == 5


def test_what_is_no_model_is_told_without_a_traceback(tmp_path, monkeypatch):
    settings = settings_in(tmp_path)
    with pytest.raises(ModelError, match="has no config.json"):
        architecture.read(str(tmp_path), settings)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback …\nValueError: the architecture `nonsense` is unknown\n")
    monkeypatch.setattr(architecture.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        ModelError, match="describes no model that can be built: ValueError: the architecture `nonsense`"
    ):
        architecture.read(str(model_folder("gpt2")), settings)


def test_of_a_model_on_the_hub_only_its_config_is_fetched(tmp_path, monkeypatch):
    asked = {}

    def fetch(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(model_folder("llama"))

    monkeypatch.setattr(architecture, "snapshot_download", fetch)
    monkeypatch.setattr(models, "resolve", lambda *_: pytest.fail("would fetch the weights"))
    monkeypatch.setattr(architecture, "_asked", lambda *_: json.dumps(described(model_folder("llama"))))
    assert architecture.read("owner/name@v1", settings_in(tmp_path)).model_type == "llama"
    assert asked == {"repo_id": "owner/name", "revision": "v1", "allow_patterns": ["config.json"], "token": False}
