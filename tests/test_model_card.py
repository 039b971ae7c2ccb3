"""Cards of models: what the Hub reads, code that runs, pictures, figures as measured; and nothing breaks out of them."""

import ast
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import FUZZED, settings_in, write_rows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file
from study_builders import ladder, study, study_run
from tiny_models import dataset, make_run, train_here

from qlora_core.config import TrainConfig, replace
from qlora_core.data.preparation import Preparation
from qlora_core.data.preparing import prepare
from qlora_core.errors import RunError
from qlora_core.model_card import CardText, licence_warning, model_card, validate
from qlora_core.model_card.licences import HUB_LICENCES, hub_licence, licence_fields, of_model
from qlora_core.model_card.markdown import code, front_matter, literal, prose, yaml_of
from qlora_core.runs import Run
from qlora_core.worker.merging import merge_onto

PARSER = MarkdownIt("commonmark").enable("table")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny QLoRA run on the second version of a prepared set, in whose name there is a little of everything."""
    folder = tmp_path_factory.mktemp("run")
    for count in (10, 12):
        rows = write_rows(folder / "rows | of `mine`.jsonl", dataset(count))
        how = Preparation(eval_fraction=0.25, shuffle=False, duplicates="keep", license="cc-by-4.0")
        prepared = prepare([str(rows)], folder / "set", how, settings_in(folder))
    assert prepared.lineage["version"] == 2
    return train_here(
        make_run(
            folder, data=str(prepared.folder), eval_data=None, method="qlora", max_steps=3, eval_steps=3, score="exact",
            score_rows=2, score_max_new_tokens=4,
        )
    )  # fmt: skip


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """The same run, to be changed."""
    shutil.copytree(run.path, tmp_path / "home" / "runs" / run.run_id)
    return Run(tmp_path / "home" / "runs" / run.run_id, settings_in(tmp_path))


def change(run: Run, file: str, /, *path: str, **values: Any) -> None:
    """Set values in one of the run's JSON files, below `path`."""
    told = json.loads((run.path / file).read_text())
    place = told
    for part in path:
        place = place[part]
    place.update(values)
    (run.path / file).write_text(json.dumps(told))


def card_of(run: Run, **changed: Any) -> str:
    return model_card(run, **({"what": "adapter", "repo_id": "alice/tiny", "version": "v2"} | changed)).text


