"""The Compare tab as a person uses it: a study planned and started, watched, judged, repaired, deleted; and in a browser."""

import json
import re
import shlex
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from helpers import (
    CHATML,
    alpaca,
    held_by_another_process,
    model_folder,
    run_in,
    say,
    settings_in,
    step,
    tokenizer_folder,
    write_rows,
)
from study_builders import analysed, floor, ladder, study, study_run
from study_folders import lay_down
from test_browser import CHROMIUM, chromium  # noqa: F401 - a fixture
from test_ui import EVIL, built, loops_of_gradio, served  # noqa: F401 - a fixture
from test_ui_train import SHAPE, values_of

from qlora_core import architecture, cli, cli_compare, events, study_plan
from qlora_core.errors import ConfigError
from qlora_core.planner.studying import PlannedCell, StudyEstimate, estimate_study
from qlora_core.run_status import FINISHED, QUEUED
from qlora_core.runs import RunStore, queue_entries
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.study_grid import KINDS
from qlora_core.study_results import Analysis
from qlora_core.ui import study_asked, study_endpoints, study_found, study_view
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.compare_tab import CompareTab, study_named
from qlora_core.ui.train_tab import TrainTab

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
PAIR = [study_run(), study_run(method="qlora", loss=0.851, peak_gib=0.89, seconds=0.45)]
FLOORED = [*PAIR, *floor(PAIR[0])]
NOT_ANALYSED: dict[str, Any] = {"name": "two <b>arms</b>", "kind": "lora-vs-qlora"}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Of a lab whose only device is busy: what is queued stays there."""
    found = settings_in(tmp_path)
    found.locks.mkdir()
    with held_by_another_process(found.locks / "cpu.lock"):
        yield found


@pytest.fixture
def tab(settings: Settings) -> CompareTab:
    return built(lambda: CompareTab(settings, _train(settings)))


def _train(settings: Settings) -> TrainTab:
    return TrainTab(settings)


@pytest.fixture
def chosen(tmp_path: Path) -> Chosen:
    rows = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(40)])
    return Chosen(str(rows), rows=40)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base model as the page sees it: its tokenizer, and layers that need no worker to be known."""
    monkeypatch.setattr(architecture, "read", lambda *_: SHAPE)
    return str(tokenizer_folder(model_folder(tmp_path / "base"), chat_template=CHATML))


def typed(tab: CompareTab, base: str, *, choices: dict[str, Any] | None = None, **settings: Any) -> list[Any]:
    """What the form sends: the choices of a study, then the Train form."""
    plain = {
        "kind": "rank-ladder",
        "methods": ["lora", "qlora"],
        "ranks": "2, 4",
        "seeds": "",
        "floor": False,
        "vary": "",
        "name": "",
    }
    return [
        *(plain | (choices or {})).values(),
        *values_of(tab.form.train, base, device="cpu", max_steps="4", **settings),
    ]


def shown(tab: CompareTab, selected: str = "", cursor: str | None = None) -> Any:
    """What a tick sends; without a cursor what a page has when the study has come whole."""
    if cursor is not None:
        return tab.tick(selected, cursor, "step", study_found.AUTOMATIC)
    at_once = shown(tab, selected, "")
    if at_once == gr.skip() or not at_once[tab.page].visible:
        return at_once
    assert "Reading the runs" in at_once[tab.verdict], "where it stands comes first"
    rest = shown(tab, at_once.get(tab.selected, selected), at_once[tab.cursor])
    return at_once | rest


def titles(value: str) -> list[str]:
    return [card["title"] for card in json.loads(value)]


# Before it starts


def test_before_a_click_stands_what_it_will_make(tab, base, chosen):
    form = tab.form
    assert "Looking at the rows" in form.planned(chosen, *typed(tab, base))[0]
    form.train.look(chosen, base)
    pair, ladder_plan, other, skip = form.planned(chosen, *typed(tab, base))
    assert "4 runs: 2 arms, 1 seed, and 2 for the noise floor" in pair and "12 runs: 12 arms" in ladder_plan
    assert "4 runs: 4 arms, 1 seed." in other and "<li>QLoRA, rank 4, " in other
    assert all(
        "Every run fits" in told and "How long it takes is known once" in told for told in (pair, ladder_plan, other)
    )
    assert not skip.visible
    seeds = form.other_planned(chosen, *typed(tab, base, choices={"seeds": "1, 2", "floor": True}))[0]
    assert "12 runs: 4 arms, 2 seeds, and 4 for the noise floor" in seeds and "QLoRA, rank 4, seed 2" in seeds


