"""A person at the page, in a real browser: from an upload to the downloaded adapter, with a reload on the way."""

import os
import re
import signal
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers import alpaca, run_in, say, settings_in, write_rows
from playwright.sync_api import Page, expect, sync_playwright
from test_ui import served

from qlora_core import events
from qlora_core.runs import RunStore

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SECOND = 1000
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing; `apt-get install chromium` brings it"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(url, folder) of a served app."""
    folder = tmp_path_factory.mktemp("lab")
    with served(folder / "home") as (url, _):
        yield url, folder


@pytest.fixture(scope="module")
def chromium():
    expect.set_options(timeout=60 * SECOND)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, lab):
    """A page whose every request must go to the app itself, and that must never ask or alert."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60 * SECOND)
    hosts, dialogs, errors = set(), [], []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    # Data that the page makes itself has no host.
    assert hosts - {""} == {urlsplit(lab[0]).netloc}
    assert (dialogs, errors) == ([], [])


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).first.click()


def upload(page: Page, path: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(path)


def fill(page: Page, field: str, value: str) -> None:
    page.locator(f"#field-{field} input").first.fill(value)
    page.locator(f"#field-{field} input").first.blur()


def choose_tiny_model(page: Page) -> None:
    from tiny_models import model_folder

    fill(page, "base_model", str(model_folder()))
    page.keyboard.press("Enter")


def use_tiny_model(page: Page) -> None:
    """Back on the Data tab, with a model whose tokenizer is there."""
    expect(page.locator("#report")).to_contain_text("usable rows")
    tab(page, "Train")
    choose_tiny_model(page)
    tab(page, "Data")


# Points of the training curve that the browser has drawn.
POINTS = "document.querySelector('#chart-loss .lab-plot')?._fullData?.[0]?._length ?? 0"


def wait_for_points(page: Page, least: int) -> None:
    page.wait_for_function(f"least => ({POINTS}) >= least", arg=least)


RANGE = "document.querySelector('#chart-loss .lab-plot').layout.xaxis.range"


def zoom_in(page: Page) -> list[float]:
    """Drag over a part of the loss chart; returns the range of steps that is then in sight."""
    before = page.evaluate(RANGE)
    box = page.locator("#chart-loss .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 100, steps=5)
    page.mouse.up()
    page.wait_for_function(f"before => {RANGE}[1] !== before", arg=before[1])
    return page.evaluate(RANGE)


def test_upload_start_watch_reload_finish_download(page, chromium, lab):
    url, folder = lab
    rows = write_rows(folder / "questions.jsonl", [alpaca(number) for number in range(24)])
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("nothing is running")
    expect(page.locator("#report")).to_contain_text("support_tickets.jsonl")
    upload(page, rows)
    expect(page.locator("#report")).to_contain_text("questions.jsonl")
    page.locator("#use-dataset").click()
    expect(page.locator("#train-dataset")).to_contain_text("questions.jsonl")
    choose_tiny_model(page)
    page.locator("#field-method input[value=lora]").check()
    fill(page, "max_steps", "300")
    fill(page, "name", "by hand")
    expect(page.locator("#command textarea")).to_have_value(re.compile(r"--max-steps 300"))
    page.locator("#start").dblclick()

    head = page.locator("#run-head")
    expect(head).to_contain_text("by hand")
    expect(page.locator("#run-head [data-state=running]")).to_be_visible(timeout=60 * SECOND)
    assert len(RunStore(settings_in(folder)).list()) == 1, "a double click starts one run"
    wait_for_points(page, 2)
    zoom = zoom_in(page)
    seen = page.evaluate(POINTS)
    wait_for_points(page, seen + 2)
    assert page.evaluate(RANGE) == zoom, "a redraw keeps the zoom"
    assert "run=" in page.url

    # The worker stands still meanwhile, or a fast machine would be done before the second browser looks.
    worker = int((RunStore(settings_in(folder)).list()[0].path / "lock").read_text())
    os.kill(worker, signal.SIGSTOP)
    page.reload()
    expect(page.locator("#run-head [data-state=running]")).to_be_visible()
    expect(head).to_contain_text("by hand")
    expect(page.locator("#status")).to_contain_text("by hand")
    seen = page.evaluate(POINTS)
    tab(page, "Data")
    expect(page.locator("#report")).to_contain_text("questions.jsonl")
    tab(page, "Runs")
    another = chromium.new_page()
    another.goto(url)
    expect(another.locator("#run-head [data-state=running]")).to_be_visible(timeout=60 * SECOND)
    expect(another.locator("#run-head")).to_contain_text("by hand")
    another.close()
    os.kill(worker, signal.SIGCONT)
    wait_for_points(page, seen + 2)
    expect(page.locator("#run-head [data-state=finished]")).to_be_visible(timeout=300 * SECOND)
    expect(page.locator("#run-result")).to_contain_text("peak memory, host")
    expect(page.locator("#status")).to_contain_text("nothing is running")

    with page.expect_download() as download:
        page.locator("#run-download").click()
    path = folder / "adapter.zip"
    download.value.save_as(path)
    names = zipfile.ZipFile(path).namelist()
    assert "by-hand/adapter_model.safetensors" in names and not any("checkpoint" in name for name in names)


def test_the_address_names_the_run_that_is_shown(page, lab):
    url, folder = lab
    say(older := run_in(folder, name="older"), events.Stopped(step=0))
    say(run_in(folder, name="newer"), events.Stopped(step=0))
    page.goto(f"{url}?run={older.run_id}")
    expect(page.locator("#run-head h3")).to_have_text("older")
    page.locator("#runs-table").get_by_role("button", name="newer").click()
    expect(page.locator("#run-head h3")).to_have_text("newer")
    page.reload()
    expect(page.locator("#run-head h3")).to_have_text("newer")


def test_a_wrong_file_is_told_and_nothing_of_it_runs(page, lab):
    url, folder = lab
    evil = '<img src=x onerror="alert(1)">'
    rows = write_rows(
        folder / "evil.jsonl", [alpaca(1, instruction=evil, output=evil), alpaca(2), {"instruction": evil}]
    )
    page.goto(url)
    tab(page, "Data")
    expect(page.locator("#report")).to_contain_text("usable rows")
    upload(page, rows)
    expect(page.locator("#problems")).to_contain_text("no response")
    expect(page.locator("#use-dataset")).to_be_disabled()
    page.get_by_label("Leave the listed rows out").check()
    expect(page.locator("#use-dataset")).to_be_enabled()
    assert page.locator("#report img, #problems img, #tokens img").count() == 0


def test_problems_stand_beside_start_until_they_are_mended(page, lab):
    page.goto(lab[0])
    tab(page, "Train")
    expect(page.locator("#train-dataset")).to_contain_text("support_tickets.jsonl")
    fill(page, "rank", "0")
    expect(page.locator("#train-problems")).to_contain_text("rank is 0")
    fill(page, "rank", "8")
    expect(page.locator("#train-problems")).not_to_contain_text("rank")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_needs_no_sideways_scrolling(chromium, lab, scheme):
    context = chromium.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(lab[0])
    for name in ("Data", "Train", "Runs", "Compare", "Publish"):
        tab(page, name)
        expect(page.get_by_role("tab", name=name, exact=True).first).to_have_attribute("aria-selected", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    context.close()


def test_a_table_is_read_prepared_and_chosen_for_training_with_a_reload_on_the_way(page, lab):
    url, folder = lab
    rows = "".join(f'"What is {n}?","Mail a{n}@example.com.",{"ab"[n % 2]}\n' for n in range(40))
    (folder / "table.csv").write_text("question,answer,source\n" + rows)
    page.goto(url)
    use_tiny_model(page)
    upload(page, folder / "table.csv")
    expect(page.locator("#problems")).to_contain_text("in no form that is known")
    expect(page.locator("#use-dataset")).to_be_disabled()
    page.locator("#read-columns").click()
    expect(page.locator("#report")).to_contain_text("columns chosen by hand")
    expect(page.locator("#tokens .lab-tokens")).to_contain_text("example.com")
    page.reload()
    use_tiny_model(page)
    expect(page.locator("#report")).to_contain_text("columns chosen by hand")

    page.locator("#find-row input, #find-row textarea").first.fill("what is 33")
    page.keyboard.press("Enter")
    expect(page.locator("#row-place")).to_contain_text("Row 34 of 40")
    page.locator("#template").get_by_text("Zephyr").click()
    expect(page.locator("#tokens .lab-tokens")).to_contain_text("<|assistant|>")

    page.locator("#prepare > button").click()
    page.locator("#prepare-personal-data input[value=mask]").check()
    page.locator("#prepare-start").dblclick()
    expect(page.locator("#prepare-result")).to_contain_text("personal data")
    expect(page.locator("#report")).to_contain_text("table-prepared")
    expect(page.locator("#tokens .lab-tokens")).to_contain_text("[EMAIL]")
    with page.expect_download() as download:
        page.locator("#prepare-result a.lab-link").click()
    download.value.save_as(folder / "set.zip")
    assert "table-prepared/data/train.parquet" in zipfile.ZipFile(folder / "set.zip").namelist()
    page.locator("#use-dataset").click()
    expect(page.locator("#train-dataset")).to_contain_text("table-prepared · 36 rows, evaluated on eval.jsonl")
    expect(page.locator("#command textarea")).to_have_value(re.compile("--template zephyr"))
