"""The Runs tab as a person uses it: the queue in order, what differs, more steps, adapters combined, what a run was."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from helpers import held_by_another_process, run_in, say, settings_in, started, step
from test_browser import CHROMIUM, chromium  # noqa: F401 - a fixture
from test_ui import EVIL, built, loops_of_gradio, served  # noqa: F401 - a fixture

from qlora_core import events, queue
from qlora_core.combining import METHODS
from qlora_core.run_status import FINISHED, QUEUED, STOPPED
from qlora_core.runs import Run, RunStore, queue_entries
from qlora_core.settings import Settings
from qlora_core.ui import publish_tab, run_view
from qlora_core.ui.comparing import differences_html
from qlora_core.ui.result_view import result_html
from qlora_core.ui.runs_tab import RunsTab
from qlora_core.ui.waiting import EARLIER, LATER, OUT, act_on, waiting_html

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
RESULT: dict[str, Any] = {
    "run_info": {
        "device": "CPU",
        "compute_dtype": "fp32",
        "config": {"optimizer": "adamw_8bit"},
        "path": {
            "layers": "transformers' layers: on a CPU",
            "packed": "padded: packing is off",
            "compiled": "eager: compile is off",
            "memory": "passes of up to 1,024 tokens, nothing is recomputed",
        },
        "base_model": {"weights_sha256": "a"},
        "packages": {"peft": "0.21.2"},
    },
    "train_info": {
        "steps": 6, "adapter_step": 6, "train_rows": 9, "eval_rows": 1, "peak_allocated_bytes": None,
        "peak_reserved_bytes": None, "peak_host_bytes": 2**30, "step_seconds_median": 0.5, "tokens_per_second": 200.0,
        "adapter_bytes": 1024, "trainable_parameters": 8192, "scores": [],
        "eval_losses": [{"step": 0, "loss": 3.0}, {"step": 3, "loss": 1.25}, {"step": 6, "loss": 2.0}],
    },
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Of a lab whose only device is busy: what is queued stays there."""
    found = settings_in(tmp_path)
    found.locks.mkdir()
    with held_by_another_process(found.locks / "cpu.lock"):
        yield found


@pytest.fixture
def tab(settings: Settings) -> RunsTab:
    return built(RunsTab, settings, gr.HTML())


def queued(folder: Path, *names: str) -> list[Run]:
    runs = [run_in(folder, name=name, seed=number) for number, name in enumerate(names)]
    for run in runs:
        queue.add(run)
    return runs


def finished(folder: Path, name: str, **changed: Any) -> Run:
    """A run as its worker leaves it, with an adapter that can be combined."""
    run = run_in(folder, name=name, **changed)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(name.encode())
    adapter = {"r": run.config().rank, "target_modules": ["q_proj"], "use_dora": False}
    (run.adapter / "adapter_config.json").write_text(json.dumps(adapter))
    (run.path / "result.json").write_text(json.dumps(RESULT))
    say(run, events.Launched(attempt=1), started(total_steps=6), step(6), events.Finished(step=6))
    return run


def order(settings: Settings) -> list[str]:
    return [entry.name.rpartition("-")[2] for entry in queue_entries(settings)]


# The queue


def test_waiting_runs_stand_in_the_order_in_which_they_start(tab, settings, tmp_path):
    runs = queued(tmp_path, "one", "two", "three")
    queue.move(runs[2], 1)
    shown = tab.tick("", {})[tab.waiting]
    assert [shown.index(f">{name}<") for name in ("three", "one", "two")] == sorted(
        shown.index(f">{name}<") for name in ("three", "one", "two")
    )
    assert 'aria-label="move one earlier"' in shown and 'aria-label="take two out of the queue"' in shown


def test_without_waiting_runs_there_is_no_list(tab, tmp_path):
    say(run_in(tmp_path), events.Stopped(step=0))
    assert tab.tick("", {})[tab.waiting] == ""


def test_the_first_goes_no_earlier_and_the_last_no_later(settings, tmp_path):
    runs = queued(tmp_path, "one", "two")
    shown = waiting_html(run_view.statuses(settings))
    disabled = [part for part in shown.split("<button")[1:] if 'aria-disabled="true"' in part]
    assert [runs[0].run_id in disabled[0], runs[1].run_id in disabled[1], len(disabled)] == [True, True, 2]
    assert act_on(runs[0].run_id, EARLIER, settings) == "" and act_on(runs[1].run_id, LATER, settings) == ""
    assert order(settings) == ["one", "two"]


