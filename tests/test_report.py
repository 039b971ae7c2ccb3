"""A report works without a network, runs nothing that a name or an answer holds, and brings what makes the study again."""

import base64
import csv
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study_builders import analysed, floor, ladder, study, study_run

from qlora_core import cli
from qlora_core.config import TrainConfig
from qlora_core.report import report_html, write_report
from qlora_core.report.bundle import bundle, command, study_yaml
from qlora_core.report.tables import tables, to_csv
from qlora_core.study_results import Analysis, StudyResults
from qlora_core.verdicts import verdicts

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "</script><img src=x onerror=alert(1)>'\"&<script>alert(2)</script>"


def whole() -> StudyResults:
    runs = ladder(ranks=(4, 8), seeds=(42,))
    runs += floor(runs[0])
    runs.append(study_run(rank=16, state="failed", detail="out of memory while training at step 3"))
    return study(runs, analysis=analysed(runs), analysis_state="finished")


def hostile() -> StudyResults:
    """Names, settings, reasons and answers that hold markup and formulas."""
    runs = [study_run(varied={"template": HOSTILE}), study_run(method="qlora", varied={"template": "=1+1"})]
    runs.append(study_run(rank=4, varied={"template": "x"}, state="failed", detail=HOSTILE))
    found = analysed(ladder(ranks=(8,), seeds=(42,)))
    told = found.behaviour | {
        "rows": [{"line": 3, "prompt": HOSTILE, "reference": "=cmd()", "answers": {HOSTILE: HOSTILE}}]
    }
    return study(runs, name=HOSTILE, differences=(HOSTILE,), analysis=replace(found, behaviour=told))


