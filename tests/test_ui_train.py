"""The Train tab beside the form: findings and their buttons, the recommendation, settings as YAML, bases to choose."""

import gc
import html
import json
import re
import shutil
import time
from types import SimpleNamespace

import gradio as gr
import pytest
from helpers import CHATML, alpaca, fake_gpus, model_folder, run_in, settings_in, tokenizer_folder, write_rows

from qlora_core import architecture
from qlora_core.config import TrainConfig
from qlora_core.targets import Architecture, Layer
from qlora_core.ui import form, preview
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.data_tab import DataTab, example
from qlora_core.ui.preview import How
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.uploads import keep_upload

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
LAYERS = tuple(Layer(f"model.layers.{i}.{name}", 64, 64) for i in range(2) for name in NAMES)
SHAPE = Architecture(
    model_type="llama", layers=LAYERS, parameters=80_000, vocabulary=400, hidden_size=64,
    layer_count=2, attention_heads=4, key_value_heads=4, head_dim=16, intermediate_size=128, fusable=False,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio():
    """gradio leaves event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base model as the page sees it: its tokenizer, and layers that need no worker to be known."""
    monkeypatch.setattr(architecture, "read", lambda *_: SHAPE)
    return str(tokenizer_folder(model_folder(tmp_path / "base"), chat_template=CHATML))


@pytest.fixture
def tab(tmp_path):
    with gr.Blocks(analytics_enabled=False):
        return TrainTab(settings_in(tmp_path))


@pytest.fixture
def chosen(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(400)])
    return Chosen(str(rows), rows=400)


def values_of(tab, base, **changed):
    plain = dict(zip(form.SPECS, tab.fill(TrainConfig(base_model=base, dataset_license="mit")), strict=True))
    return list((plain | changed).values())


def filled(values, update):
    """The form after a handler's update."""
    return [old if isinstance(new, dict) else new for old, new in zip(values, update, strict=True)]


def as_config(values, chosen):
    return form.to_config(dict(zip(form.SPECS, values, strict=True)), chosen.config_fields())


def test_findings_stand_beside_start_once_rows_and_layers_are_looked_at(tab, base, chosen):
    values = values_of(tab, base, rank=64)
    plan, _, problems, _, findings, _ = tab.check(chosen, *values)
    assert "Reading the model" in plan and "Looking at the rows" in findings and problems == ""
    tab.look(chosen, base)
    plan, _, problems, _, findings, _ = tab.check(chosen, *values)
    assert "q_proj, k_proj, v_proj, o_proj, … in 2 layers: 10 modules, 81,920 trainable weights" in plan
    assert "Warning" in findings and "Rank 64 is high for 360 rows" in findings
    assert "Nothing to warn of" in tab.check(chosen, *values_of(tab, base))[4]


def test_memory_stands_beside_start_and_follows_the_form(tab, base, chosen):
    def shown(**changed):
        return tab.check(chosen, *values_of(tab, base, device="cpu", **changed))[5]

    assert "Looking at the rows" in shown()
    tab.look(chosen, base)
    found = shown()
    assert "estimate, host memory" in found and "✓ fits" in found and "nothing is recomputed" in found
    sizes = {name: int(number) for name, number in re.findall(r'<span>([^<]+)</span><data value="(\d+)"', found)}
    assert {"libraries", "weights", "adapters", "optimizer", "activations"} <= sizes.keys()
    widths = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', found)]
    assert len(widths) == len(sizes) and sum(widths) <= 100.01
    assert "Full fine-tuning" in found and "0.52p + 24krd" in found and ">2p + 24krd" in shown(method="lora")
    tight = shown(memory_budget_gib="0.1")
    assert "✕ does not fit" in tight and "of 0.10 GiB" in tight and "what would help" in tight
    assert "stands here when nothing is missing" in shown(rank=0)


def test_memory_speaks_of_the_gpu_where_there_is_one(tab, base, chosen, monkeypatch):
    fake_gpus(monkeypatch, "GPU-1")
    tab.look(chosen, base)
    found = tab.check(chosen, *values_of(tab, base))[5]
    assert "estimate, GPU" in found and "of 76.00 GiB" in found and "context, gaps" in found


def test_the_rank_for_the_memory_is_a_click(tab, base, chosen):
    tab.look(chosen, base)
    values = values_of(tab, base, rank=64)
    found = tab.check(chosen, *values)[5]
    assert "Highest rank that fits: 256; 8 is enough for these rows" in found and "Use rank 8" in found
    (button,) = re.findall('data-remedy="([^"]*)"', found)
    values = filled(values, tab.apply(SimpleNamespace(remedy=html.unescape(button))))
    assert as_config(values, chosen).rank == 8
    assert "data-remedy" not in tab.check(chosen, *values)[5]


