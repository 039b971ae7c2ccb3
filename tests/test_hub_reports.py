"""Reports of studies to the Hub through the true client against a Hub on loopback: what goes there, what stays, what changes."""

import dataclasses
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hub_served import ALICE, MARK, client
from hub_served import pytestmark as pytestmark
from hub_served import served as served
from hub_server import Hub
from huggingface_hub import DatasetCard
from study_builders import analysed, ladder, study, study_run

from qlora_core.errors import HubError
from qlora_core.hub import Push, Pushed, dataset_push, report_push
from qlora_core.model_card import validate
from qlora_core.publishing import report_part
from qlora_core.report import report_files
from qlora_core.report.readme import ROWS_AT_ONCE, loads_as_one_table, readme
from qlora_core.report.tables import TABLES, tables
from qlora_core.study_results import StudyResults

PROMPT = "I was charged twice"
HOSTILE = "x`|\n---\nlicense: mit\n# <img src=x> [a](http://evil) ${{ 1 }}\n</script>"


def results(**changed: Any) -> StudyResults:
    runs = ladder(ranks=(4,), seeds=(42,))
    return study(runs, **{"analysis": analysed(runs), "analysis_state": "finished"} | changed)


def asked(served: Hub, repo_id: str = "study", source: StudyResults | None = None, **changed: Any) -> Push:
    return report_push(source or results(), repo_id, **{"token": ALICE, "endpoint": served.url} | changed)


def push(served: Hub, repo_id: str = "study", source: StudyResults | None = None, **changed: Any) -> Pushed:
    """As a person does: what would change is looked at, then agreed to."""
    wanted = asked(served, repo_id, source, **changed)
    return wanted.run(wanted.plan().digest)


LOADED = """
import datasets, json
datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # both ask other servers
datasets.disable_progress_bars()
names = datasets.get_dataset_config_names("alice/study", token=%(token)r)
first = datasets.load_dataset("alice/study", split="train", token=%(token)r)  # the default one
others = {name: len(datasets.load_dataset("alice/study", name, split="train", token=%(token)r)) for name in names[1:]}
print(json.dumps({"labels": list(first["label"]), "names": names, "others": others}))
"""


def test_a_report_becomes_a_private_dataset_in_one_commit_whose_tables_the_library_loads(
    served: Hub, tmp_path: Path
) -> None:
    said: list[str] = []
    found = results()
    wanted = asked(served, source=found, report=said.append)
    shown = wanted.plan()
    assert shown.creates and not served.repos
    pushed = wanted.run(shown.digest)
    repo = served.repo("alice/study")
    names = {f"{name}.csv" for name in tables(found, rows=False)}
    sent = names | {"README.md", "report.html", "study.json", "study.yaml"}
    assert repo.private and set(repo.head.files) == sent | {".gitattributes", "release.json"}
    assert [commit.title for commit in repo.commits] == ["initial commit", "v1: report"]
    assert repo.refs["refs/tags/v1"] == pushed.commit == repo.head.oid
    assert (pushed.url, pushed.version, len(pushed.files)) == (f"{served.url}/datasets/alice/study", "v1", len(sent))
    record = json.loads(served.read(repo, "release.json"))
    best = min(run.eval_loss for run in found.runs if run.eval_loss is not None)
    assert (record["run_id"], record["metrics"]) == (found.study_id, {"lowest_eval_loss": best})
    assert record["git_commit"].startswith("f61e12") and record["dataset_fingerprint"].startswith("3823ea6d")
    assert not [name for name in repo.head.files if MARK.encode() in served.read(repo, name)]
    assert [line.split()[0] for line in said] == ["Creating", "Sending", "Checked:"]
    loaded = json.loads(client(served.url, tmp_path, LOADED % {"token": ALICE}).stdout)
    assert loaded["labels"] == [run.label for run in found.runs] and loaded["names"][0] == "runs"
    expected = {name: len(table[1]) for name, table in tables(found, rows=False).items() if name != "runs"}
    assert loaded["others"] == expected


