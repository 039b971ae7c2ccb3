"""Handlers and endpoints of the page: what a person types, uploads or clicks, and what comes back."""

import gc
import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers import (
    CHATML,
    ROOT,
    alpaca,
    held_by_another_process,
    model_folder,
    run_in,
    say,
    settings_in,
    started,
    step,
    tokenizer_folder,
    wait_for,
    write_rows,
)

from qlora_core import events
from qlora_core.cli import parser
from qlora_core.config import TrainConfig
from qlora_core.runs import RunStore
from qlora_core.ui import downloads, form, preview, publish_tab, run_view, words
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.data_tab import DataTab, example
from qlora_core.ui.preview import How
from qlora_core.ui.rows_view import turn
from qlora_core.ui.runs_tab import RunsTab
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.uploads import keep_upload, safe_name

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

EVIL = '<img src=x onerror="alert(1)"> & {{x}} ${y} </div>'
# Serves the page as app.py does; afterwards a line of input asks whether torch was imported.
SERVE = """
import sys, app
from qlora_core.settings import Settings
settings = Settings.from_environment()
demo = app.build_app(settings)
_, url, _ = app.launch(demo, settings, prevent_thread_lock=True, quiet=True)
print(url, flush=True)
for line in sys.stdin:
    print("torch" in sys.modules, flush=True)
"""


@contextmanager
def served(home: Path):
    """(url, ask): the app in a process of its own; `ask()` is True when torch is loaded there."""
    environment = os.environ | {
        "QLORA_LAB_HOME": str(home),
        "QLORA_LAB_LOCKS": str(home / "locks"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask() -> bool:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip() == "True"

    with process:
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http"), "the app did not start"
            yield url, ask
        finally:
            for run in RunStore(settings_in(home.parent)).list():
                if run.status().state in ("queued", "running"):
                    run.request_stop()
                    wait_for(lambda run=run: run.status().state not in ("queued", "running"), seconds=60)
            process.terminate()


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio():
    """gradio and its client leave event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(client, ask, folder) of one served app for all tests of the endpoints."""
    folder = tmp_path_factory.mktemp("lab")
    with served(folder / "home") as (url, ask):
        client = Client(url, verbose=False)
        yield client, ask, folder
        client.close()


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(12)])


@pytest.fixture
def base(tmp_path):
    """A base model that previews need: its tokenizer."""
    return str(tokenizer_folder(model_folder(tmp_path / "base"), chat_template=CHATML))


def tiny_config(**changed):
    from tiny_models import model_folder as trainable

    return {
        "base_model": str(trainable()),
        "method": "lora",
        "rank": 4,
        "compute_dtype": "fp32",
        "device": "cpu",
        "rows_per_step": 4,
        "max_steps": 8,
    } | changed


def built(kind, *arguments):
    with gr.Blocks(analytics_enabled=False):
        return kind(*arguments)


# Endpoints


def test_the_api_shows_its_endpoints_and_no_other(lab):
    named = lab[0].view_api(return_format="dict", print_info=False)["named_endpoints"]
    studies = {"start_study", "study_status", "study_results", "stop_study", "resume_study", "list_studies"}
    assert set(named) == {
        f"/{name}"
        for name in {"inspect_dataset", "start_run", "run_status", "stop_run", "list_runs", "push_run"} | studies
    }


def test_inspect_dataset_lists_every_bad_line(lab, tmp_path):
    path = write_rows(tmp_path / "mixed.jsonl", [alpaca(1), {"instruction": "no answer"}, alpaca(1)])
    report = lab[0].predict(file=handle_file(str(path)), api_name="/inspect_dataset")
    assert report["rows"] == 2
    assert [problem["line"] for problem in report["problems"]] == [2]
    assert report["duplicates"] == [{"line": 3, "first_line": 1}]


def test_start_run_names_every_wrong_setting(lab):
    with pytest.raises(AppError) as told:
        lab[0].predict(config={"rank": 0, "method": "dora"}, api_name="/start_run")
    assert "rank is 0" in str(told.value) and "method is 'dora'" in str(told.value)


def test_start_run_takes_no_file_of_the_server(lab, rows):
    with pytest.raises(AppError, match="names a file on the server"):
        lab[0].predict(config={"data": str(rows)}, api_name="/start_run")