def test_a_findings_button_mends_it(tab, base, chosen):
    tab.look(chosen, base)
    values = values_of(tab, base, rank=64, lora_alpha="6", max_steps="4000")
    while buttons := re.findall('data-remedy="([^"]*)"', tab.check(chosen, *values)[4]):
        values = filled(values, tab.apply(SimpleNamespace(remedy=html.unescape(buttons[0]))))
    config = as_config(values, chosen)
    assert (config.rank, config.max_steps, config.num_epochs) == (8, None, 3.0)
    assert 1 <= config.adapter_scale <= 2
    strange = tab.apply(SimpleNamespace(remedy=json.dumps({"data": "/etc/passwd", "rank": 4})))
    assert as_config(filled(values, strange), chosen) == TrainConfig(**{**config.__dict__, "rank": 4})


def test_what_stops_a_run_stands_beside_start_and_no_run_begins(tab, base, chosen, tmp_path):
    values = values_of(tab, base, max_seq_length=8)
    problems, run = tab.begin(chosen, *values)
    assert run is None and "No row has a token to learn from" in problems
    assert "Stop" in tab.check(chosen, *values)[4]
    assert not (tmp_path / "home" / "runs").exists()


def test_modules_that_the_model_does_not_have_are_a_problem_of_their_field(tab, base, chosen):
    tab.look(chosen, base)
    values = values_of(tab, base, target_modules="c_attn")
    problems = tab.check(chosen, *values)[2]
    assert "no linear layer c_attn" in problems and "k_proj" in problems and "#field-target_modules" in problems
    assert "no linear layer c_attn" in tab.begin(chosen, *values)[0]
    values = values_of(tab, base, target_modules="c_attn", int8_modules="mlp@9", quantize_modules="nope")
    problems = tab.check(chosen, *values)[2]
    assert all(f"#field-{name} " in problems for name in ("target_modules", "quantize_modules", "int8_modules"))


def test_how_the_base_is_held_stands_beside_the_adapters_layers(tab, base, chosen):
    tab.look(chosen, base)
    plan = tab.check(chosen, *values_of(tab, base, method="qlora", int8_modules="v_proj@0"))[0]
    assert "Base: of 10 linear layers 9 in 4 bits, 1 in int8" in plan
    assert "Base:" not in tab.check(chosen, *values_of(tab, base, method="qlora"))[0]


def test_evaluation_rows_that_are_trained_on_are_counted(tab, base, chosen, tmp_path):
    rows = [alpaca(number) for number in range(390, 450)]
    both = Chosen(chosen.path, str(write_rows(tmp_path / "eval.jsonl", rows)), rows=400)
    tab.look(both, base)
    assert "10 evaluation rows are also trained on" in tab.check(both, *values_of(tab, base))[4]