def test_a_run_moves_by_one_place_and_out(settings, tmp_path):
    one, two, three = queued(tmp_path, "one", "two", "three")
    act_on(three.run_id, EARLIER, settings)
    assert order(settings) == ["one", "three", "two"]
    act_on(one.run_id, LATER, settings)
    assert order(settings) == ["three", "one", "two"]
    assert act_on(one.run_id, OUT, settings) == ""
    assert order(settings) == ["three", "two"] and one.status().state == STOPPED


def test_two_browsers_that_reorder_at_once_lose_no_run(settings, tmp_path):
    runs = queued(tmp_path, *"abcdef")

    def press(seed: int) -> list[str]:
        chance = random.Random(seed)
        return [act_on(chance.choice(runs).run_id, chance.choice((EARLIER, LATER)), settings) for _ in range(40)]

    with ThreadPoolExecutor(2) as browsers:
        assert {told for said in browsers.map(press, (1, 2)) for told in said} == {""}
    assert sorted(order(settings)) == list("abcdef")


def test_a_run_that_has_started_meanwhile_is_not_stopped_by_the_list(settings, tmp_path):
    (run,) = queued(tmp_path, "one")
    with held_by_another_process(run.path / "lock"):
        queue_entries(settings)[0].unlink()
        say(run, events.Launched(attempt=1))
        told = act_on(run.run_id, OUT, settings)
        assert "waits no longer, it is running" in told
        assert not (run.path / "stop").exists()
    assert "there is no run" in act_on("gone", EARLIER, settings)


def test_names_are_never_html_and_equal_ones_get_their_id(settings, tmp_path):
    twins = queued(tmp_path, EVIL, EVIL, "alone")
    found = run_view.statuses(settings)
    for shown in (waiting_html(found), run_view.table_html(found, "", settings)):
        assert "<img" not in shown
        assert [f'lab-id">{run.run_id.split("-")[2]}<' in shown for run in twins] == [True, True, False]


# What a run is and was


@pytest.mark.parametrize(
    ("changed", "chips"),
    [
        ({}, []),
        ({"use_dora": True, "use_rslora": True}, ["DoRA", "rsLoRA"]),
        ({"init_lora_weights": "pissa", "loraplus_lr_ratio": 16}, ["PiSSA", "LoRA+ 16"]),
    ],
)
def test_the_table_shows_the_variant(settings, tmp_path, changed, chips):
    run_in(tmp_path, **changed)
    shown = run_view.table_html(run_view.statuses(settings), "", settings)
    assert [part.partition("<")[0] for part in shown.split('lab-variant">')[1:]] == chips


def test_the_result_tells_path_optimizer_and_whose_step_the_adapter_is(tmp_path):
    run = finished(tmp_path, "best")
    shown = result_html(run, run.status())
    told = ("transformers&#x27; layers, padded, eager", "nothing is recomputed", "adamw_8bit", "8,192")
    assert all(text in shown for text in told) and "The adapter is" not in shown
    (run.path / "result.json").write_text(
        json.dumps(RESULT | {"train_info": RESULT["train_info"] | {"adapter_step": 3}})
    )
    assert "The adapter is that of step 3</b>, the lowest evaluation loss (1.2500)" in result_html(run, run.status())


def test_the_result_has_the_estimate_beside_the_measured_peak(tmp_path):
    run = finished(tmp_path, "estimated")
    assert "estimated before the run" in (shown := result_html(run, run.status())) and "2.00 GiB (+100%)" in shown
    say(run, events.Launched(attempt=2), started(estimated_peak_bytes=2**30), events.Finished(step=6))
    assert "1.00 GiB (+0%)" in result_html(run, run.status())


