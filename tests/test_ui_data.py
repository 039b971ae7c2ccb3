"""The Data tab beyond a file: the Hub, several files, columns, near duplicates, preparing, pushing; reloads on the way."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from helpers import CHATML, alpaca, model_folder, settings_in, tokenizer_folder, wait_for, write_rows
from hub_server import Hub, hub

from qlora_core import jobs, template_trial
from qlora_core.config import TrainConfig
from qlora_core.data.locate import LINEAGE
from qlora_core.data.preparation import Preparation
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.ui import data_tab, saved_settings
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.data_tab import NOT_SEVERAL, DataTab
from qlora_core.ui.preparing import SPECS, command_options

pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
TOKEN = "hf_SECRETMARKER456"
NOTHING = Chosen(path="")


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio() -> Any:
    """gradio leaves event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def tab(settings: Settings) -> DataTab:
    with gr.Blocks(analytics_enabled=False):
        return DataTab(settings)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(model_folder(tokenizer_folder(tmp_path / "base", chat_template=CHATML)))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub that the page and its jobs talk to."""
    with hub(tmp_path / "hub") as found:
        found.add_user("alice")
        found.add_token("alice", text=TOKEN)
        for name, value in {
            "HF_ENDPOINT": found.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)  # of this process, which is the page's
        yield found


def ticked(tab: DataTab, found: dict[Any, Any], chosen: Chosen = NOTHING) -> dict[Any, Any]:
    """What the page shows when the job that it watches has ended."""
    assert found[tab.job], found
    job = jobs.find(found[tab.job], tab.settings)
    wait_for(lambda: job.progress().state != jobs.RUNNING, seconds=60)
    return seen(tab, tab.tick(found[tab.job], chosen, found.get(tab.looked, NOTHING)))


def seen(tab: DataTab, found: dict[Any, Any]) -> dict[Any, Any]:
    assert set(found) <= set(tab.outputs), "gradio refuses what is no output of the handler"
    return found


def prepare_values(tab: DataTab, **changed: Any) -> list[Any]:
    values = {name: component.value for name, component in tab.prepare.inputs.items()} | changed
    return list(values.values())


def test_columns_of_a_table_are_proposed_and_read_when_confirmed(tab: DataTab, tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_text("question,answer\nWhat?,That.\nWho?,Them.\n")
    found = seen(tab, tab.take_upload([str(tmp_path / "qa.csv")]))
    assert found[tab.chosen].path == "" and not found[tab.use].interactive
    proposed = {role: box.value for role, box in ((r, found[b]) for r, b in tab.columns.items())}
    assert (proposed["prompt"], proposed["response"], proposed["input"]) == ("question", "answer", "")
    assert found[tab.columns_box].open and "in no form that is known" in found[tab.problems]
    wrong = seen(tab, tab.take_columns(found[tab.looked], NOT_SEVERAL, "question", "", "", "", "", ""))
    assert "makes no row" in wrong[tab.problems] and tab.chosen not in wrong
    found = seen(tab, tab.take_columns(found[tab.looked], NOT_SEVERAL, *proposed.values()))
    assert found[tab.chosen].rows == 2 and found[tab.use].interactive
    assert found[tab.chosen].config_fields()["columns"] == "prompt=question, response=answer"
    assert tab.first_look(found[tab.remembered])[tab.chosen] == found[tab.chosen], "a reload keeps the columns"


def test_several_files_become_one_dataset_asking_for_columns_first(tab: DataTab, tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_text("question,answer\nWhat?,That.\n")
    files = [str(write_rows(tmp_path / "a.jsonl", [alpaca(1), alpaca(2)])), str(tmp_path / "qa.csv")]
    found = seen(tab, tab.take_upload(files))
    assert found[tab.several] and "qa.csv" in found[tab.columns_why]
    found = tab.take_columns(Chosen(path=""), found[tab.several], "question", "answer", "", "", "", "")
    done = ticked(tab, found)
    assert done[tab.chosen].rows == 3 and done[tab.chosen].is_prepared
    assert "qa.csv" in done[tab.report] and "columns chosen by hand" in done[tab.report]
    assert tab.first_look(done[tab.remembered])[tab.chosen] == done[tab.chosen], "a reload takes it up again"


def test_files_with_other_column_names_are_asked_for_one_by_one(tab: DataTab, tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_text("question,answer\nWhat?,That.\n")
    (tmp_path / "fr.csv").write_text('frage,"antwort, kurz"\nWas?,Das.\n')
    first = seen(tab, tab.take_upload([str(tmp_path / "qa.csv"), str(tmp_path / "fr.csv")]))
    assert first[tab.chosen].path == "" and not first[tab.use].interactive, (
        "what was there before is not for these files"
    )
    second = seen(tab, tab.take_columns(Chosen(path=""), first[tab.several], "question", "answer", "", "", "", ""))
    assert "fr.csv" in second[tab.columns_why]
    third = tab.take_columns(Chosen(path=""), second[tab.several], "frage", "antwort, kurz", "", "", "", "")
    assert third[tab.chosen].path == "" and ticked(tab, third)[tab.chosen].rows == 2


def test_rows_are_gone_to_by_line_and_by_the_tokens_they_have(tab: DataTab, tmp_path: Path, base: str) -> None:
    rows = [alpaca(1), {}, alpaca(2, output="fox " * 9), alpaca(3, output="qzx" * 11), alpaca(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    chosen = tab.set_skip(tab.take_upload([str(path)])[tab.chosen], NOT_SEVERAL, True)[tab.chosen]
    how = (base, "model", "all_responses")
    assert tab.rows.extreme(chosen, 1, *how, longest=True) == 3, "fewer characters than row 2, and more tokens"
    assert tab.rows.find_row(chosen, 1, "line 3") == (2, "")
    number, told = tab.rows.find_row(chosen, 1, "Line 2")
    assert number == 2 and "is no usable row" in told
    assert tab.rows.find_row(chosen, 1, "99") == (1, "There are 4 rows")


def test_what_a_preparation_has_to_say_stands_where_its_button_is(
    tab: DataTab, settings: Settings, tmp_path: Path, base: str
) -> None:
    looked = tab.take_upload([str(write_rows(tmp_path / "rows.jsonl", [alpaca(1), {}, alpaca(2)]))])
    arguments = tab.prepare.arguments(looked[tab.chosen], "set", "model", base, tuple(prepare_values(tab)))
    watched = seen(tab, tab._watch(jobs.start(arguments, settings), looked[tab.chosen]))
    assert tab.first_look(watched[tab.remembered])[tab.chosen] == looked[tab.chosen], (
        "a reload keeps what it is made of"
    )
    assert not watched[tab.prepare.begin].interactive and "lab-job" in watched[tab.prepare.result]
    failed = ticked(tab, watched, looked[tab.chosen])
    assert "Leave the listed rows out" in failed[tab.prepare.result] and failed[tab.prepare.begin].interactive
    assert tab.problems not in failed, "the list of bad rows stays"


def test_a_bad_row_among_several_files_waits_for_a_decision(tab: DataTab, tmp_path: Path) -> None:
    files = [
        str(write_rows(tmp_path / "a.jsonl", [alpaca(1), alpaca(2)])),
        str(write_rows(tmp_path / "b.jsonl", [alpaca(3), {}])),
    ]
    found = tab.take_upload(files)
    done = ticked(tab, found)
    assert "b.jsonl: 1 row cannot be used" in done[tab.problems] and done[tab.skip].visible
    again = ticked(tab, tab.set_skip(Chosen(path=""), found[tab.several], True))
    assert again[tab.chosen].rows == 3 and "1 row left out" in again[tab.report]


def test_a_dataset_of_the_hub_is_fetched_with_the_persons_token(tab: DataTab, served: Hub, settings: Settings) -> None:
    rows = "".join(json.dumps(alpaca(n)) + "\n" for n in range(30))
    served.add_repo("alice/tickets", private=True, files={"train.jsonl": rows, "README.md": "---\nlicense: mit\n---\n"})
    done = ticked(tab, tab.take_hub(None, TOKEN, "https://huggingface.co/datasets/alice/tickets", "", "", "", "20"))
    assert done[tab.chosen].rows == 20 and "alice--tickets" in done[tab.report]
    assert tab.first_look(done[tab.remembered])[tab.chosen] == done[tab.chosen], "a reload takes it up again"
    assert (
        "licence: mit. Only the first 20 rows were fetched" in done[tab.report] and done[tab.chosen].license() == "mit"
    )
    refused = ticked(tab, tab.take_hub(None, "hf_wrong", "alice/tickets", "", "", "", ""))
    assert refused[tab.problems] and "alice/tickets" in refused[tab.problems]
    for text, says in (("not a name", "not a name"), ("alice/tickets", "is no whole number")):
        found = seen(tab, tab.take_hub(None, "", text, "", "", "", "many"))
        assert says in found[tab.problems]
    assert not any(TOKEN.encode() in path.read_bytes() for path in settings.home.rglob("*") if path.is_file())


def test_preparing_makes_a_set_that_can_be_used_downloaded_and_pushed(
    tab: DataTab, served: Hub, settings: Settings, tmp_path: Path, base: str
) -> None:
    rows = [alpaca(n, output=f"Mail a{n}@example.com.", source="ab"[n % 2]) for n in range(20)]
    chosen = tab.take_upload([str(write_rows(tmp_path / "rows.jsonl", rows))])[tab.chosen]
    with pytest.raises(Exception, match="no row has|balance|go together"):
        tab.prepare.arguments(chosen, "x", "model", base, tuple(prepare_values(tab, balance_by="source")))
    values = prepare_values(tab, personal_data="mask", stratify_by="source", license="cc-by-4.0", eval_fraction=0.2)
    arguments = tab.prepare.arguments(chosen, "my set", "model", base, tuple(values))
    done = ticked(tab, tab._watch(jobs.start(arguments, settings)))
    prepared = done[tab.chosen]
    assert (prepared.name, prepared.rows, prepared.eval_file.name) == ("my-set", 16, "eval.jsonl")
    assert "personal data" in done[tab.prepare.result] and ".zip" in done[tab.prepare.result]
    assert len(list(settings.downloads.glob("*my-set-v1.zip"))) == 1
    shown, _ = tab.rows.show_row(prepared, 1, base, "model", "all_responses", 512)
    assert "[EMAIL]" in shown.replace("</span>", "").replace('<span class="on">', "")

    run = RunStore(settings).create(TrainConfig(base_model=base, **prepared.config_fields()))
    assert run.config().dataset_license == "cc-by-4.0" and run.dataset().eval_rows == 4

    pushing = tab.prepare.pushing
    for repository, token, says in (("", TOKEN, "no repository"), ("alice/mine", "", "nobody is known to the Hub")):
        assert says in [*pushing.begin(None, token, prepared, repository, False)][-1][2]
    job_id = [*pushing.begin(None, TOKEN, prepared, "alice/mine", False)][-1][0]
    wait_for(lambda: jobs.find(job_id, settings).progress().state != jobs.RUNNING, seconds=60)
    _, timer, told, _ = pushing.view.tick(job_id)
    assert "Pushed" in told and not timer.active
    repo = served.repo("alice/mine")
    assert repo.private and {"README.md", "data/train.parquet", "data/validation.parquet"} <= set(repo.head.files)
    assert "sources.json" not in repo.head.files and "train.jsonl" not in repo.head.files
    assert not any(TOKEN.encode() in path.read_bytes() for path in settings.home.rglob("*") if path.is_file())


def test_preparing_again_begins_with_the_same_sources(
    tab: DataTab, settings: Settings, tmp_path: Path, base: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(20)])
    chosen = tab.take_upload([str(path)])[tab.chosen]
    first = tab.prepare.arguments(chosen, "set", "model", base, tuple(prepare_values(tab)))
    done = ticked(tab, tab._watch(jobs.start(first, settings)))
    second = tab.prepare.arguments(done[tab.chosen], "set", "model", base, tuple(prepare_values(tab, limit="10")))
    assert second[1] == first[1] and "--limit=10" in second
    done = ticked(tab, tab._watch(jobs.start(second, settings)))
    assert "version 2" in done[tab.report] and "removed" in done[tab.report]


def test_near_duplicates_are_found_listed_and_leave_the_choice_alone(tab: DataTab, tmp_path: Path) -> None:
    text = "The order that I placed on your site last Monday has not been delivered to my address yet. " * 4
    rows = [alpaca(1, output=text), alpaca(1, output=text + "Why?"), alpaca(2)]
    chosen = tab.take_upload([str(write_rows(tmp_path / "rows.jsonl", rows))])[tab.chosen]
    done = ticked(tab, tab.find_near(chosen, 0.8), chosen)
    assert "1 near duplicate at 0.8 among 3 rows" in done[tab.near_found] and tab.chosen not in done
    assert done[tab.use].interactive


def test_another_file_to_evaluate_on_is_checked_and_compared(tab: DataTab, tmp_path: Path) -> None:
    chosen = tab.take_upload([str(write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(5)]))])[tab.chosen]
    held_out = write_rows(tmp_path / "held_out.jsonl", [alpaca(4), alpaca(9)])
    found = seen(tab, tab.take_eval(str(held_out), chosen))
    assert Path(found[tab.chosen].eval_path).name == "held_out.jsonl"
    assert "1 of the 2 rows of held_out.jsonl are also trained on" in found[tab.overlap]
    assert tab.first_look(found[tab.remembered])[tab.chosen] == found[tab.chosen], "a reload keeps the file"
    bad = write_rows(tmp_path / "bad.jsonl", [{}, alpaca(1)])
    assert "bad.jsonl" in seen(tab, tab.take_eval(str(bad), chosen))[tab.problems]


def test_a_large_file_is_looked_at_by_a_job_that_a_reload_joins(
    tab: DataTab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tab, "LARGE_BYTES", 200_000)
    path = write_rows(tmp_path / "large.jsonl", [alpaca(n) for n in range(5000)])
    found = seen(tab, tab.take_upload([str(path)]))
    assert found[tab.timer].active and not found[tab.use].interactive and tab.chosen not in found
    again = seen(tab, tab.first_look(found[tab.remembered]))
    assert again[tab.job] == found[tab.job] and again[tab.chosen].is_example
    found = tab.look(Chosen(str(path), eval_path=str(path)))
    done = ticked(tab, found)
    assert Path(done[tab.chosen].eval_path).name == "large.jsonl", "what belongs to it comes along"
    assert done[tab.chosen].rows == 5000 and not done[tab.timer].active
    gone = seen(tab, tab.tick("0" * 24, done[tab.chosen], NOTHING))
    assert not gone[tab.timer].active


def test_a_large_prepared_set_is_looked_at_as_a_set(
    tab: DataTab, settings: Settings, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(5000)])
    chosen = tab.take_upload([str(path)])[tab.chosen]
    arguments = tab.prepare.arguments(chosen, "set", "model", base, tuple(prepare_values(tab)))
    monkeypatch.setattr(data_tab, "LARGE_BYTES", 100_000)
    looked = ticked(tab, tab._watch(jobs.start(arguments, settings)))
    done = ticked(tab, looked)
    assert done[tab.chosen].is_prepared and done[tab.chosen].name == "set" and done[tab.chosen].rows == 4500


def test_what_has_changed_since_it_was_looked_at_is_not_trained_on_unseen(
    tab: DataTab, settings: Settings, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(5)])
    first = tab.look(Chosen(str(path)))[tab.chosen]
    assert first.problem(settings) is None
    write_rows(path, [alpaca(n, output="other") for n in range(5)])
    assert "has changed since it was looked at" in first.problem(settings)
    again = tab.look(Chosen(str(path)))[tab.chosen]
    assert again != first and again.problem(settings) is None, "another value, so that the page shows other rows"
    path.unlink()
    assert "is gone" in again.problem(settings)


def test_a_set_with_columns_chosen_by_hand_can_be_prepared_again(
    tab: DataTab, settings: Settings, tmp_path: Path, base: str
) -> None:
    (tmp_path / "qa.csv").write_text("q,a\n" + "".join(f"q{n},a{n}\n" for n in range(10)))
    looked = tab.take_upload([str(tmp_path / "qa.csv")])[tab.looked]
    chosen = tab.take_columns(looked, NOT_SEVERAL, "q", "a", "", "", "", "")[tab.chosen]
    first = tab.prepare.arguments(chosen, "set", "model", base, tuple(prepare_values(tab)))
    made = ticked(tab, tab._watch(jobs.start(first, settings)))[tab.chosen]
    second = tab.prepare.arguments(made, "set", "model", base, tuple(prepare_values(tab, limit="5")))
    assert ticked(tab, tab._watch(jobs.start(second, settings)))[tab.chosen].rows == 4


def test_the_page_tries_a_typed_template_before_it_fills_it(
    tab: DataTab, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "WALL_SECONDS", 3)
    chosen = tab.take_upload([str(write_rows(tmp_path / "rows.jsonl", [alpaca(1)]))])[tab.chosen]
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}"
    how = (base, endless, "all_responses", 512)
    assert "does a loop never end" in tab.rows.show_row(chosen, 1, *how)[0]
    assert "does a loop never end" in tab.rows.show_lengths(chosen, *how)[0]


def test_settings_with_a_prepared_set_are_loaded_again(
    tab: DataTab, settings: Settings, tmp_path: Path, base: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(20)])
    chosen = tab.take_upload([str(path)])[tab.chosen]
    arguments = tab.prepare.arguments(chosen, "set", "model", base, tuple(prepare_values(tab)))
    prepared = ticked(tab, tab._watch(jobs.start(arguments, settings)))[tab.chosen]
    saved = json.loads(saved_settings.save(TrainConfig(**prepared.config_fields(), template="chatml")))
    (tmp_path / "saved.yaml").write_text(saved["text"])
    loaded = saved_settings.load(tmp_path / "saved.yaml", settings)
    assert loaded.chosen.path == prepared.path and loaded.config.template == "chatml"


def test_every_setting_of_a_preparation_is_in_the_panel_or_taken_from_beside_it(tab: DataTab) -> None:
    beside = {"columns", "skip_bad_rows", "base_model", "template", "tokenise"}
    assert set(tab.prepare.inputs) | beside == set(SPECS)
    changed = Preparation(normalise=False, near_duplicates=0.9, derive=("words", "language"), license="mit")
    assert command_options(changed) == [
        "--no-normalise",
        "--near-duplicates=0.9",
        "--derive=words,language",
        "--license=mit",
    ]


@pytest.mark.parametrize("choose", [lambda tab: tab.first_look("gone"), lambda tab: tab.take_example()])
def test_handlers_answer_only_for_their_outputs(tab: DataTab, choose: Callable[[DataTab], dict[Any, Any]]) -> None:
    assert seen(tab, choose(tab))[tab.chosen].is_example
    assert (Path(tab.settings.home) / LINEAGE).exists() is False