def test_what_rows_say_is_never_html(tab, base, chosen, tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    shutil.copytree(base, tmp_path / evil.replace("/", ""))
    tab.look(chosen, str(tmp_path / evil))
    shown = tab.check(chosen, *values_of(tab, str(tmp_path / evil), dataset_license=f"cc-by-nc-4.0{evil}"))
    assert "<img" not in shown[0] + shown[4]


def test_a_check_is_fast_beside_what_is_remembered(tab, base, tmp_path):
    rows = write_rows(tmp_path / "many.jsonl", [alpaca(number) for number in range(2500)])
    many = Chosen(str(rows), rows=2500)
    tab.look(many, base)
    values, times = values_of(tab, base, rank=64), []
    for _ in range(20):
        begun = time.perf_counter()
        tab.check(many, *values)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.05


def test_the_recommendation_fills_the_form_and_says_why(tab, base, chosen):
    values = values_of(tab, base, rank=128, learning_rate=0.05, max_seq_length=16, max_steps="7")
    reasons, *update = tab.recommended(chosen, *values)
    config = as_config(filled(values, update), chosen)
    assert (config.rank, config.max_steps, config.target_modules) == (8, None, "all-linear")
    assert "Rank: 8 (was 128)" in reasons and "enough for 360 rows" in reasons
    assert "Warning" not in tab.check(chosen, *filled(values, update))[4]
    reasons, *update = tab.recommended(Chosen(""), *values)
    assert "no dataset is chosen" in reasons and filled(values, update) == values


def test_a_form_with_mistakes_is_filled_too(tab, base, chosen):
    values = values_of(tab, base, rank=0, lora_alpha="x")
    _, *update = tab.recommended(chosen, *values)
    assert as_config(filled(values, update), chosen).rank == 8


# Settings as YAML


def saved(tab, chosen, values, folder):
    text, problem = tab.save_settings(chosen, *values)
    assert problem == ""
    file = json.loads(text)
    (folder / file["name"]).write_text(file["text"])
    return folder / file["name"]


def test_settings_come_back_as_they_were_saved(tab, base, tmp_path, chosen):
    kept = keep_upload(tmp_path / "rows.jsonl", settings_in(tmp_path))
    mine = Chosen(str(kept), rows=400)
    values = values_of(
        tab, base, name="über/run 1", rank=32, target_modules="q_proj, v_proj", lora_alpha="24", score_fields="a, b",
        double_quant=False, learning_rate=3e-5, early_stopping_patience="2",
    )  # fmt: skip
    path = saved(tab, mine, values, tmp_path)
    assert path.name == "run-1.yaml" or path.suffix == ".yaml"
    told, dataset, *update = tab.load_settings(str(path))
    assert f"Loaded {path.name}" in told and (dataset.path, dataset.rows) == (str(kept), 400)
    assert as_config(update, dataset) == as_config(values, mine)


def test_the_example_comes_back_as_the_example(tab, tmp_path):
    opened = [component.value for component in tab.inputs]
    told, dataset, *update = tab.load_settings(str(saved(tab, example(), opened, tmp_path)))
    assert dataset.is_example and dataset.rows == 280
    assert as_config(update, dataset) == form.example_config()


@pytest.mark.parametrize("data", ["gone.jsonl", "/etc/passwd", "../rows.jsonl"])
def test_a_dataset_that_is_not_of_this_app_is_told_and_left_out(tab, tmp_path, chosen, data):
    (tmp_path / "settings.yaml").write_text(f"data: {data}\nrank: 4\n")
    told, dataset, *update = tab.load_settings(str(tmp_path / "settings.yaml"))
    assert "is not among the datasets here; the chosen dataset stays" in told and data.split("/")[-1] in told
    assert dataset == gr.skip() and as_config(update, chosen).rank == 4


def test_every_wrong_field_of_a_file_is_named_and_the_form_stays(tab, tmp_path):
    (tmp_path / "wrong.yaml").write_text("rnk: 4\nrank: many\nmethod: dora\n")
    told, dataset, *update = tab.load_settings(str(tmp_path / "wrong.yaml"))
    for text in ("did you mean rank?", "rank is &#x27;many&#x27;", "method is &#x27;dora&#x27;"):
        assert text in told
    assert str(tmp_path) not in told and all(value == gr.skip() for value in [dataset, *update])
    for text in ("{", "- a\n- b", "\x00"):
        (tmp_path / "wrong.yaml").write_text(text)
        assert "These settings were not loaded" in tab.load_settings(str(tmp_path / "wrong.yaml"))[0]


def test_settings_that_cannot_run_are_not_saved(tab, base, chosen):
    text, problem = tab.save_settings(chosen, *values_of(tab, base, rank=0))
    assert text == "" and "rank is 0" in problem


# Bases


def test_merged_models_of_runs_can_be_chosen_as_base(tab, tmp_path):
    run = run_in(tmp_path, name="tickets")
    for folder, config in (
        ("merged-original", {"model_type": "llama"}),
        ("merged-dequantized-nf4", {"quantization_config": {"load_in_4bit": True}}),
    ):
        (run.path / folder).mkdir()
        (run.path / folder / "config.json").write_text(json.dumps(config))
    (run.path / "merged-dequantized").mkdir()  # being written
    choices = form.bases(settings_in(tmp_path))
    assert choices[0][1] == "bundled"
    assert choices[1:] == [("tickets, merged onto the original base", str(run.path / "merged-original"))]
    assert tab.bases().choices == choices


def test_the_data_tab_and_the_findings_look_at_the_same_rows(tmp_path, base, chosen):
    """One rendering serves both: the sentence on the Data tab and the finding count alike."""
    with gr.Blocks(analytics_enabled=False):
        data, train = DataTab(settings_in(tmp_path)), TrainTab(settings_in(tmp_path))
    found = preview.lengths(Chosen(str(tmp_path / "rows.jsonl")), How(base), settings_in(tmp_path))
    cut = max(found.tokens) - 1
    sentence, _ = data.rows.show_lengths(chosen, base, "model", "all_responses", cut)
    train.look(chosen, base)
    told = train.check(chosen, *values_of(train, base, max_seq_length=cut))[4]
    count = re.search(r"(\d+ rows? \([\d.]+%\)) would be cut", sentence)[1]
    assert f"{count} would be cut" in told