def test_an_unknown_run_is_told_as_such(lab):
    with pytest.raises(AppError, match="there is no run 'nowhere'"):
        lab[0].predict(run_id="nowhere", api_name="/run_status")


def test_a_run_starts_once_and_finishes_and_torch_stays_out_of_the_app(lab, rows):
    client, ask, _ = lab
    config = tiny_config(name="once")
    first = client.predict(config=config, file=handle_file(str(rows)), api_name="/start_run")
    again = client.predict(config=config, file=handle_file(str(rows)), api_name="/start_run")
    assert first["run_id"] == again["run_id"]

    def finished():
        status = client.predict(run_id=first["run_id"], api_name="/run_status")
        assert status["state"] in ("queued", "running", "finished"), status["detail"]
        return status if status["state"] == "finished" else None

    status = wait_for(finished, seconds=120)
    assert status["step"] == 8 and status["eval_loss"] > 0
    listed = client.predict(api_name="/list_runs")["runs"]
    assert [run["run_id"] for run in listed].count(first["run_id"]) == 1
    assert not ask()


def test_a_study_is_started_once_stopped_and_told_by_a_client(lab, rows):
    client, ask, folder = lab
    config, file, asked = tiny_config(), handle_file(str(rows)), {"vary": {"rank": [2, 4]}, "name": "ranks"}
    (folder / "home" / "locks").mkdir(parents=True, exist_ok=True)
    with held_by_another_process(folder / "home" / "locks" / "cpu.lock"):
        first = client.predict(config=config, file=file, study=asked, api_name="/start_study")
        again = client.predict(config=config, file=file, study=asked, api_name="/start_study")
        assert first["study_id"] == again["study_id"] and (first["state"], first["total"]) == ("queued", 2)
        assert "are stopping" in client.predict(study_id=first["study_id"], api_name="/stop_study")["detail"]
    assert client.predict(study_id=first["study_id"], api_name="/study_status")["state"] == "stopped"
    found = client.predict(study_id=first["study_id"], api_name="/study_results")
    assert [run["label"] for run in found["runs"]] == ["rank 2", "rank 4"] and found["verdicts"]
    assert [study["name"] for study in client.predict(api_name="/list_studies")["studies"]] == ["ranks"] and not ask()
    with pytest.raises(AppError) as told:
        client.predict(config=config, file=file, study={"vary": {"rank": 2}, "x": 1}, api_name="/start_study")
    assert "study: x is not known" in str(told.value) and "vary is" in str(told.value)


def test_stop_takes_a_waiting_run_out_of_the_queue(lab, rows):
    client = lab[0]
    file = handle_file(str(rows))
    long = client.predict(config=tiny_config(name="long", max_steps=5000), file=file, api_name="/start_run")
    waits = client.predict(config=tiny_config(name="waits", seed=7), file=file, api_name="/start_run")
    status = client.predict(run_id=waits["run_id"], api_name="/run_status")
    assert (status["state"], status["queue_place"]) == ("queued", 1)
    assert "queue" in client.predict(run_id=waits["run_id"], api_name="/stop_run")["detail"]
    assert client.predict(run_id=waits["run_id"], api_name="/run_status")["state"] == "stopped"
    client.predict(run_id=long["run_id"], api_name="/stop_run")
    wait_for(lambda: client.predict(run_id=long["run_id"], api_name="/run_status")["state"] == "stopped", seconds=60)
    with pytest.raises(AppError, match="nothing to stop"):
        client.predict(run_id=long["run_id"], api_name="/stop_run")