def test_the_plan_is_the_study_of_the_same_command(tab, base, chosen, monkeypatch):
    made: list[Any] = []
    nothing = StudyEstimate((), 0, None)
    monkeypatch.setattr(cli_compare, "facts_for", lambda *_: SimpleNamespace(architecture=None))
    monkeypatch.setattr(study_plan, "estimate_study", lambda _, cells, __: made.extend(cells) or nothing)
    tab.form.train.look(chosen, base)
    asked = {
        "seeds": "1, 2",
        "vary": "learning_rate = 1e-4, 2e-4\ntarget_modules = q_proj+v_proj, all-linear",
        "name": "it's",
    }
    for choices in (
        {},
        asked,
        {"kind": "grid", "vary": "double quant = on, off"},
        {"kind": "lora-vs-qlora", "floor": False},
    ):
        values = typed(tab, base, choices=choices, quant_type="fp4")
        found = tab.form._plan(tab.form._asked(values), chosen, values[len(tab.form.choices) :], look=False)
        words = shlex.split(study_asked.command(found).replace("\\\n", " "))
        assert words[:4] == ["python", "-m", "qlora_core", "compare"]
        made.clear()
        assert cli.main([*words[3:], "--estimate"]) == 0
        assert [(c.label, c.seed, c.config.quant_type, c.config.max_steps) for c in made] == [
            (c.label, c.seed, c.config.quant_type, c.config.max_steps) for c in found.cells
        ]


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_made(tab, base, chosen, settings):
    tab.form.train.look(chosen, base)
    wrong = {"ranks": "2, x", "seeds": "b", "methods": [], "vary": "rnak = 2\nfoo\nmax_steps = 1, 2"}
    values = typed(tab, base, choices=wrong, rank=0)
    told = [
        "rank is 0", "Ranks: x is no whole", "Seeds: b is no whole", "Methods: none", "did you mean rank",
        "&#x27;foo&#x27; has no values", "max_steps cannot be varied",
    ]  # fmt: skip
    first, last = tab.form.begin_other(False, chosen, *values)
    assert "Checking the dataset" in first[0] and last[1] == gr.skip()
    for panel in (last[0], tab.form.planned(chosen, *values)[2]):
        assert all(text in panel for text in told), panel
    layers = typed(tab, base, choices={"vary": "target_modules = nowhere, all-linear"})
    assert "nowhere" in tab.form.planned(chosen, *layers)[2] and StudyStore(settings).list() == []
    assert "no dataset is chosen" in list(tab.form.begin_pair(False, Chosen(""), *typed(tab, base)))[-1][0]


def test_a_double_click_makes_one_study_of_the_form(tab, base, chosen, settings):
    def click(_: int) -> str:
        return list(tab.form.begin_pair(False, chosen, *typed(tab, base, learning_rate=3e-4)))[-1][1]

    with ThreadPoolExecutor(2) as two:
        first, again = two.map(click, range(2))
    assert first == again
    (found,) = StudyStore(settings).list()
    status = found.status()
    assert (status.state, status.total, status.kind) == (QUEUED, 4, "lora-vs-qlora")
    assert {run.config().learning_rate for run in found.runs()} == {3e-4} and len(RunStore(settings).list()) == 5