def test_without_a_checkpoint_a_failed_run_starts_again(tab, tmp_path):
    run = run_in(tmp_path)
    say(run, events.Launched(attempt=1), started(), events.Failed(step=0, reason="out of memory"))
    shown = tab.tick("", {})
    assert shown[tab.resume].value == "Start again" and shown[tab.resume].visible
    say(run, events.Launched(attempt=2), events.Checkpoint(step=2), events.Failed(step=2, reason="out of memory"))
    assert tab.tick(run.run_id, {})[tab.resume].value == "Resume"


# More steps


def test_a_finished_run_goes_on_for_as_many_steps_again(tab, tmp_path):
    run = finished(tmp_path, "done")
    assert tab.tick("", {})[tab.more].visible
    row, _, field = tab.ask_for_more(run.run_id)
    assert row.visible and field.value == 6
    problem, row = tab.continue_chosen(run.run_id, field.value)
    assert problem == "" and not row.visible
    assert run.config().max_steps == 12 and run.status().state == QUEUED
    assert not tab.tick(run.run_id, {})[tab.more].visible


@pytest.mark.parametrize("typed", [0, -3, None])
def test_no_steps_are_no_continuation_and_the_question_stays(tab, tmp_path, typed):
    run = finished(tmp_path, "done")
    problem, row = tab.continue_chosen(run.run_id, typed)
    assert "at least 1" in problem and row.visible and run.status().state == FINISHED


# Differences


def test_only_what_differs_is_shown_with_the_names_of_the_form(settings, tmp_path):
    one, two = finished(tmp_path, "one", rank=4), finished(tmp_path, "two", rank=8)
    shown = differences_html(one.run_id, two.run_id, settings)
    assert "<td>4</td><td>8</td>" in shown and "LoRA alpha" in shown
    assert "Learning rate" not in shown and "peft" not in shown
    same = finished(tmp_path, "same", rank=4, lora_alpha=8)
    assert "No setting differs" in differences_html(one.run_id, same.run_id, settings)
    assert differences_html(one.run_id, None, settings) == ""
    assert "there is no run" in differences_html(one.run_id, "gone", settings)


def test_of_a_run_without_a_result_the_page_says_what_is_not_compared(settings, tmp_path):
    one, two = finished(tmp_path, "one"), run_in(tmp_path, name="two")
    shown = differences_html(one.run_id, two.run_id, settings)
    assert "No setting differs" in shown and f"compared when {two.run_id.split('-')[2]} has a result" in shown


def test_the_list_of_other_runs_follows_what_is_shown(tab, tmp_path):
    one, two = finished(tmp_path, "one"), finished(tmp_path, "two", seed=2)
    shown = tab.tick(one.run_id, {})
    assert [run_id for _, run_id in shown[tab.other].choices] == [two.run_id]
    assert tab.other not in (again := tab.tick(one.run_id, shown[tab.cursor])) or again[tab.other] is gr.skip()
    assert [run_id for _, run_id in tab.tick(two.run_id, shown[tab.cursor])[tab.other].choices] == [one.run_id]


# Combining


def test_combining_is_offered_from_the_second_adapter_on(tab, tmp_path):
    one = finished(tmp_path, "one")
    shown = tab.tick("", {})
    assert not shown[tab.combine.accordion].visible
    two = finished(tmp_path, "two")
    run_in(tmp_path, name="no adapter")
    shown = tab.tick("", shown[tab.cursor])
    assert shown[tab.combine.accordion].visible
    assert {run_id for _, run_id in shown[tab.combine.runs].choices} == {one.run_id, two.run_id}


def test_a_combination_is_queued_and_shown(tab, settings, tmp_path):
    ids = [finished(tmp_path, name).run_id for name in ("one", "two")]
    problems, selected = tab.combine.combine(ids, "0.25, 0.75", "svd", "sum", "typed for another method", "")
    run = RunStore(settings).get(selected)
    assert problems == "" and run.status().state == QUEUED
    parts = run.combination()["parts"]
    assert [(part["run_id"], part["weight"]) for part in parts] == list(zip(ids, (0.25, 0.75), strict=True))
    _, equal = tab.combine.combine(ids, " ", "cat", "equal", "", "")
    assert [part["weight"] for part in RunStore(settings).get(equal).combination()["parts"]] == [0.5, 0.5]
    shown = tab.tick(selected, {})
    assert not shown[tab.charts_part].visible, "nothing is trained, so nothing is drawn"
    assert "0.25 × <b>one</b>" in shown[tab.head] and "combined</span>" in shown[tab.table]
    say(run, events.Launched(attempt=1), events.Finished(step=0, reason="combined from 2 adapters by svd"))
    queue_entries(settings)[0].unlink()
    assert not tab.tick(selected, {})[tab.more].visible