def test_pushing_the_same_study_again_another_day_makes_no_commit(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = push(served)
    localtime = time.localtime
    monkeypatch.setattr(time, "localtime", lambda at=None: localtime(4e9 if at is None else at))
    again = push(served)
    assert (again.changed, again.commit, again.version) == (False, first.commit, "v1")
    assert len(served.repo("alice/study").commits) == 2


def test_what_a_report_no_longer_has_goes(served: Hub) -> None:
    push(served)
    repo = served.repo("alice/study")
    served.commit(repo, {"notes.txt": "mine"})
    wanted = asked(served, source=results(analysis=None, name="again"))
    shown = wanted.plan()
    assert {"report.html", "study.json", "README.md"} <= set(shown.changes) and shown.adds == ()
    assert set(shown.removes) == {f"{n}.csv" for n in ("similarity", "updates", "quantisation", "models", "behaviour")}
    assert shown.sentences()[0] == "alice/study: becomes v2 in place of v1"
    wanted.run(shown.digest)
    assert not set(shown.removes) & set(repo.head.files) and served.read(repo, "notes.txt") == b"mine"


# -- what stays at home


def test_no_row_and_no_answer_leaves_unless_it_was_asked_for(served: Hub) -> None:
    push(served)
    repo = served.repo("alice/study")
    assert "answers.csv" not in repo.head.files
    assert not [name for name in repo.head.files if PROMPT.encode() in served.read(repo, name)]
    assert b"no prompt and no answer is part of this repository" in served.read(repo, "README.md")
    push(served, "with-rows", rows=True)
    repo = served.repo("alice/with-rows")
    assert PROMPT.encode() in served.read(repo, "answers.csv") and PROMPT.encode() in served.read(repo, "report.html")
    assert b"licence of those rows goes on to hold" in served.read(repo, "README.md")


def test_picked_runs_bring_the_settings_of_each_and_no_folder_of_this_machine(served: Hub, tmp_path: Path) -> None:
    data = tmp_path / "home" / "mine.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    runs = [replace(run, config=replace(run.config, data=str(data))) for run in ladder(ranks=(4,), seeds=(1,))]
    push(served, source=study(runs, kind="picked"))
    repo = served.repo("alice/study")
    assert {f"configs/{run.run_id}.yaml" for run in runs} <= set(repo.head.files)
    assert b"configs/`, one for each run" in served.read(repo, "README.md")
    assert not [name for name in repo.head.files if str(tmp_path).encode() in served.read(repo, name)]


# -- refusals


@pytest.mark.parametrize(
    ("repo_id", "words"),
    [
        ("model", "there is a model of this name; choose another name for the report"),
        ("rows", "holds something else than a report from here (data/train.parquet"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_sent(served: Hub, repo_id: str, words: str) -> None:
    served.add_repo("alice/model", kind="models")
    served.add_repo("alice/rows", {"data/train.parquet": b"PAR1"}, private=True)
    with pytest.raises(HubError) as found:
        push(served, repo_id)
    assert words in str(found.value) and {seen.method for seen in served.requests} <= {"GET"}


def test_nothing_is_drawn_for_a_name_or_a_token_that_will_not_do(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.report.report_files", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(HubError, match="holds a space"):
        asked(served, "my report")
    with pytest.raises(HubError, match="no token of the Hub"):
        asked(served, token="")


def test_a_report_and_a_dataset_never_share_a_repository(served: Hub, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / "set" / "lineage.json").write_text('{"version": 1}')
    dataset_push(tmp_path / "set", "rows", token=ALICE, endpoint=served.url).run()
    with pytest.raises(HubError, match="holds a dataset, so a report of a study cannot be put into it"):
        push(served, "rows")
    push(served)
    with pytest.raises(HubError, match="holds a report of a study, so a dataset cannot be put into it"):
        dataset_push(tmp_path / "set", "study", token=ALICE, endpoint=served.url).run()


def test_a_study_of_which_nothing_has_finished_is_not_published(served: Hub) -> None:
    with pytest.raises(HubError, match="nothing has finished yet, so there is nothing to publish"):
        push(served, source=study([study_run(state="queued"), study_run(method="qlora", state="running")]))


# -- the card


def hostile() -> StudyResults:
    runs = [study_run(varied={"template": HOSTILE}, dataset_license=HOSTILE), study_run(varied={"template": "b"})]
    runs.append(study_run(varied={"template": "c"}, state="failed", detail=HOSTILE))
    for run in runs[:2]:
        info = run.result["run_info"]
        info["base_model"] |= {"name": HOSTILE, "revision": HOSTILE, "weights_sha256": HOSTILE}
        info["dataset"] |= {"file_name": HOSTILE, "eval_source": HOSTILE, "train_fingerprint": HOSTILE}
        info |= {"device": HOSTILE, "packages": {HOSTILE: HOSTILE}, "git_commit": HOSTILE, "python": HOSTILE}
    return study(runs, name=HOSTILE, differences=(HOSTILE,))


def test_nothing_of_a_name_or_of_data_breaks_out_of_the_card() -> None:
    files = report_files(hostile(), rows=False)
    text = readme(json.loads(files["study.json"]), files, repo_id="alice/study")
    assert validate(text) == []
    card = DatasetCard(text)
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert card.data.pretty_name.startswith("x`|")
    assert [one["config_name"] for one in front["configs"]][:2] == ["runs", "steps"]
    # What is left without code spans and code blocks must not be active anywhere.
    body = re.sub(r"```.*?\n```", "", text.partition("\n---\n")[2], flags=re.DOTALL)
    body = re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(|^license|^---|^# (?!: a study)|(?<!\\)\$", body, re.MULTILINE)


def test_the_card_says_what_was_compared_what_came_out_and_how_to_have_it_again(served: Hub) -> None:
    push(served)
    text = served.read(served.repo("alice/study"), "README.md").decode()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert (front["pretty_name"], front["tags"][0]) == ("tickets", "qlora-lab")
    assert "| `method` | `lora`, `qlora` |" in text and "Does QLoRA pay here?" in text and "Sureness: " in text
    assert "python -m qlora_core compare --config study.yaml --vary method=lora,qlora" in text
    assert "NVIDIA H100 80GB HBM3" in text and "torch 2.13.0" in text and "`apache-2.0`" in text
    assert "hf download alice/study report.html --repo-type dataset" in text
    assert 'load_dataset("alice/study", "runs", split="train")' in text


def test_every_table_of_a_report_is_known_to_the_card_and_may_leave() -> None:
    assert set(tables(results())) <= set(TABLES)


@pytest.mark.parametrize(
    ("first", "later", "loads"),
    [
        (["1"], ["2"], True),
        (["1"], ["2.5"], False),
        (["1", ""], ["2.5"], True),
        (["1"], ["none"], False),
        (["none"], ["1"], True),
        ([""], ["none"], False),
        ([""], ["3.5", "nan"], True),
    ],
)
def test_the_viewer_is_shown_no_table_that_it_could_not_read(first: list[str], later: list[str], loads: bool) -> None:
    lines = [*first, *[first[0]] * (ROWS_AT_ONCE - len(first)), *later]
    assert loads_as_one_table("\r\n".join(["a,b", *(f"x,{cell}" for cell in lines)]).encode()) is loads


def test_a_table_with_two_columns_of_one_name_is_left_out_of_the_viewer() -> None:
    assert not loads_as_one_table(b"a,a\r\n1,2\r\n") and not loads_as_one_table(b"")
    files = report_files(results(), rows=False)
    files = {name: content for name, content in files.items() if not name.endswith(".csv")} | {"runs.csv": b"a,a\r\n"}
    text = readme(json.loads(files["study.json"]), files, repo_id="alice/study")
    assert "viewer: false" in text and "load_dataset" not in text and validate(text) == []


def test_rows_whose_licence_is_unknown_are_warned_of_and_a_report_without_them_is_not(
    served: Hub, tmp_path: Path
) -> None:
    unlicensed = results()
    config = dataclasses.replace(unlicensed.runs[0].config, dataset_license=None)  # type: ignore[type-var]
    runs = (dataclasses.replace(unlicensed.runs[0], config=config), *unlicensed.runs[1:])
    found: Any = SimpleNamespace(results=lambda: dataclasses.replace(unlicensed, runs=runs), path=tmp_path)
    at: dict[str, Any] = {"token": ALICE, "endpoint": served.url}
    warning = report_part(found, "study", rows=True, **at).warning
    assert warning and "holds rows of the dataset" in warning and "licence of the dataset is unknown" in warning
    assert report_part(found, "study", **at).warning is None