def test_a_study_whose_runs_are_being_made_is_no_crash_and_is_not_made_twice(tab, base, chosen, settings):
    values = typed(tab, base)
    first = list(tab.form.begin_pair(False, chosen, *values))[-1][1]
    for entry in queue_entries(settings):  # made, and about to be queued
        entry.unlink()
    found = StudyStore(settings).get(first)
    assert found.status().state == "crashed"
    plan = tab.form._plan(study_asked.Asked("lora-vs-qlora"), chosen, values[len(tab.form.choices) :], look=True)
    again = {"kind": plan.kind, "name": plan.name, "noise_floor": True, "only": plan.estimate.fitting}
    with held_by_another_process(found.path / "lock"):
        assert study_view.statuses(settings)[0].state == QUEUED
        assert StudyStore(settings).create(plan.config, plan.vary, **again).study_id == first
    assert study_view.statuses(settings)[0].state == "crashed"


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that the first arm of each study does not fit."""

    def estimated(facts: Any, made: Any, paces: Any) -> StudyEstimate:
        whole = estimate_study(facts, made, paces)
        too_large = SimpleNamespace(fits=False, estimate=SimpleNamespace(needed_bytes=2**40))
        return replace(whole, cells=(PlannedCell(made[0], too_large), *whole.cells[1:]))

    monkeypatch.setattr(study_plan, "estimate_study", estimated)


def test_what_does_not_fit_is_named_and_left_out_when_told_to(tab, base, chosen, settings, tight):
    tab.form.train.look(chosen, base)
    pair, *_, skip = tab.form.planned(chosen, *typed(tab, base))
    assert (
        "1 of 4 runs would not fit the" in pair
        and "may be used: LoRA.</p>" in pair
        and "<li>LoRA, 1024.00 GiB <b>" in pair
        and "<b>does not fit</b>" in pair
        and skip.visible
    )
    problems, study_id = list(tab.form.begin_pair(False, chosen, *typed(tab, base)))[-1]
    assert "needs 1024.00 GiB" in problems and "go on without" in problems and study_id == gr.skip()
    problems, study_id = list(tab.form.begin_pair(True, chosen, *typed(tab, base)))[-1]
    found = shown(tab, study_id)
    assert problems == "" and StudyStore(settings).get(study_id).status().total == 3
    assert 'LoRA, seed 42 <span class="lab-hint">left out' in found[tab.strip] and "left out" in found[tab.runs]


def test_where_nothing_fits_no_study_is_made(tab, base, chosen, settings):
    values = typed(tab, base, memory_budget_gib="0.01")
    assert "no run of the study fits" in list(tab.form.begin_ladder(True, chosen, *values))[-1][0]
    assert StudyStore(settings).list() == []


def test_each_kind_says_what_it_compares_and_shows_its_own_fields(tab):
    for kind in [*KINDS, "grid"]:
        described, methods, ranks, noise = tab.form.fields_of(kind)
        assert len(described.info) > 15
        assert (methods.visible, ranks.visible) == (
            kind in KINDS and "method" in KINDS[kind].vary,
            kind == "rank-ladder",
        )
        assert noise == (kind == "lora-vs-qlora")


# The study that is shown


def test_without_studies_the_page_says_how_to_make_one_and_before_it_is_attached_nothing_happens(tab):
    first = shown(tab)
    assert "No studies yet" in first[tab.table] and not first[tab.page].visible
    assert shown(tab, "", first[tab.cursor]) == gr.skip() and shown(tab, "?") == gr.skip()


def test_a_finished_study_shows_verdicts_figures_and_answers(tab, tmp_path):
    found = lay_down(tmp_path, study(FLOORED, analysis=analysed(FLOORED), **NOT_ANALYSED))
    now = shown(tab, found.study_id)
    assert "two &lt;b&gt;arms&lt;/b&gt;" in now[tab.head] and "All runs finished and analysed" in now[tab.head]
    assert "Does QLoRA pay here?" in now[tab.verdict] and "Sureness moderate" in now[tab.verdict]
    assert "H1" in now[tab.others] and "Its numbers" in now[tab.others]
    assert titles(now[tab.first]) == ["Peak memory, GPU", "Step time", "Evaluation loss"]
    assert titles(now[tab.curves]) == ["Training loss", "Evaluation loss while training"]
    assert "Cosine similarity" in titles(now[tab.weights]) and "Perplexity on held-out rows" in titles(
        now[tab.behaviour]
    )
    assert now[tab.answers].count("<section>") == 2 and "I was charged twice." in now[tab.answers]
    (speed,) = (card for card in json.loads(now[tab.more]) if card["title"] == "Speed")
    assert speed["entries"][0]["file"] == "two-b-arms-b-speed" and "QLoRA, rank 8" in speed["entries"][0]["csv"]
    buttons = [
        button.visible for button in (now[tab.stop], now[tab.resume], now[tab.report], now[tab.again], now[tab.delete])
    ]
    assert buttons == [False, False, True, True, True]


def test_figures_of_several_pairs_share_a_card(tab, tmp_path):
    runs = ladder(seeds=(42,), ranks=(2, 4))
    now = shown(tab, lay_down(tmp_path, study(runs, analysis=analysed(runs))).study_id)
    (cosine,) = (card for card in json.loads(now[tab.weights]) if card["title"] == "Cosine similarity")
    assert [entry["name"] for entry in cosine["entries"]] == ["LoRA – QLoRA, rank 2", "LoRA – QLoRA, rank 4"]


def test_a_tick_sends_what_changed_and_nothing_else(tab, tmp_path):
    found = lay_down(tmp_path, study([PAIR[0], study_run(method="qlora", state="running", steps=400)]))
    running = found.runs()[1]
    with held_by_another_process(running.path / "lock"):
        first = shown(tab, found.study_id)
        assert shown(tab, found.study_id, first[tab.cursor]) == gr.skip() and first[tab.stop].visible
        say(running, step(201))
        second = shown(tab, found.study_id, first[tab.cursor])
        assert second.keys() == {tab.cursor, tab.head, tab.runs}, "no figure and no button moves with a step"
        say(running, step(220))
        assert tab.curves in (third := shown(tab, found.study_id, second[tab.cursor])), "curves do, now and then"
        say(running, events.Evaluation(step=220, loss=0.9, tokens=40, seconds=1))
        fourth = shown(tab, found.study_id, third[tab.cursor])
        assert {tab.verdict, tab.first, tab.curves} <= fourth.keys() and tab.stop not in fourth


def test_what_is_analysed_again_is_shown_again(tab, tmp_path):
    found = lay_down(tmp_path, study(PAIR, analysis=analysed(PAIR)))
    first = shown(tab, found.study_id)
    other = Analysis(**(vars(analysed(PAIR)) | {"behaviour": None}))
    (found.analysis().path / "found.json").write_text(json.dumps(asdict(other)))
    say(found.analysis(), events.Launched(attempt=2), events.Finished(step=0))
    again = shown(tab, found.study_id, first[tab.cursor])
    assert first[tab.answers_part].visible and not again[tab.answers_part].visible and again[tab.behaviour] == ""


def test_an_answer_that_comes_late_is_mended_by_the_next_tick(tab, tmp_path):
    found = lay_down(tmp_path, study(PAIR))
    late = shown(tab, found.study_id, "")
    assert late[tab.first] == "" and "Reading the runs" in late[tab.verdict]
    mended = shown(tab, found.study_id, late[tab.cursor])
    assert titles(mended[tab.first]) and "Does QLoRA pay" in mended[tab.verdict]
    assert shown(tab, found.study_id, mended[tab.cursor]) == gr.skip()


def test_curves_go_along_the_axis_that_is_chosen_and_stay_there(tab, tmp_path):
    found = lay_down(tmp_path, study(PAIR))
    first = shown(tab, found.study_id)

    def axis(value: str) -> str:
        return json.loads(value)[0]["entries"][0]["figure"]["layout"]["xaxis"]["title"]["text"]

    assert axis(first[tab.curves]) == "step"
    along = tab.tick(found.study_id, first[tab.cursor], "token", "strong")
    assert axis(along[tab.curves]) == "tokens learnt from" and tab.first not in along
    assert tab.tick(found.study_id, along[tab.cursor], "token", "strong") == gr.skip()


@pytest.mark.parametrize(
    ("state", "word", "resumes", "why"),
    [
        ("failed", "failed", True, "Resume tries the failed runs again"),
        ("stopped", "stopped", True, "Resume goes on with what is missing"),
        ("running", "crashed", True, "newest saves"),
        ("gone", "incomplete", True, "makes the missing runs anew"),
    ],
)
def test_a_run_that_is_missing_is_a_named_gap_with_a_remedy(tab, tmp_path, state, word, resumes, why):
    missing = study_run(method="qlora", state=state, detail="out of memory at step 3")
    missing = replace(missing, config=missing.config)
    now = shown(tab, lay_down(tmp_path, study([PAIR[0], missing], analysis=analysed([PAIR[0]]))).study_id)
    assert word in now[tab.head] and why in now[tab.head] and word in now[tab.table]
    assert now[tab.resume].visible == resumes and now[tab.report].visible
    notes = [note["text"] for note in json.loads(now[tab.first])[0]["entries"][0]["figure"]["layout"]["annotations"]]
    assert any("QLoRA, rank 8 <i>– " in text for text in notes), "the gap stands in the figure"


def test_stop_resume_and_analyse_again_act_on_the_whole_study(tab, base, chosen, settings):
    study_id = list(tab.form.begin_pair(False, chosen, *typed(tab, base)))[-1][1]
    assert shown(tab, study_id)[tab.stop].visible
    found = StudyStore(settings).get(study_id)
    assert tab.acting(type(found).stop)(study_id) == "" and found.status().state == "stopped"
    assert "nothing of it waits or trains" in tab.acting(type(found).stop)(study_id)
    now = shown(tab, study_id)
    assert now[tab.resume].visible and not now[tab.report].visible and not now[tab.again].visible
    assert tab.acting(type(found).start)(study_id) == "" and found.status().state == QUEUED
    assert "is under way" in tab.acting(type(found).analyse_again)(study_id)
    assert "there is no study" in tab.acting(type(found).stop)("gone")


def test_a_study_is_deleted_with_or_without_its_runs(tab, tmp_path, settings):
    one = lay_down(tmp_path, study(FLOORED, analysis=analysed(FLOORED)))
    runs = [run.run_id for run in one.runs()]
    assert tab.forget(one.study_id)[:2] == ("", "") and {run.run_id for run in RunStore(settings).list()} == set(runs)
    for run in RunStore(settings).list():
        RunStore(settings).delete(run)
    other = lay_down(tmp_path, study(PAIR))
    assert tab.forget_with_runs(other.study_id)[:2] == ("", "")
    assert RunStore(settings).list() == [] and StudyStore(settings).list() == []
    assert "there is no study" in tab.forget("gone")[1]


def test_a_study_that_cannot_be_read_is_named_and_hides_no_other(tab, tmp_path, settings):
    found = lay_down(tmp_path, study(PAIR))
    (broken := StudyStore(settings).folder / "20261125-999999-dead-broken").mkdir()
    (broken / "study.json").write_text("{")
    now = shown(tab)
    assert "its study.json cannot be read" in now[tab.table] and found.study_id in now[tab.table]
    assert now[tab.selected] == found.study_id


def test_the_address_names_studies_that_there_are(settings, tmp_path):
    found = lay_down(tmp_path, study(PAIR))
    assert study_named(settings, found.study_id) and not study_named(settings, "gone") and not study_named(settings, "")


def test_the_report_is_a_zip_with_page_tables_and_bundle(tab, tmp_path, settings):
    found = lay_down(tmp_path, study(FLOORED, analysis=analysed(FLOORED)))
    waiting, linked = tab.write_report(found.study_id)
    assert "Writing" in waiting and "lab-fresh" in linked
    (path,) = settings.downloads.glob("*.zip")
    assert {"tickets/report.html", "tickets/runs.csv", "tickets/study.json"} <= set(zipfile.ZipFile(path).namelist())
    assert "No report" in list(tab.write_report("gone"))[-1]


# Runs picked by hand


def test_finished_runs_are_compared_or_refused_in_words(tab, tmp_path, settings):
    runs = [run.run_id for run in lay_down(tmp_path, study(PAIR)).runs()]
    stopped = say(other := run_in(tmp_path, name="other"), events.Stopped(step=0))
    assert stopped is None and {run_id for _, run_id in shown(tab)[tab.picked].choices} == set(runs)
    problems, study_id, _ = tab.compare_picked([*runs, other.run_id, "gone"])
    assert "there is no run" in problems and study_id == gr.skip()
    assert "is stopped; pick runs that have finished" in tab.compare_picked([*runs, other.run_id])[0]
    assert "pick at least two" in tab.compare_picked(None)[0] and len(StudyStore(settings).list()) == 1
    problems, study_id, left = tab.compare_picked(runs)
    now = shown(tab, study_id)
    assert problems == "" and left == [] and "picked runs" in now[tab.table]
    assert StudyStore(settings).get(study_id).status().state == QUEUED, "its analysis waits"


# The API


def test_what_a_client_asks_for_is_checked_whole():
    wanted, skip = study_endpoints.wanted_of({})
    assert wanted.kind == "lora-vs-qlora" and not skip
    wanted, skip = study_endpoints.wanted_of(
        {"vary": {"rank": [4, 8]}, "seeds": [1], "skip_unfitting": True, "noise_floor": False}
    )
    assert (wanted.kind, wanted.vary, wanted.noise_floor, skip) == ("", {"rank": [4, 8]}, False, True)
    wrong = {"kind": "x", "vary": {"rank": [4.5], "base_model": ["a"]}, "seeds": "1", "rnak": 1}
    with pytest.raises(ConfigError) as told:
        study_endpoints.wanted_of(wrong)
    assert [problem.partition(":")[2].split()[0] for problem in told.value.problems[:3]] == ["rnak", "kind", "vary:"]
    assert "seeds are '1'" in str(told.value) and "base_model cannot be varied" in str(told.value)


def test_results_for_a_client_hold_verdicts_and_what_was_measured(tmp_path):
    found = study_endpoints.results_of(lay_down(tmp_path, study(FLOORED, analysis=analysed(FLOORED))).results())
    assert found["verdicts"][0]["title"] == "Does QLoRA pay here?" and json.dumps(found)
    assert [run["eval_loss"] for run in found["runs"][:2]] == pytest.approx([0.814, 0.851])
    assert found["runs"][0]["state"] == FINISHED


# In a browser


@pytest.fixture
def page(chromium, settings, tmp_path):  # noqa: F811
    """A narrow page of an app with two finished studies, one with a failed run; it sees no error."""
    runs = ladder(seeds=(42,), ranks=(2, 4, 8))
    runs[0] = study_run(rank=2, state="failed", detail="out of memory")
    lay_down(tmp_path, study(runs, analysis=analysed(runs[1:]), name=EVIL))
    other = [replace(run, run_id=f"{run.run_id}-x") for run in PAIR]
    lay_down(tmp_path, study(other, study_id="20261125-051003-cd34-other", name="other"))
    with served(settings.home) as (url, _):
        context = chromium.new_context(viewport={"width": 390, "height": 800}, accept_downloads=True)
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}?study=20261125-041003-ab12-tickets")
        yield page
        context.close()
    assert errors == []


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing")
def test_a_study_is_read_in_a_narrow_window_saved_and_left_for_a_run(page, tmp_path):
    from playwright.sync_api import expect

    head = page.locator("#study-head")
    expect(head).to_contain_text("failed")
    expect(page.locator("#study-head img, #studies-table img, #study-verdict img")).to_have_count(0)
    memory = page.locator("#study-first .lab-figure").first
    memory.scroll_into_view_if_needed()
    expect(memory.locator(".bars path").first).to_be_visible()
    expect(memory).to_contain_text("failed")
    for kind, begins in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("CSV", b"row,")):
        with page.expect_download() as download:
            memory.get_by_role("button", name=f"as {kind}").click()
        download.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().lstrip(b"\xef\xbb\xbf").startswith(begins)
    page.locator("#study-weights-part > button").click()
    choice = page.get_by_label("Cosine similarity of")
    choice.scroll_into_view_if_needed()
    choice.select_option("LoRA – QLoRA, rank 4")
    expect(page.locator("#study-weights")).to_contain_text("LoRA – QLoRA, rank 4, learnt updates")
    page.locator("#study-curves-part > button").click()
    page.locator("#study-axis").get_by_text("token").click()
    expect(page.locator("#study-curves .xtitle").first).to_have_text("tokens learnt from")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#studies-table").get_by_role("button", name="other").click()
    expect(head).to_contain_text("other")
    expect(page).to_have_url(re.compile("study=20261125-051003-cd34-other"))
    page.locator("#study-strip button").filter(has_text="QLoRA").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#run-head h3")).to_contain_text("tickets: QLoRA, rank 8")
    assert "study=" not in page.url