def test_all_that_is_wrong_with_a_combination_is_told_and_nothing_is_made(tab, settings, tmp_path):
    one, two = finished(tmp_path, "one"), finished(tmp_path, "two", rank=4)
    problems, selected = tab.combine.combine([one.run_id, "gone"], "a, b", "ties", "x", "half", "")
    assert all(text in problems for text in ("there is no run &#x27;gone&#x27;", "weights are", "density is"))
    assert selected == gr.skip()
    problems, _ = tab.combine.combine([one.run_id, two.run_id], "1", "linear", " ", "", "")
    assert all(text in problems for text in ("1 weights for 2 runs", "no name", "one rank"))
    assert "0 run to combine" in tab.combine.combine(None, "", "svd", "x", "", "")[0]
    assert len(RunStore(settings).list()) == 2


def test_each_method_says_what_it_does_and_shows_its_own_fields(tab):
    for method, kind in METHODS.items():
        told, rank, density = tab.combine.explain(method)
        assert f"<b>{method}</b>" in told and len(told) > 50
        assert (rank.visible, density.visible) == (kind.takes_rank, kind.takes_density)


# Publishing


@pytest.mark.parametrize("export", ["16bit", "nf4"])
def test_the_chosen_export_is_merged_and_only_16_bits_are_offered_as_a_base(settings, tmp_path, monkeypatch, export):
    run, asked = finished(tmp_path, "done"), []

    def merged(run: Run, **how: Any) -> Path:
        asked.append((how["onto"], how["export"]))
        folder = run.path / "merged-original"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
        return folder

    monkeypatch.setattr(publish_tab, "merge", merged)
    *_, last = built(publish_tab.PublishTab, settings).merged(run.run_id, "dequantized", export)
    assert asked == [("original", export)]
    assert ("run:" + run.run_id in last) == (export == "16bit") and "done-merged-original.zip" in last


# In a browser


@pytest.fixture
def page(chromium, settings, tmp_path):  # noqa: F811
    """A narrow page of an app in which three runs wait and two have an adapter; it sees no error."""
    queued(tmp_path, "one", "two", "three-" + "with-a-long-name-" * 3)
    finished(tmp_path, "left")
    finished(tmp_path, "right", use_dora=True, lora_alpha=3)
    (settings.home / "locks").mkdir()
    with held_by_another_process(settings.home / "locks" / "cpu.lock"), served(settings.home) as (url, _):
        context = chromium.new_context(viewport={"width": 390, "height": 800})
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page
        context.close()
    assert errors == []


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing")
def test_the_queue_at_the_keyboard_and_every_part_in_a_narrow_window(page):
    from playwright.sync_api import expect

    names = page.locator(".lab-waiting .name")
    expect(names).to_have_count(3)
    page.get_by_label("move two earlier").focus()
    page.keyboard.press("Enter")
    expect(names.first).to_have_text("two")
    expect(page.get_by_label("move two earlier")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(names.nth(1)).to_have_text("two")
    expect(page.get_by_label("move two later")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(names).to_have_count(2)
    page.locator("#runs-table").get_by_role("button", name="left").click()
    expect(page.locator("#run-head h3")).to_have_text("left")
    page.locator("#more").click()
    expect(page.locator("#more-steps input")).to_have_value("6")
    page.locator("#compare > button").click()
    page.locator("#compare-with input").click()
    page.get_by_role("option").filter(has_text="right").click()
    expect(page.locator("#differences")).to_contain_text("LoRA alpha")
    page.locator("#combine > button").click()
    page.locator("#combine-button").click()
    expect(page.locator("#combine-problems")).to_contain_text("0 run to combine")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#runs-table").get_by_role("button", name="right").click()
    expect(page.locator("#run-head h3")).to_have_text("right")
    expect(page.locator("#more-row")).to_be_hidden()
    expect(page.locator("#differences table")).to_have_count(0)