def front_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def body_of(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def fence(text: str, language: str) -> str:
    found = [token for token in PARSER.parse(body_of(text)) if token.type == "fence" and token.info == language]
    assert len(found) == 1
    return found[0].content


def on_hub(run: Run, name: str = "alice/base") -> None:
    """As if the base had come from the Hub."""
    for path in (("model.json",), ("result.json", "run_info", "base_model")):
        change(run, *path, name=name, origin="Hugging Face Hub", revision="0123456789abcdef0123456789abcdef01234567")


# -- what it says


def test_the_hub_reads_the_front_matter(copy: Run) -> None:
    on_hub(copy)
    text = card_of(copy)
    front, after = front_of(text), copy.result()["train_info"]["eval_losses"][-1]["loss"]
    assert validate(text) == []
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "alice/base",
        "adapter",
        "peft",
    )
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "text-generation" and "qlora" in front["tags"]
    metrics = {one["type"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["loss"] == pytest.approx(after, abs=1e-6) and set(metrics) == {"loss", "perplexity", "exact_match"}
    merged = front_of(card_of(copy, what="merged"))
    assert (merged["base_model_relation"], merged["library_name"]) == ("finetune", "transformers")


def test_a_base_of_this_machine_is_said_in_words_without_its_path(run: Run) -> None:
    text = card_of(run)
    assert "base_model" not in front_of(text) and validate(text) == []
    summary = text.split("\n## ")[0]
    assert "a local folder on the publisher's machine" in summary
    assert run.result()["run_info"]["base_model"]["weights_sha256"] in summary
    for card in (text, card_of(run, what="merged")):
        assert str(run.settings.home) not in card and str(run.base_model().folder.parent) not in card


def test_a_merged_run_as_base_names_what_it_was_made_from(copy: Run) -> None:
    root = copy.path.parent / "root"
    (root / "merged-original").mkdir(parents=True)
    (root / "model.json").write_text(
        json.dumps({"name": "alice/root", "folder": "/x", "revision": None, "origin": "Hugging Face Hub"})
    )
    change(
        copy, "model.json", name="first onto original", origin="merged run root", folder=str(root / "merged-original")
    )
    text = card_of(copy)
    assert "base_model" not in front_of(text)
    assert "`first onto original`, a merged run on the publisher's machine" in text and "made from `alice/root`" in text


def test_the_bundled_base_is_said_to_have_been_4_bit(copy: Run) -> None:
    change(copy, "model.json", name="HuggingFaceTB/SmolLM2-135M-Instruct", origin="bundled (4-bit GGUF, converted)")
    text = card_of(copy)
    assert front_of(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "`HuggingFaceTB/SmolLM2-135M-Instruct`: `apache-2.0`" in section(text, "Licence")
    assert "Its base weights were 4-bit once" in text and yaml.safe_load(fence(text, "yaml"))["base_model"] == "bundled"


def test_figures_are_those_that_were_measured(run: Run) -> None:
    text, found = card_of(run), run.result()["train_info"]
    losses = {one["step"]: one["loss"] for one in found["eval_losses"]}
    assert f"{losses[0]:.4f} | {losses[3]:.4f} |" in section(text, "Evaluation")
    assert f"{found['scores'][0]['correct']} of 2" in section(text, "Evaluation")
    cost = section(text, "Memory and speed")
    assert f"{found['peak_host_bytes'] / 1024**3:.2f} GiB" in cost and "(an estimate)" in cost and "GPU" not in cost
    environment = section(text, "Environment")
    info = run.result()["run_info"]
    assert all(info[name] in environment for name in ("device", "python")) and info["packages"]["peft"] in environment
    assert info["git_commit"] is None or info["git_commit"] in environment


def test_memory_of_a_gpu_is_named_as_such(copy: Run) -> None:
    gpu = {
        "peak_allocated_bytes": 3 * 1024**3,
        "peak_reserved_bytes": 4 * 1024**3,
        "load_peak_allocated_bytes": 1024**3,
    }
    change(copy, "result.json", "train_info", **gpu)
    change(copy, "result.json", "run_info", device="NVIDIA H100 80GB HBM3", driver=["580.1", "13.0"])
    text = card_of(copy)
    assert "| peak GPU memory allocated, training | 3.00 GiB |" in text and "estimated before the run, GPU" in text
    assert "`NVIDIA H100 80GB HBM3`" in section(text, "Memory and speed") and "| `580.1`, `13.0` |" in text


def test_a_run_that_was_stopped_says_so(copy: Run) -> None:
    change(copy, "result.json", "meta_info", ended="stopped")
    change(copy, "result.json", "train_info", steps=2)
    assert "stopped by a person after 2 of 3 steps" in card_of(copy)


def test_rows_are_named_by_fingerprint_source_and_what_changed_since_the_last_version(run: Run) -> None:
    data, stored = section(card_of(run), "Data"), run.dataset()
    assert stored.train_fingerprint in data and stored.eval_fingerprint in data
    assert "2 rows added, 0 removed, against version `1`" in data
    assert "`rows ¦ of 'mine'.jsonl`" in data and stored.origin["fingerprint"] in data


def test_rows_of_the_hub_are_its_dataset(copy: Run) -> None:
    source = "hub:openai/gsm8k:main:train@0123456789abcdef0123456789abcdef01234567"
    change(copy, "dataset/dataset.json", origin={"source": source, "license": "mit", "rows": 9})
    text = card_of(copy)
    front = front_of(text)
    assert front["datasets"] == ["openai/gsm8k"] and validate(text) == []
    told = front["model-index"][0]["results"][0]["dataset"]
    assert (told["type"], told["config"], told["revision"]) == ("openai/gsm8k", "main", source.partition("@")[2])


def test_settings_are_all_there_and_load_again(run: Run) -> None:
    values = yaml.safe_load(fence(card_of(run), "yaml"))
    assert TrainConfig.from_mapping(values) == replace(
        run.config(), data="set", base_model=run.base_model().name, eval_data=None
    )


def test_drift_and_guardrails_stand_where_they_were_measured(copy: Run) -> None:
    drift = {
        "original": {"loss": 2.5, "kl": 0.0123, "top1": 0.914},
        "dequantized": {"loss": 2.25, "kl": 0.0001, "top1": 1.0},
    }
    text = section(card_of(copy, what="merged", onto="original", drift=drift), "Evaluation")
    assert "| merged onto the original 16-bit base (this one) | 2.5 | 0.0123 | 91.4% |" in text and "2.25" in text
    assert "was not measured" in section(card_of(copy, what="merged"), "Evaluation")
    assert "Guardrails" not in card_of(copy)
    change(copy, "result.json", guardrails=[{"name": "refuses | harm", "passed": True, "value": 0.97}])
    assert "| `refuses ¦ harm` | `True` | `0.97` |" in section(card_of(copy), "Evaluation")


def test_a_combination_names_its_parts(copy: Run) -> None:
    on_hub(copy)
    part = {"run_id": "gone", "name": "a|b", "weight": 0.5, "rank": 4, "adapter_sha256": "ab" * 32, "eval_loss": None}
    (copy.path / "combination.json").write_text(json.dumps({"method": "svd", "parts": [part, part | {"name": "c"}]}))
    change(copy, "result.json", "train_info", adapter_step=0, scores=[], steps=0, total_steps=0)
    text = card_of(copy, what="merged")
    assert front_of(text)["base_model_relation"] == "merge" and validate(text) == []
    assert "adapters of 2 runs by `svd`" in text and "| `a¦b` | 0.5 |" in text
    assert "unknown" in (licence_warning(copy) or "")


def test_what_a_person_says_replaces_the_cards_words(run: Run) -> None:
    said = CardText(
        intended_use="For <b>tickets</b>.\n\n- one\n- two", limits="# No", license="apache-2.0", base_license="llama3.2"
    )
    text = card_of(run, text=said)
    assert "For \\<b\\>tickets\\</b\\>.\n\n- one\n- two" in section(text, "Intended use")
    assert section(text, "Limits").strip() == "\\# No" and front_of(text)["license"] == "apache-2.0"
    assert "`llama3.2`" in section(text, "Licence") and "person who checks" in section(text, "Misuse")


def test_the_same_run_gives_the_same_card(run: Run) -> None:
    first, second = (model_card(run, what="adapter", repo_id="alice/tiny") for _ in range(2))
    assert first == second


def test_what_cannot_be_published_is_refused(copy: Run) -> None:
    with pytest.raises(RunError, match="cannot be merged onto 'sideways'"):
        card_of(copy, what="merged", onto="sideways")
    with pytest.raises(RunError, match="not of 'dataset'"):
        card_of(copy, what="dataset")
    (copy.path / "result.json").unlink()
    with pytest.raises(RunError, match="no result yet"):
        card_of(copy)


# -- pictures


def test_pictures_are_png_that_the_card_shows(run: Run, tmp_path: Path) -> None:
    compared = study(ladder(ranks=(4, 8), seeds=(42, 43)), kind="rank-ladder")
    card = model_card(run, what="adapter", repo_id="alice/tiny", study=compared)
    written = card.write(tmp_path)
    assert [path.name for path in written] == ["README.md", "loss.png", "study-costs.png", "study-losses.png"]
    for name, content in card.images.items():
        assert content.startswith(PNG) and f"]({name})" in card.text
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.width == 1440 and len(picture.convert("RGB").getcolors(1 << 20)) > 3
    assert validate(card.text) == []


def test_long_settings_fit_into_the_pictures(run: Run) -> None:
    long = {"method": "qlora", "quantize_modules": [f"q_proj@{n}" for n in range(40)]}
    compared = study([study_run(varied=long), study_run()])
    card = model_card(run, what="adapter", repo_id="alice/tiny", study=compared)
    assert set(card.images) == {"images/loss.png", "images/study-costs.png", "images/study-losses.png"}


def test_a_study_shows_its_verdict_and_what_did_not_finish(run: Run) -> None:
    failed = study_run(method="lora", rank=64, state="failed", detail="out of memory")
    compared = study([*ladder(ranks=(8,), seeds=(42,)), failed], kind="lora-vs-qlora", name="a | b `c`")
    card = model_card(run, what="adapter", repo_id="alice/tiny", study=compared)
    told = section(card.text, "LoRA against QLoRA")
    assert "Does QLoRA pay here?" in told and "`a ¦ b 'c'`" in told
    assert "| `LoRA, rank 64` | – | – | – | `failed` | 0 |" in told and "none of the study's" in told


# -- code


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder in which `alice/base` and `alice/tiny` are what a download of them would be."""
    work = tmp_path / "work"
    (work / "alice").mkdir(parents=True)
    monkeypatch.chdir(work)
    yield work


def execute(text: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(fence(text, "python"), "card", "exec"), names)  # noqa: S102
    assert capsys.readouterr().out.endswith("\n")
    return names


def test_the_code_of_an_adapter_loads_it(copy: Run, offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_hub(copy)
    (offline / "alice" / "base").symlink_to(copy.base_model().folder)
    shutil.copytree(copy.adapter, offline / "alice" / "tiny")
    model = execute(card_of(copy), capsys)["model"]
    saved = load_file(copy.adapter / "adapter_model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if "lora_B" in name}
    assert own and all(value.equal(saved[name.replace(".default", "")].to(value)) for name, value in own.items())
    assert model.base_model.model.is_loaded_in_4bit


def test_the_code_for_a_base_of_this_machine_loads_a_copy_of_it(
    run: Run, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (offline / run.base_model().name).symlink_to(run.base_model().folder)
    shutil.copytree(run.adapter, offline / "alice" / "tiny")
    assert execute(card_of(run), capsys)["model"].peft_config["default"].r == 4


def test_the_code_of_a_merged_model_loads_it(run: Run, offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_onto(run, "original", folder=offline / "alice" / "tiny")
    names = execute(card_of(run, what="merged", onto="original"), capsys)
    assert type(names["model"]).__name__ == "LlamaForCausalLM" and names["tokenizer"].chat_template


# -- licences


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("CC-BY-4.0", "cc-by-4.0"), ("AGPL-3.0-or-later", "agpl-3.0"), ("ODbL-1.0", "odbl"), (None, "unknown"), ("  ", "unknown"),
        ("My own licence", "other"), ("llama3.1", "llama3.1"), ("mit\nbase_model: evil/model", "other"),
    ],
)  # fmt: skip
def test_licences_are_named_as_the_hub_does(named: str | None, expected: str) -> None:
    fields = licence_fields(named)
    assert hub_licence(named) == fields["license"] == expected and expected in HUB_LICENCES
    assert ("license_name" in fields) == (expected == "other")


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        (None, "unknown"), ("cc-by-nc-sa-4.0", "non-commercial"), ("CC BY-NC 4.0", "non-commercial"), ("cc-by-nd-4.0", "derived"),
        ("fair-noncommercial-research-license", "non-commercial"), ("apache-2.0", None), ("cdla-sharing-1.0", None), ("ncsa", None),
    ],
)  # fmt: skip
def test_a_licence_that_may_forbid_it_is_said_before_the_push(copy: Run, named: str | None, warned: str | None) -> None:
    change(copy, "config.json", dataset_license=named)
    told = licence_warning(copy)
    assert (told is None) == (warned is None) and (warned is None or warned in told)
    assert (">" in section(card_of(copy), "Licence")) == (warned is not None)


def test_the_strictest_known_licence_names_the_model() -> None:
    assert of_model(["mit"], None) == of_model(["mit"], "apache-2.0") == "mit"
    assert of_model(["mit"], "llama3") == "llama3" and of_model(["mit"], "cc-by-nc-4.0") == "cc-by-nc-4.0"
    assert of_model(["cc-by-sa-4.0"], "llama3") == "cc-by-sa-4.0" and of_model([None, "mit"], "mit") is None


# -- checks of an edited card


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("license: sometimes", "no licence of the Hub"),
        ("license: other", "license_name"),
        ("base_model: ./models/mine", "no id of the Hub's models"),
        ("base_model: [alice/base, '/home/alice/x y']", "no id of the Hub's models"),
        ("base_model: alice/base\nbase_model_relation: cousin", "choose one of"),
        ("datasets: [my rows.jsonl]", "no id of the Hub's datasets"),
        ("tags: lora", "list of texts"),
        ("model-index: [{name: a}]", "cannot be read"),
        ("- a\n- b", "cannot be read"),
        ("a: [", "cannot be read"),
        ("a: &a [b]\ntags: [*a, *a]", "aliases"),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: 'x y', name: n}, "
            "metrics: [{type: loss, value: .nan}]}]}]",
            "other characters",
        ),
    ],
)
def test_checks_name_what_the_hub_would_refuse(front: str, problem: str) -> None:
    found = validate(f"---\n{front}\n---\n\n# A model\n")
    assert any(problem in one for one in found), found


def test_checks_want_front_matter_and_a_text() -> None:
    assert "does not begin" in validate("# A model")[0]
    assert "nothing stands below" in validate("---\nlicense: mit\n---\n")[0]
    assert validate("---\nlicense: mit\n---\n\n# A model\n") == []
    assert "keep it below" in validate("x" * 2_000_000)[0]


# -- nothing breaks out

HOSTILE = (
    "---\nlicense: mit\n---", "a\n\n---\n# b", "`` ` ``` code", "x | y | z", "<script>alert(1)</script>", "<!-- ",
    "![x](http://x.y/z.png)", "[x](javascript:1)", "\u202egnp.exe", "\u2066a\u2069", "\ufeff", "a" * 200, "'\"\\", "{{ x }}",
    "%s ${x} $$y$$", "null", "1e3", "0x1F", "yes", "- a", "# a", "a: b", "&a *a !!python/object:os.system", "\x00\x1b[31m",
    "```\n```", "~~~", "\\", "", " ", "émoji 🧪 中文", "</details>", "\u2028x", "\ud800", "@alice", "http://evil.example",
    "=== \n===", "|", "\\|", "`|`", "&lt;", "&#60;script&#62;",
)  # fmt: skip
names = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=200), st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join)
)


def shape(text: str) -> list[tuple[str, str]]:
    """Blocks and spans of the card's Markdown without its texts."""
    found = []
    for token in PARSER.parse(body_of(text)):
        found.append((token.type, token.tag))
        texts = ("text", "text_special", "softbreak")
        found += [(child.type, child.tag) for child in token.children or () if child.type not in texts]
    return found


def fill(run: Run, name: str) -> None:
    """Put the name wherever something from outside can stand."""
    licence = f"x {name}".replace("nc", "").replace("nd", "").replace("research", "")
    outside = {"columns": name, "template": "{{ x }}" + name, "dataset_license": licence, "tracker_project": name}
    change(run, "config.json", name=f"n {name}", **outside)
    whole = name.encode("utf-8", "replace").decode()  # half a surrogate pair is refused where a dataset is stored
    since = {"version": f"v {whole}", "rows_added": 1, "rows_removed": 2}
    origin = {"name": f"n {whole}", "version": f"v {whole}", "fingerprint": f"p {whole}", "since_last_version": since}
    rows = {"file_name": f"f {whole}", "form": f"f {whole}", "eval_source": f"e {whole}"}
    change(run, "dataset/dataset.json", origin=origin, **rows)
    change(run, "model.json", name=f"b {name}", origin="local folder")
    told = {
        "device": f"d {name}",
        "template": f"t {name}",
        "git_commit": f"g {name}",
        "packages": {f"p {name}": f"v {name}"},
    }
    change(run, "result.json", "run_info", **told)
    change(run, "result.json", guardrails=[{f"k {name}": f"v {name}"}])


@pytest.fixture(scope="module")
def target(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(run.path, folder / "home" / "runs" / run.run_id)
    copied = Run(folder / "home" / "runs" / run.run_id, settings_in(folder))
    lines = (copied.path / "events.jsonl").read_text().splitlines(keepends=True)
    # Without steps there is no picture, which takes most of the time.
    (copied.path / "events.jsonl").write_text("".join(line for line in lines if '"step"' not in line))
    fill(copied, "plain")
    return copied, shape(card_of(copied, repo_id="alice/plain", text=CardText(intended_use="plain")))


@settings(max_examples=FUZZED // 20, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=names)
@example(name="---\n# x\n<b>`|`\u202e")
def test_no_name_breaks_out_of_yaml_markdown_or_code(target: tuple[Run, list[tuple[str, str]]], name: str) -> None:
    run, expected = target
    fill(run, name)
    text = card_of(run, repo_id=f"alice/r{name}", version=f"v {name}", text=CardText(intended_use="plain"))
    assert shape(text) == expected
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text.encode("utf-8")
    front = front_of(text)
    assert list(front) == ["library_name", "pipeline_tag", "license", "license_name", "tags", "model-index"]
    assert front["license"] == "other" and isinstance(front["model-index"][0]["name"], str)
    assert validate(text) == []
    assert TrainConfig.from_mapping(yaml.safe_load(fence(text, "yaml"))).columns == name
    strings = [node.value for node in ast.walk(ast.parse(fence(text, "python"))) if isinstance(node, ast.Constant)]
    assert f"alice/r{name}" in strings and f"b {name}" in strings


@settings(max_examples=FUZZED, deadline=None)
@given(text=names)
def test_what_a_person_says_stays_text(text: str) -> None:
    """Paragraphs and lists, and in them what was written."""
    allowed = {"paragraph_open", "paragraph_close", "inline", "bullet_list_open", "bullet_list_close", "list_item_open",
               "list_item_close"}  # fmt: skip
    tokens = PARSER.parse(prose(text))
    assert {token.type for token in tokens} <= allowed
    children = {child.type for token in tokens for child in token.children or ()}
    assert children <= {"text", "text_special", "softbreak"}


@settings(max_examples=FUZZED, deadline=None)
@given(text=names)
def test_small_parts_hold_any_text(text: str) -> None:
    spans = PARSER.parseInline(f"a {code(text)} b")[0].children or []
    assert [child.type for child in spans] in (["text", "code_inline", "text"], ["text"])
    assert ast.literal_eval(literal(text)) == text
    assert yaml.safe_load(yaml_of({"a": text, "b": [text]})) == {"a": text, "b": [text]}
    block = front_matter({"a": text, "b": [{"c": text}]})
    assert (
        block.count("\n---") == 1
        and yaml.safe_load(block.strip("-"))["a"] == yaml.safe_load(block.strip("-"))["b"][0]["c"]
    )