class Seen(HTMLParser):
    """Tags and what they would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action") and value]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_report(whole(), tmp_path_factory.mktemp("report")).parent


# -- the page


def test_the_page_loads_nothing_and_its_policy_forbids_it(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    seen = Seen(page)
    assert all(link.startswith(("#", "data:text/csv")) for link in seen.loads) and seen.tags.count("script") == 3
    assert not {"img", "link", "iframe", "object", "form"} & set(seen.tags)
    assert "default-src 'none'" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert page.count("plotly.js v") == 1


def test_the_page_says_verdicts_figures_gaps_and_how_to_make_it_again(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    for verdict in verdicts(whole()):
        assert verdict.title in page and verdict.sureness in page
    figures = json.loads(re.search(r'id="study-figures">(.*?)</script>', page, re.S)[1])
    titles = [figure["figure"]["layout"]["title"]["text"] for figure in figures]
    assert {"Peak memory, GPU", "Step time", "Evaluation loss by rank", "Training loss", "Cosine similarity"} <= set(
        titles
    )
    assert "failed: out of memory while training at step 3" in page
    assert "9264ed59cd89807a" * 4 in page and "NVIDIA H100 80GB HBM3" in page
    assert "python -m qlora_core compare --config study.yaml" in page


def test_curves_can_be_had_along_each_axis_and_smoothed():
    figures = json.loads(re.search(r'id="study-figures">(.*?)</script>', report_html(whole()), re.S)[1])
    curve = next(figure for figure in figures if figure["figure"]["layout"]["title"]["text"] == "Training loss")
    assert list(curve["axis"]) == ["step", "token", "epoch", "time"] and list(curve["smoothing"]) == [
        "none",
        "some",
        "strong",
    ]
    run = whole().runs[0]
    assert curve["axis"]["token"]["update"]["x"][0][-1] == sum(step.tokens for step in run.steps)
    assert curve["smoothing"]["none"]["update"]["y"][0] == [step.loss for step in run.steps]


def test_a_hostile_name_or_answer_is_text_and_no_markup(tmp_path):
    page = write_report(hostile(), tmp_path).read_text(encoding="utf-8")
    seen = Seen(page)
    assert "img" not in seen.tags and seen.tags.count("script") == 3
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    for table in tmp_path.glob("*.csv"):
        cells = [cell for row in rows_of(table) for cell in row.values()]
        assert not [cell for cell in cells if cell.startswith(("=", "@"))], table.name
    assert rows_of(tmp_path / "answers.csv")[0]["answer"] == HOSTILE


def test_a_page_before_anything_was_measured_says_so(tmp_path):
    results = study([study_run(state="queued"), study_run(method="qlora", state="queued")])
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert "Nothing has finished yet." in page and not (tmp_path / "steps.csv").exists()


def test_a_study_whose_runs_are_all_gone_still_has_a_page(tmp_path):
    gone = replace(study_run(state="gone"), config=None, started=None)
    page = write_report(study([gone, replace(gone, run_id="b")]), tmp_path).read_text(encoding="utf-8")
    assert "its settings with it" in page and not (tmp_path / "study.yaml").exists()


# -- tables


def test_tables_hold_what_was_measured(written):
    runs = {row["run_id"]: row for row in rows_of(written / "runs.csv")}
    for run in whole().runs:
        row = runs[run.run_id]
        assert (row["label"], row["state"], row["role"]) == (run.label, run.state, run.role)
        assert row["eval_loss"] == ("" if run.eval_loss is None else str(run.eval_loss))
        assert row["peak_bytes"] == ("" if run.peak_bytes is None else str(run.peak_bytes))
    steps = [row for row in rows_of(written / "steps.csv") if row["run_id"] == whole().runs[0].run_id]
    assert [float(row["loss"]) for row in steps] == [step.loss for step in whole().runs[0].steps]
    similar = rows_of(written / "similarity.csv")
    analysis = whole().analysis
    assert len(similar) == sum(1 + len(one["modules"]) for one in analysis.similarity)
    overall = [float(row["cosine"]) for row in similar if row["module"] == "all"]
    assert overall == [one["overall"]["cosine"] for one in analysis.similarity]
    assert len(rows_of(written / "quantisation.csv")) == len(analysis.quantisation)
    assert rows_of(written / "behaviour.csv")[0]["token_match_95_low"] == "0.78"
    assert {row["part"] for row in rows_of(written / "memory_estimates.csv")} >= {"weights", "logits"}


def test_a_table_on_the_page_is_the_table_beside_it(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    links = re.findall(r'download="([a-z_]+\.csv)" href="data:text/csv;base64,([^"]+)"', page)
    assert {name for name, _ in links} == {path.name for path in written.glob("*.csv")}
    for name, data in links:
        assert base64.b64decode(data) == (written / name).read_bytes()


def test_without_rows_no_prompt_and_no_answer_is_passed_on(tmp_path):
    write_report(whole(), tmp_path)
    write_report(whole(), tmp_path, rows=False)
    assert not (tmp_path / "answers.csv").exists() and (tmp_path / "behaviour.csv").exists()
    for path in tmp_path.iterdir():
        assert "I was charged twice" not in path.read_text(encoding="utf-8"), path.name


def test_a_number_is_no_formula_and_a_text_that_looks_like_one_is_marked():
    assert to_csv((["a", "b"], [[-1.5, "-1+1"], [None, "plain"]])) == "a,b\r\n-1.5,'-1+1\r\n,plain\r\n"


def test_tables_without_a_row_are_not_written():
    assert "steps" not in tables(study([study_run(state="queued"), study_run(method="qlora", state="queued")]))


# -- the bundle, and the command that makes it again


def test_the_bundle_holds_configs_environment_fingerprints_and_verdicts(written):
    found = json.loads((written / "study.json").read_text(encoding="utf-8"))
    assert [run["config"]["rank"] for run in found["runs"] if run["config"]] == [
        run.config.rank for run in whole().runs
    ]
    assert found["datasets"][0]["train_fingerprint"] == "3823ea6d6fe427b8" * 4 and len(found["datasets"]) == 1
    assert found["bases"][0]["weights_sha256"] == "9264ed59cd89807a" * 4
    assert found["environments"][0]["packages"]["torch"] == "2.13.0" and len(found["environments"]) == 1
    assert [verdict["title"] for verdict in found["verdicts"]] == [verdict.title for verdict in verdicts(whole())]
    assert found["runs"][-1]["state"] == "failed" and "measured" not in found["runs"][-1]


def test_the_command_is_one_that_the_command_line_takes():
    results = whole()
    told = shlex.split(command(results))
    assert told[:3] == ["python", "-m", "qlora_core"]
    options = cli.parser().parse_args(told[3:])
    assert (
        options.vary == ["method=lora,qlora", "rank=4,8,16"]
        and options.noise_floor
        and options.config.name == "study.yaml"
    )
    listed = study(
        [study_run(varied={"quantize_modules": value, "use_dora": False}) for value in (["q_proj", "v_proj"], [])],
        seeds=(1, 2), kind="quantised-matrices",
    )  # fmt: skip
    options = cli.parser().parse_args(shlex.split(command(listed))[3:])
    assert options.vary == ["quantize_modules=q_proj+v_proj,none", "use_dora=off"]
    assert (options.seeds, options.kind, options.noise_floor) == ("1,2", "quantised-matrices", None)


def test_the_yaml_is_read_back_as_the_common_settings(written):
    config = TrainConfig.from_yaml(written / "study.yaml")
    assert (config.name, config.max_steps, config.seed, config.dataset_license) == ("tickets", 20, 42, "apache-2.0")


def test_local_data_are_named_so_that_the_command_works_and_no_home_is_told(tmp_path):
    data = tmp_path / "rows" / "mine.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    near, far = tmp_path / "reports" / "one", Path("/srv/elsewhere")
    runs = [replace(run, config=replace(run.config, data=str(data))) for run in ladder(ranks=(4,), seeds=(1,))]
    assert study_yaml(study(runs), folder=near).splitlines()[1] == "data: ../../rows/mine.jsonl"
    assert study_yaml(study(runs), folder=far).splitlines()[1] == "data: mine.jsonl"
    assert str(tmp_path) not in json.dumps(bundle(study(runs), folder=far))
    assert str(tmp_path) not in report_html(study(runs), folder=far)
    hub = [replace(run, config=replace(run.config, data="hub:openai/gsm8k:main:train@abc")) for run in runs]
    assert "data: hub:openai/gsm8k:main:train@abc" in study_yaml(study(hub))


def test_runs_picked_by_hand_bring_the_settings_of_each(tmp_path):
    results = study(ladder(ranks=(4,), seeds=(1,)), kind="picked")
    write_report(results, tmp_path)
    for run in results.runs:
        assert TrainConfig.from_yaml(tmp_path / "configs" / f"{run.run_id}.yaml").method == run.config.method
    assert "train --config configs/RUN.yaml" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "varied",
    [
        [{}, {}],
        [{"learning_rate": 1e-4}, {"learning_rate": 2e-4}],
        [{"use_dora": False}, {"use_dora": True}],
        [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}],
        [{"int8_modules": []}, {"int8_modules": ["attention"]}, {"int8_modules": "mlp"}],
    ],
)
def test_a_report_of_whatever_was_varied(varied, tmp_path):
    runs = [study_run(varied=one, seed=seed) for one in varied for seed in (1, 2)]
    if not varied[0]:
        runs = [study_run(varied={}, seed=seed) for seed in (1, 2, 3)]
    results = study(runs, analysis=Analysis(updates={}, behaviour=None))
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert (runs[0].label or "as set") in page and len(rows_of(tmp_path / "runs.csv")) == len(runs)
    if varied[0]:
        assert cli.parser().parse_args(shlex.split(command(results))[3:]).vary


def test_an_analysis_that_found_nothing_is_no_error():
    page = report_html(study(ladder(ranks=(4,), seeds=(1,)), analysis=Analysis(updates={})))
    assert 'href="#loss"' in page and 'href="#weights"' not in page


# -- in a browser

browser = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing; `apt-get install chromium` brings it"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.mark.parametrize(
    ("made", "width", "scheme"),
    [pytest.param(whole, 1280, "light", marks=browser), pytest.param(hostile, 390, "dark", marks=browser)],
)
def test_a_browser_without_a_network_draws_and_saves_every_figure(made, width, scheme, chromium, tmp_path):
    path = write_report(made(), tmp_path)
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    page.evaluate("document.querySelectorAll('.figure').forEach(draw)")
    cards = page.locator(".figure").count()
    page.wait_for_function("(n) => document.querySelectorAll('.main-svg').length >= n", arg=cards)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for kind, beginning in (("png", b"\x89PNG"), ("svg", b"<svg"), ("csv", b"row,series")):
        with page.expect_download() as saved:
            page.locator(f"[data-save={kind}]").first.click()
        assert saved.value.path().read_bytes().startswith(beginning) and saved.value.suggested_filename.endswith(
            f".{kind}"
        )
    curve = page.locator(".figure", has=page.locator("select[name=smoothing]")).first
    curve.locator("select[name=axis]").select_option("token")
    assert "tokens learnt from" in curve.inner_text()
    ink = page.evaluate("getComputedStyle(document.querySelector('.js-plotly-plot text')).fill")
    assert ink == {"light": "rgb(30, 41, 59)", "dark": "rgb(226, 232, 240)"}[scheme]
    context.close()
    assert wrong == [] and not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