def test_handlers_of_the_page_do_not_import_torch(tmp_path, rows, base):
    code = f"""
import sys
import app
from pathlib import Path
from qlora_core.settings import Settings
import gradio as gr
from qlora_core.ui.data_tab import DataTab
from qlora_core.ui.train_tab import TrainTab
from qlora_core.ui.runs_tab import RunsTab
from qlora_core.ui.compare_tab import CompareTab
assert "torch" not in sys.modules, "import app"
settings = Settings(home=Path({str(tmp_path)!r}) / "home", locks=Path({str(tmp_path)!r}) / "locks")
app.build_app(settings)
with gr.Blocks(analytics_enabled=False):
    data, train, runs = DataTab(settings), TrainTab(settings), RunsTab(settings, gr.HTML())
    compare = CompareTab(settings, train)
chosen = data.take_upload([{str(rows)!r}])[data.chosen]
how = ({base!r}, "model", "all_responses")
assert "lab-tokens" in data.rows.show_row(chosen, 1, *how, 512)[0]
data.rows.show_lengths(chosen, *how, 512)
assert data.rows.find_row(chosen, 1, "answer")[0]
values = [component.value for component in train.inputs]
assert train.check(chosen, *values)[1]
train.begin(chosen, *values)
runs.tick("", {{}})
form = [component.value for component in compare.form.choices]
list(compare.form.begin_pair(False, chosen, *form, *values))
cursor = compare.tick("", "", "step", "automatic").get(compare.cursor, "")
compare.tick("", cursor, "step", "automatic")
assert "torch" not in sys.modules, "handlers"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Data tab


def test_the_page_opens_with_a_dataset_that_can_be_trained_on(tmp_path):
    tab = built(DataTab, settings_in(tmp_path))
    found = tab.first_look()
    assert found[tab.chosen].is_example and found[tab.chosen].rows > 0 and found[tab.rows.row] == 1
    assert "support_tickets.jsonl" in found[tab.report] and found[tab.problems] == "" and found[tab.use].interactive


def test_an_upload_with_problems_lists_them_and_waits_for_a_decision(tmp_path):
    path = write_rows(tmp_path / "mixed.jsonl", [alpaca(1), alpaca(2), {"instruction": "no answer"}])
    tab = built(DataTab, settings_in(tmp_path))
    found = tab.take_upload([str(path)])
    assert "no response" in found[tab.problems] and ">3<" in found[tab.problems]
    assert found[tab.skip].visible and not found[tab.use].interactive
    allowed = tab.set_skip(found[tab.chosen], found[tab.several], True)
    assert allowed[tab.use].interactive and allowed[tab.chosen].config_fields()["skip_bad_rows"]


def test_a_file_that_is_no_dataset_says_what_it_is(tmp_path):
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04rest")
    tab = built(DataTab, settings_in(tmp_path))
    found = tab.take_upload([str(tmp_path / "sheet.xlsx")])
    assert "zip archive or spreadsheet" in found[tab.problems]
    assert found[tab.chosen].path == "" and not found[tab.use].interactive


@pytest.mark.parametrize("name", ["../../evil.jsonl", "..", "a b;rm -rf.jsonl", "é.jsonl"])
def test_an_upload_stays_below_the_uploads_folder(tmp_path, name):
    source = tmp_path / "source"
    source.write_text("{}")
    settings = settings_in(tmp_path)
    assert "/" not in safe_name(name) and safe_name(name).strip(".")
    kept = keep_upload(source, settings)
    assert kept.is_relative_to(settings.home / "uploads") and kept.read_text() == "{}"
    assert keep_upload(source, settings) == kept


def test_a_reload_takes_up_the_upload_that_the_browser_remembers_and_nothing_else(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [alpaca(1), alpaca(2)])
    tab = built(DataTab, settings_in(tmp_path))
    found = tab.take_upload([str(path)])
    remembered = found[tab.remembered]
    assert tab.first_look(remembered)[tab.chosen].path == found[tab.chosen].path
    (tmp_path / "home" / "secret").write_text("{}")
    for other in (
        "",
        "nonsense",
        remembered.replace("mine.jsonl", "gone.jsonl"),
        remembered.replace("uploads/", "uploads/../"),
        json.dumps({"data": "secret", "eval": "", "columns": ""}),
        json.dumps({"data": "uploads/../secret", "eval": "", "columns": ""}),
        json.dumps({"data": str(path), "eval": "", "columns": ""}),
        json.dumps({"data": "uploads", "eval": "", "columns": ""}),
        json.dumps({"data": ["uploads"], "eval": 1, "columns": ""}),
        json.loads(remembered)["data"],
        "job:../uploads",
        "\0",
        None,
    ):
        assert tab.first_look(other)[tab.chosen].is_example, other


def test_cell_content_is_never_html(tmp_path, base):
    path = write_rows(tmp_path / "evil.jsonl", [alpaca(1, instruction=EVIL, output=EVIL), {EVIL: 1}])
    tab = built(DataTab, settings_in(tmp_path))
    found = tab.take_upload([str(path)])
    shown, _ = tab.rows.show_row(found[tab.chosen], 1, base, "model", "all_responses", 512)
    _, told = tab.rows.find_row(found[tab.chosen], 1, EVIL + "?")
    _, place = tab.rows.show_found(told, found[tab.chosen], 1, base, "model", "all_responses", 512)
    for text in (found[tab.report], found[tab.problems], found[tab.columns_why], shown, place):
        assert "<img" not in text
    assert "&lt;" in shown and "&lt;img" in found[tab.problems] and "&lt;img" in place


def test_tokens_show_what_is_trained_on_and_what_is_cut(tmp_path, base, rows):
    settings = settings_in(tmp_path)
    chosen = Chosen(str(rows), rows=12)
    whole = preview.row_html(chosen, 1, How(base), max_seq_length=512, settings=settings)
    assert 'class="on"' in whole and 'class="off special"' in whole and "cut" not in whole
    cut = preview.row_html(chosen, 1, How(base), max_seq_length=8, settings=settings)
    assert "cut here" in cut
    assert "off cut" in cut and "Nothing of this row is trained on" in cut


def test_lengths_count_the_rows_that_would_be_cut(tmp_path, base, rows):
    found = preview.lengths(Chosen(str(rows)), How(base), settings_in(tmp_path))
    assert len(found.tokens) == 12
    longest = max(found.tokens)
    assert preview.lengths_sentence(found, rows=12, max_seq_length=longest).startswith("No row is longer")
    some = preview.lengths_sentence(found, rows=12, max_seq_length=longest - 1)
    assert f"{found.cut(longest - 1)} row" in some and "%" in some
    assert "first 2,000 rows" in preview.lengths_sentence(found, rows=9000, max_seq_length=longest)


def test_pages_go_round(rows):
    chosen = Chosen(str(rows), rows=12)
    assert (turn(chosen, 1, -1), turn(chosen, 12, 1), turn(chosen, 3, 1)) == (12, 1, 4)


# Train tab


@pytest.fixture
def train(tmp_path):
    return built(TrainTab, settings_in(tmp_path))


def values_of(tab, **changed):
    return [changed.get(name, component.value) for name, component in zip(form.SPECS, tab.inputs, strict=True)]


def test_the_form_has_every_setting_once(train):
    assert set(train.fields) == {name for name in TrainConfig.__dataclass_fields__} - set(form.ELSEWHERE)


def test_the_form_as_it_opens_is_the_example(train):
    config = form.to_config(dict(zip(form.SPECS, values_of(train), strict=True)), example().config_fields())
    assert config == form.example_config()


def test_all_problems_stand_beside_start_and_mark_their_fields(train):
    _, command, problems, *_ = train.check(example(), *values_of(train, rank=0, learning_rate=None, lora_alpha="x"))
    assert all(name in problems for name in ("rank is 0", "learning_rate is empty", "lora_alpha is &#x27;x&#x27;"))
    assert "#field-rank" in problems and "#field-lora_alpha" in problems and command == ""
    assert train.check(example(), *values_of(train))[2] == ""


def test_a_dataset_error_stands_beside_start(train, tmp_path, base):
    path = write_rows(tmp_path / "one.jsonl", [alpaca(1)])
    problems, run = train.begin(
        Chosen(str(path), rows=1), *values_of(train, base_model=base, score="none", score_fields="")
    )
    assert "one usable row" in problems and run is None
    problems, run = train.begin(Chosen(""), *values_of(train))
    assert "no dataset is chosen" in problems and run is None


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"double_quant": False, "activation_checkpointing": "full"},
        {"name": 'it\'s "q" $x', "target_modules": "q_proj, v_proj"},
        {"quantize_modules": "none", "int8_modules": "attention, mlp@0-3", "row_order_seed": "7"},
    ],
)
def test_the_command_line_does_the_same(train, changed):
    config = form.to_config(dict(zip(form.SPECS, values_of(train, **changed), strict=True)), example().config_fields())
    printed = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {form.command_line(config)}"], capture_output=True, check=True
    )
    arguments = printed.stdout.decode().split("\0")[:-1]
    assert arguments[:3] == ["python", "-m", "qlora_core"]
    options = parser().parse_args(arguments[3:])
    parsed = {
        name: value
        for name in TrainConfig.__dataclass_fields__
        if (value := getattr(options, f"config_{name}")) is not None
    }
    if "score_fields" in parsed:
        parsed["score_fields"] = parsed["score_fields"].split(",")
    for name in ("data", "eval_data"):
        parsed[name] = str(Path(parsed[name]).resolve())
    assert TrainConfig.from_mapping(parsed) == config


def test_another_dataset_resets_what_belongs_to_the_example_and_keeps_what_was_changed(train, rows):
    before = values_of(train, rank=32, seed=7)
    after = train.settle(Chosen(str(rows), rows=12), *before)
    settled = {
        name: old if isinstance(new, dict) else new for name, old, new in zip(form.SPECS, before, after, strict=True)
    }
    assert (settled["score"], settled["score_fields"], settled["name"]) == ("none", "", "")
    assert (settled["rank"], settled["seed"]) == (32, 7)
    config = form.to_config(settled, {"data": str(rows), "eval_data": None, "skip_bad_rows": False})
    assert config.learning_rate == TrainConfig().learning_rate and config.max_steps is None


def test_a_runs_settings_fill_the_form(train):
    config = TrainConfig(
        rank=64, lora_alpha=16, target_modules=("q_proj", "v_proj"), score="json", score_fields=("a", "b"),
        quantize_modules=(), int8_modules=("attention@0-3", "mlp"), row_order_seed=7,
    )  # fmt: skip
    filled = dict(zip(form.SPECS, train.fill(config), strict=True))
    assert form.to_config(filled, {"data": "", "eval_data": None, "skip_bad_rows": False}) == config


# Runs tab


@pytest.fixture
def run(tmp_path):
    run = run_in(tmp_path, name="first")
    say(run, events.Launched(attempt=1), started(total_steps=10), step(1), step(2))
    return run


@pytest.fixture
def runs(tmp_path):
    return built(RunsTab, settings_in(tmp_path), gr.HTML())


def test_without_runs_the_page_says_what_to_do(runs):
    assert "take the example" in runs.tick("", {})[runs.table]


def test_a_tick_sends_only_what_changed(runs, run):
    first = runs.tick("", {})
    assert first[runs.selected] == run.run_id and "step 2 of 10" in first[runs.head]
    cursor = first[runs.cursor]
    assert runs.tick(run.run_id, cursor) == gr.skip()
    say(run, step(3))
    second = runs.tick(run.run_id, cursor)
    assert "step 3 of 10" in second[runs.head] and json.loads(second[runs.charts[0]])["data"][0]["x"] == [1, 2, 3]
    say(run, events.Note(text="a word"))
    third = runs.tick(run.run_id, second[runs.cursor])
    assert "a word" in third[runs.log] and runs.charts[0] not in third


def test_a_tick_chooses_no_run_before_the_page_has_read_its_address(runs, run):
    assert runs.tick(runs.selected.value, {}) == gr.skip()


def test_buttons_fit_the_state(runs, run):
    shown = runs.tick("", {})
    assert shown[runs.resume].visible and shown[runs.delete].visible and not shown[runs.stop].visible
    say(run, events.Finished(step=3))
    shown = runs.tick(run.run_id, shown[runs.cursor])
    assert not shown[runs.resume].visible and "finished" in shown[runs.head]


def test_a_failed_run_says_why_and_what_to_do(runs, run):
    say(run, events.Failed(step=2, reason=f"out of memory {EVIL}; lower max_seq_length"))
    shown = runs.tick("", {})
    assert "lower max_seq_length" in shown[runs.head] and "Copy the settings" in shown[runs.head]
    assert not any("<img" in value for value in shown.values() if isinstance(value, str))


def test_what_does_not_work_is_told_beside_the_buttons(runs, run):
    assert "nothing to stop" in runs.stop_chosen(run.run_id)
    assert "there is no run" in runs.resume_chosen("gone")


def test_delete_removes_the_run_and_shows_another(runs, run):
    selected, problem, _ = runs.delete_run(run.run_id)
    assert (selected, problem) == ("", "") and not run.path.exists()
    assert runs.tick(run.run_id, {})[runs.selected] == ""


def test_settings_of_a_run_come_with_its_dataset_while_that_is_there(runs, run):
    chosen, config = runs.settings_of(run.run_id)
    assert chosen.path == config.data and config.name == "first"
    Path(config.data).unlink()
    assert runs.settings_of(run.run_id)[0] is None


def test_answers_are_escaped_and_changed_ones_come_first(run):
    rows = [{"line": 1, "prompt": EVIL, "reference": "a", "answer": "same", "correct": False}]
    after = [*rows, {"line": 2, "prompt": "p2", "reference": "b", "answer": "now right", "correct": True}]
    before = [*rows, {**after[1], "answer": "was wrong", "correct": False}]
    for number, answers in ((0, before), (3, after)):
        (run.path / f"answers-{number}.json").write_text(json.dumps(answers))
        say(run, events.Score(step=number, name="exact", correct=0, total=2, seconds=1))
    shown = run_view.answers_html(run, run.history())
    assert "<img" not in shown and shown.index("now right") < shown.index("same")


def test_the_log_is_plain_words_and_keeps_the_newest_of_a_phase():
    told = [text for _, text in words.event_lines([
        started(), events.Phase(name="answering", done=16, total=48), events.Phase(name="answering", done=32, total=48),
        events.Score(step=3, name="json", correct=15, total=48, seconds=2), events.Resumed(from_step=3, skipped=("bad",)),
    ])]  # fmt: skip
    assert "answering: 32 of 48" in told and "answering: 16 of 48" not in told
    assert any("15 of 48 (31%; 95 % interval 20% to 45%)" in text for text in told)
    assert told[-2:] == ["goes on after step 3", "bad"]


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (words.size(5_873_000_000), "5.47 GiB"),
        (words.seconds(0.2731), "0.273 s"),
        (words.duration(200), "3 min"),
        (words.size(None), "–"),
    ],
)
def test_figures_carry_units_and_sensible_digits(figure, text):
    assert figure == text


# Publish tab


def test_the_zip_holds_the_adapter_and_nothing_of_the_training(tmp_path, run):
    settings = settings_in(tmp_path)
    run.adapter.mkdir()
    (run.path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (run.path / "checkpoints" / "checkpoint-2" / "state.pt").write_bytes(b"optimizer")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run.adapter / name).write_bytes(b"x")
    say(run, events.Finished(step=2))
    path = downloads.adapter_zip(run, settings)
    assert path.parent == settings.downloads
    assert sorted(zipfile.ZipFile(path).namelist()) == ["first/adapter_config.json", "first/adapter_model.safetensors"]
    written = path.stat().st_mtime_ns
    assert downloads.adapter_zip(run, settings).stat().st_mtime_ns == written


def test_a_run_without_an_adapter_has_no_download(tmp_path, run):
    tab = built(publish_tab.PublishTab, settings_in(tmp_path))
    assert "has no adapter to download yet" in tab.adapter(run.run_id)
    assert tab.choices(None).choices == []
    assert "Nothing to publish yet" in tab.show(None)[0]


def test_a_merge_that_cannot_be_says_why(tmp_path, run):
    tab = built(publish_tab.PublishTab, settings_in(tmp_path))
    *_, last = tab.merged(run.run_id, "original")
    assert "No merge" in last and "has no adapter yet" in last


def test_train_form_says_at_once_what_the_data_tab_blocks(tmp_path, base):
    data, train = built(DataTab, settings_in(tmp_path)), built(TrainTab, settings_in(tmp_path))
    bad = data.take_upload([str(write_rows(tmp_path / "bad.jsonl", [alpaca(1), {}, alpaca(2)]))])
    chosen = bad[data.chosen]
    assert "bad.jsonl has 1 row that cannot be trained on" in train.check(chosen, *values_of(train))[2]
    allowed = data.set_skip(chosen, bad[data.several], True)[data.chosen]
    assert train.check(allowed, *values_of(train))[2] == ""
    lone = data.take_upload([str(write_rows(tmp_path / "one.jsonl", [alpaca(1)]))])[data.chosen]
    assert "one.jsonl has one usable row" in train.check(lone, *values_of(train))[2]
