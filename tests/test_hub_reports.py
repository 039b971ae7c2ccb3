"""Reports of studies to the Hub through the true client against a Hub on loopback: what goes there, what stays, what changes."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hub_server import Hub, hub
from huggingface_hub import DatasetCard
from study_builders import analysed, ladder, study, study_run
from hub_served import client

from qlora_core.errors import HubError
from qlora_core.hub import Pushed, PushPlan, dataset_push, report_push, versions
from qlora_core.model_card import validate
from qlora_core.publishing import report_part
from qlora_core.report import report_files, write_report
from qlora_core.report.readme import ROWS_AT_ONCE, loads_as_one_table, readme
from qlora_core.report.tables import TABLES, tables
from qlora_core.study_results import StudyResults

# huggingface_hub 2.4.0 sends LFS files in a way that its HTTP client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
MARK = "hf_SECRETMARKER"
ALICE, READER = f"{MARK}alice", f"{MARK}reader"
PROMPT = "I was charged twice"
HOSTILE = "x`|\n---\nlicense: mit\n# <img src=x> [a](http://evil) ${{ 1 }}\n</script>"


def results(**changed: Any) -> StudyResults:
    runs = ladder(ranks=(4,), seeds=(42,))
    return study(runs, **{"analysis": analysed(runs), "analysis_state": "finished"} | changed)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client waits between its attempts
    with hub(tmp_path / "hub") as found:
        found.add_user("alice", organizations={"acme": "write", "readers": "read"})
        found.add_user("bob")
        found.add_token("alice", text=ALICE)
        found.add_token("alice", "read", text=READER)
        yield found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report without rows, as `compare --without-rows --report` leaves it, with what must stay at home beside it."""
    folder = write_report(results(), tmp_path_factory.mktemp("report"), rows=False).parent
    for name in (".env", "notes.csv", "configs/other.yaml", "answers.csv", "events.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    return folder


def plan(served: Hub, source: Any, repo_id: str = "study", **changed: Any) -> PushPlan:
    return report_push(source, repo_id, **{"token": ALICE, "endpoint": served.url} | changed).plan()


def push(served: Hub, source: Any, repo_id: str = "study", **changed: Any) -> Pushed:
    """As a person does: what would change is looked at, then agreed to."""
    asked = report_push(source, repo_id, **{"token": ALICE, "endpoint": served.url} | changed)
    return asked.run(asked.plan().digest)


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
    assert plan(served, found).creates and not served.repos
    pushed = push(served, found, report=said.append)
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
    assert [line.split()[0] for line in said] == ["Creating", "Sending", "Checked:"]
    loaded = json.loads(client(served.url, tmp_path, LOADED % {"token": ALICE}).stdout)
    assert loaded["labels"] == [run.label for run in found.runs] and loaded["names"][0] == "runs"
    expected = {name: len(table[1]) for name, table in tables(found, rows=False).items() if name != "runs"}
    assert loaded["others"] == expected


def test_with_xet_the_same_arrives(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    found = results()
    pushed = push(served, found)
    repo = served.repo("alice/study")
    assert any("/xet-write-token/" in seen.path for seen in served.requests), "the page is large enough for it"
    assert served.read(repo, "report.html").startswith(b"<!doctype html>") and pushed.changed
    assert not push(served, found).changed


def test_pushing_the_same_study_again_another_day_makes_no_commit(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = push(served, results())
    localtime = time.localtime
    monkeypatch.setattr(time, "localtime", lambda at=None: localtime(4e9 if at is None else at))
    again = push(served, results())
    assert (again.changed, again.commit, again.version) == (False, first.commit, "v1")
    assert len(served.repo("alice/study").commits) == 2


def test_a_report_there_changes_only_as_was_shown_and_what_it_no_longer_has_goes(served: Hub) -> None:
    push(served, results())
    repo = served.repo("alice/study")
    served.commit(repo, {"notes.txt": "mine"})
    changed = results(analysis=None, name="again")
    shown = plan(served, changed)
    assert {"report.html", "study.json", "README.md"} <= set(shown.changes) and shown.adds == ()
    assert set(shown.removes) == {f"{n}.csv" for n in ("similarity", "updates", "quantisation", "models", "behaviour")}
    assert "notes.txt" in shown.keeps and shown.sentences()[0] == "alice/study: becomes v2 in place of v1"
    with pytest.raises(HubError, match="is there already; look at what this push would change"):
        report_push(changed, "study", token=ALICE, endpoint=served.url).run()
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        report_push(results(name="third"), "study", token=ALICE, endpoint=served.url).run("0" * 12)
    assert len(repo.commits) == 3
    pushed = report_push(changed, "study", token=ALICE, endpoint=served.url).run(shown.digest)
    assert pushed.version == "v2" and "similarity.csv" not in repo.head.files
    assert served.read(repo, "notes.txt") == b"mine"
    listed = versions("alice/study", ALICE, kind="dataset", endpoint=served.url)
    assert [(version.version, version.current) for version in listed] == [("v2", True), ("v1", False)]


def test_a_card_that_a_person_changed_there_is_not_replaced_without_a_word(served: Hub, written: Path) -> None:
    push(served, written)
    repo = served.repo("alice/study")
    served.commit(repo, {"README.md": "---\nlicense: mit\n---\n# Mine\n"})
    with pytest.raises(HubError, match=r"holds README\.md as no push from here made them.*--force"):
        push(served, written)
    assert served.read(repo, "README.md").endswith(b"# Mine\n")
    assert push(served, written, force=True).changed


# -- what stays at home


def test_no_row_and_no_answer_leaves_unless_it_was_asked_for(served: Hub) -> None:
    push(served, results())
    repo = served.repo("alice/study")
    assert "answers.csv" not in repo.head.files
    assert not [name for name in repo.head.files if PROMPT.encode() in served.read(repo, name)]
    assert b"no prompt and no answer is part of this repository" in served.read(repo, "README.md")
    push(served, results(), "with-rows", rows=True)
    repo = served.repo("alice/with-rows")
    assert PROMPT.encode() in served.read(repo, "answers.csv") and PROMPT.encode() in served.read(repo, "report.html")
    assert b"licence of those rows goes on to hold" in served.read(repo, "README.md")


def test_of_a_folder_only_what_belongs_to_the_report_goes(served: Hub, written: Path) -> None:
    assert push(served, written).changed
    repo = served.repo("alice/study")
    assert not {"notes.csv", ".env", "answers.csv", "configs/other.yaml", "events.jsonl"} & set(repo.head.files)
    assert served.read(repo, "report.html") == (written / "report.html").read_bytes()
    assert not push(served, written).changed


def test_a_folder_that_was_written_with_rows_is_not_pushed_without(served: Hub, tmp_path: Path) -> None:
    write_report(results(), tmp_path / "report")
    with pytest.raises(HubError, match="with prompts and answers of held-out rows.*write it again without rows"):
        push(served, tmp_path / "report")
    assert not served.repos and push(served, tmp_path / "report", rows=True).changed


def test_picked_runs_bring_the_settings_of_each_and_no_folder_of_this_machine(served: Hub, tmp_path: Path) -> None:
    data = tmp_path / "home" / "mine.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    runs = [replace(run, config=replace(run.config, data=str(data))) for run in ladder(ranks=(4,), seeds=(1,))]
    push(served, study(runs, kind="picked"))
    repo = served.repo("alice/study")
    assert {f"configs/{run.run_id}.yaml" for run in runs} <= set(repo.head.files)
    assert b"configs/`, one for each run" in served.read(repo, "README.md")
    assert not [name for name in repo.head.files if str(tmp_path).encode() in served.read(repo, name)]


# -- refusals and faults


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("my report", ALICE, "holds a space"),
        ("a/b/c", ALICE, "more than one slash"),
        ("a..b", ALICE, "holds '..'"),
        ("../report", ALICE, "'..'"),
        ("r" * 200, ALICE, "characters long"),
        ("étude", ALICE, "holds 'é'"),
        ("", ALICE, "is not complete"),
        ("readers/study", ALICE, "alice may not write; you may write to: alice, acme"),
        ("bob/study", ALICE, "alice may not write"),
        ("study", READER, "may only read"),
        ("study", f"{MARK}gone", "invalid or has expired"),
        ("study", "", "no token of the Hub"),
        ("model", ALICE, "there is a model of this name; choose another name for the report"),
        ("space", ALICE, "there is a space of this name"),
        ("rows", ALICE, r"holds something else than a report from here (data/train.parquet"),
        ("open", ALICE, "is there already and is public"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_sent(
    served: Hub, written: Path, repo_id: str, token: str, words: str
) -> None:
    served.add_repo("alice/model", kind="models")
    served.add_repo("alice/space", kind="spaces")
    served.add_repo("alice/rows", {"data/train.parquet": b"PAR1"}, private=True)
    served.add_repo("alice/open")
    with pytest.raises(HubError) as found:
        push(served, written, repo_id, token=token)
    assert words in str(found.value) and MARK not in str(found.value)
    assert {seen.method for seen in served.requests} <= {"GET"}


def test_a_report_and_a_dataset_never_share_a_repository(served: Hub, written: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / "set" / "lineage.json").write_text('{"version": 1}')
    dataset_push(tmp_path / "set", "rows", token=ALICE, endpoint=served.url).run()
    with pytest.raises(HubError, match="holds a dataset, so a report of a study cannot be put into it"):
        push(served, written, "rows")
    push(served, written)
    with pytest.raises(HubError, match="holds a report of a study, so a dataset cannot be put into it"):
        dataset_push(tmp_path / "set", "study", token=ALICE, endpoint=served.url).run()


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/api/repos/create", 403, "does not allow it"),
        ("POST", "/preupload/", 401, "does not accept the token"),
        ("PUT", "/cdn/", 400, "A fault that the test asked for"),
        ("POST", "/commit/", 429, "asks to wait"),
        ("POST", "/commit/", 503, "fault of its own (status 503)"),
        ("POST", "/tag/", 500, "was pushed as commit"),
    ],
)
def test_a_fault_publishes_nothing_by_halves_and_pushing_again_ends_it(
    served: Hub, written: Path, method: str, path: str, status: int, words: str
) -> None:
    served.faults.append((method, path, status))
    with pytest.raises(HubError) as found:
        push(served, written)
    assert words in str(found.value) and MARK not in str(found.value)
    assert all(len(repo.commits) == 1 + (path == "/tag/") for repo in served.repos.values())
    served.faults.clear()
    push(served, written)
    repo = served.repo("alice/study")
    assert len(repo.commits) == 2 and repo.refs["refs/tags/v1"] == repo.head.oid


def test_a_connection_cut_at_the_commit_is_told_and_ended_by_the_next_push(served: Hub, written: Path) -> None:
    served.once.append(("POST", "/commit/", 0))
    with pytest.raises(HubError, match="connection broke"):
        push(served, written)
    assert push(served, written).changed and len(served.repo("alice/study").commits) == 2


def test_a_commit_in_between_is_looked_at_and_what_it_changed_is_refused(served: Hub, written: Path) -> None:
    push(served, results(name="before"))
    repo = served.repo("alice/study")

    def meanwhile(line: str) -> None:
        if line.startswith("Sending"):
            served.commit(repo, {"report.html": "theirs"}, title="Meanwhile")

    with pytest.raises(HubError, match=r"holds report\.html as no push from here made them"):
        push(served, written, report=meanwhile)
    assert repo.head.title == "Meanwhile"


def test_tokens_are_in_nothing_that_was_sent_or_raised_and_go_to_the_hub_alone(served: Hub, written: Path) -> None:
    push(served, written)
    repo = served.repo("alice/study")
    assert not [name for name in repo.head.files if MARK.encode() in served.read(repo, name)]
    sent = [seen.authorization for seen in served.requests if seen.host.startswith("localhost")]
    assert sent and set(sent) == {None}, "LFS contents go to another server, without the token"


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_study_of_which_nothing_has_finished_is_not_published(served: Hub, state: str) -> None:
    with pytest.raises(HubError, match="nothing has finished yet, so there is nothing to publish"):
        push(served, study([study_run(state=state), study_run(method="qlora", state=state)]))
    assert not served.repos


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"runs": [1]}', '{"runs": [], "analysis": {"behaviour": 1}}'])
def test_a_folder_that_is_no_report_is_told(served: Hub, tmp_path: Path, content: str) -> None:
    with pytest.raises(HubError, match=r"has no report\.html and no study\.json, so it is no report"):
        push(served, tmp_path / "nothing")
    (tmp_path / "report.html").write_text("")
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(HubError, match=r"study\.json.*is none that a report of a study brings.*write the report again"):
        push(served, tmp_path)
    assert not served.repos


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
    text = readme(json.loads(files["study.json"]), files, repo_id="alice/study", licence=HOSTILE)
    assert validate(text) == []
    card = DatasetCard(text)
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert front["license"] == "other" and card.data.pretty_name.startswith("x`|")
    assert [one["config_name"] for one in front["configs"]][:2] == ["runs", "steps"]
    # What is left without code spans and code blocks must not be active anywhere.
    body = re.sub(r"```.*?\n```", "", text.partition("\n---\n")[2], flags=re.DOTALL)
    body = re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(|^license|^---|^# (?!: a study)|(?<!\\)\$", body, re.MULTILINE)


def test_the_card_says_what_was_compared_what_came_out_and_how_to_have_it_again(served: Hub) -> None:
    push(served, results(), licence="cc-by-4.0")
    text = served.read(served.repo("alice/study"), "README.md").decode()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert (front["pretty_name"], front["license"], front["tags"][0]) == ("tickets", "cc-by-4.0", "qlora-lab")
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
    asked = {"token": ALICE, "endpoint": served.url}
    warning = report_part(found, "study", rows=True, **asked).warning
    assert warning and "holds rows of the dataset" in warning and "licence of the dataset is unknown" in warning
    assert report_part(found, "study", **asked).warning is None
