"""Datasets of the Hub, from it and to it, through the true clients against a Hub on loopback."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT
from hub_server import Hub, hub

from qlora_core.data.hub_source import HubDataset
from qlora_core.errors import DatasetError, HubError
from qlora_core.hub import Account, PushPlan, dataset_push, full_name, versions

# huggingface_hub 2.4.0 sends LFS files in a way that its HTTP client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
MARK = "hf_SECRETMARKER"
ALICE, BOB, READER, ENVIRONMENT = f"{MARK}alice", f"{MARK}bob", f"{MARK}reader", f"{MARK}environment"
# Runs fetches one after another in one process, since importing the clients takes longer than all of them.
CHILD = """
import json, socket, sys, time
from pathlib import Path

hosts, resolve = set(), socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **named: hosts.add(host) or resolve(host, *rest, **named)
time.sleep = lambda seconds: None  # the client waits between its attempts

from qlora_core.data.hub_source import HubDataset, fetch
from qlora_core.errors import DatasetError

class Cancelled(Exception):
    pass

def cancel(rows):
    raise Cancelled(rows)

answers = {}
for key, job in json.loads(sys.stdin.read()).items():
    folder, progress = Path(job["folder"]), []
    try:
        found = fetch(HubDataset.parse(job["text"]), folder, token=job.get("token"), limit=job.get("limit"),
                      max_bytes=job.get("max_bytes", 10**8), progress=cancel if job.get("cancel") else progress.append)
    except (DatasetError, Cancelled) as error:
        answers[key] = {"error": str(error), "type": type(error).__name__}
    else:
        answers[key] = {"rows": found.rows, "source": str(found.source), "license": found.license, "path": str(found.path),
                        "truncated": found.truncated, "left_out": found.left_out_columns, "progress": progress}
    answers[key]["files"] = sorted(path.name for path in folder.glob("*"))
print(json.dumps({"answers": answers, "hosts": sorted(hosts), "torch": "torch" in sys.modules}))
"""
JOBS: dict[str, dict[str, Any]] = {
    "public": {"text": "hub:alice/plain"},
    "limit": {"text": "alice/plain", "limit": 10},
    "limit is the end": {"text": "alice/plain", "limit": 250},
    "first commit": {"text": "alice/plain@v1"},
    "cancelled": {"text": "alice/plain", "cancel": True},
    "too long": {"text": "alice/plain", "max_bytes": 100},
    "private, owner": {"text": "alice/private", "token": ALICE},
    "private, stranger": {"text": "alice/private"},
    "private, other": {"text": "alice/private", "token": BOB},
    "private, bad token": {"text": "alice/private", "token": f"{MARK}invalid"},
    "test split": {"text": "alice/private::test", "token": ALICE},
    "no such split": {"text": "alice/private::dev", "token": ALICE},
    "no such revision": {"text": "alice/plain@v9"},
    "no such dataset": {"text": "alice/nothing"},
    "gated, stranger": {"text": "alice/gated"},
    "gated, other": {"text": "alice/gated", "token": BOB},
    "gated, let in": {"text": "alice/gated", "token": READER},
    "two configurations": {"text": "alice/configs"},
    "second configuration": {"text": "alice/configs:second"},
    "split of a configuration": {"text": "alice/configs:second:dev"},
    "no such configuration": {"text": "alice/configs:third"},
    "default configuration": {"text": "alice/default"},
    "only split": {"text": "alice/validation"},
    "mixed formats": {"text": "alice/formats:rows"},
    "types": {"text": "alice/types"},
    "array": {"text": "alice/array"},
    "script": {"text": "alice/script"},
    "no files": {"text": "alice/empty"},
    "images": {"text": "alice/images"},
    "files of this machine": {"text": "alice/outside"},
    "broken line": {"text": "alice/broken"},
    "no rows": {"text": "alice/header"},
    "fault on the way": {"text": "alice/fault"},
}


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def card(text: str) -> str:
    return f"---\n{text}\n---\n# A dataset\n"


def configs(*named: tuple[str, str, str]) -> str:
    """(configuration, split, path) -> the card's `configs`."""
    found = ["configs:"]
    for name in dict.fromkeys(name for name, _, _ in named):
        found += [f"- config_name: {name}", "  data_files:"]
        found += [f"  - split: {split}\n    path: {path}" for other, split, path in named if other == name]
    return card("\n".join(found))


def fill(served: Hub, folder: Path) -> None:
    served.add_user("alice", organizations={"acme": "write", "readers": "read"})
    served.add_user("bob")
    served.add_user("carol")
    for user, text in (("alice", ALICE), ("bob", BOB), ("carol", READER)):
        served.add_token(user, text=text)
    plain = served.add_repo("alice/plain", {"README.md": card("license: mit"), "rows.jsonl": lines({"q": "old"})})
    plain.refs["refs/tags/v1"] = plain.head.oid
    served.commit(plain, {"rows.jsonl": lines(*({"q": f"question {n}"} for n in range(250)))})
    data = {f"data/{split}-00000-of-00001.parquet": parquet(text=[split], n=[1]) for split in ("train", "test")}
    served.add_repo("alice/private", data, private=True)
    gated = served.add_repo("alice/gated", {"a.csv": "x,y\n1,two\n"}, gated=True)
    gated.granted.add("carol")
    named = [("first", "train", "a.csv"), ("second", "train", "b.csv"), ("second", "dev", "c.csv")]
    files = {f"{name}.csv": f"x\n{name}\n" for name in "abc"}
    served.add_repo("alice/configs", {"README.md": configs(*named), **files})
    named = [("first", "train", "a.csv"), ("default", "train", "b.csv")]
    served.add_repo("alice/default", {"README.md": configs(*named), **files})
    served.add_repo("alice/validation", {"validation.tsv": "x\ty\n1\t2\n"})
    named = [("table", "train", "a.csv"), ("rows", "train", "rows.jsonl")]
    served.add_repo("alice/formats", {"README.md": configs(*named), "a.csv": "x\n1\n", "rows.jsonl": lines({"x": 1})})
    served.add_repo("alice/types", {"train.parquet": typed()})
    served.add_repo("alice/array", {"rows.json": json.dumps([{"x": [1, {"a": "b"}]}, {"x": ["s"]}])})
    served.add_repo("alice/script", {"script.py": "raise SystemExit", "rows.csv": "x\n1\n"})
    served.add_repo("alice/empty", {"README.md": "# Nothing\n"})
    served.add_repo("alice/images", {"a.png": b"\x89PNG"})
    (folder / "here.txt").write_text("a file of this machine\n")
    outside = card(f"configs:\n- config_name: default\n  data_files: {folder}/*.txt")
    served.add_repo("alice/outside", {"README.md": outside, "rows.txt": "inside\n"})
    served.add_repo("alice/broken", {"rows.jsonl": '{"a": 1}\n{"a":\n'})
    served.add_repo("alice/header", {"rows.csv": "x,y\n"})
    served.add_repo("alice/fault", {"rows.csv": "x\n1\n"})
    served.faults.append(("GET", "/datasets/alice/fault/resolve/.*csv", 503))


def typed() -> bytes:
    return parquet(
        text=["one"],
        picture=[b"\x89PNG"],
        at=[datetime(2020, 1, 2, 3, 4, 5)],
        on=[date(2020, 1, 2)],
        price=[Decimal("1.20")],
        share=[float("nan")],
        turns=[[{"role": "user", "content": "hello"}]],
        clips=[[{"bytes": b"RIFF", "path": "a.wav"}]],
    )


@dataclass(frozen=True)
class Answers:
    """What the fetches of JOBS ended with, and what that process did besides."""

    answers: dict[str, dict[str, Any]]
    hosts: list[str]
    torch: bool
    requests: list[Any]
    written: dict[str, bytes]
    said: str

    def rows(self, key: str) -> list[dict[str, Any]]:
        assert "path" in self.answers[key], self.answers[key]
        return [json.loads(line) for line in Path(self.answers[key]["path"]).read_text().splitlines()]

    def error(self, key: str) -> str:
        assert self.answers[key]["type"] == "DatasetError"
        assert self.answers[key]["files"] == [], "what was begun is not left behind"
        return self.answers[key]["error"]


def client(endpoint: str, home: Path, code: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """A process whose Hub is `endpoint`, and in whose environment there is a token that nobody asked to use."""
    names = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    names |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | names, cwd=home, input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    folder, home = tmp_path_factory.mktemp("fetched"), tmp_path_factory.mktemp("home")
    # A folder of the dataset's name where the process works; the Hub is meant.
    (home / "alice" / "plain").mkdir(parents=True)
    (home / "alice" / "plain" / "rows.csv").write_text("x\nlocal\n")
    jobs = {key: job | {"folder": str(folder / str(number))} for number, (key, job) in enumerate(JOBS.items())}
    with hub(tmp_path_factory.mktemp("hub")) as served:
        fill(served, tmp_path_factory.mktemp("machine"))
        done = client(served.url, home, CHILD, json.dumps(jobs))
        written = {
            str(path): path.read_bytes() for root in (folder, home) for path in root.rglob("*") if path.is_file()
        }
        said = json.loads(done.stdout.splitlines()[-1])
        yield Answers(**said, requests=served.requests, written=written, said=done.stdout + done.stderr)


def test_public_dataset_comes_as_rows_with_commit_configuration_split_and_licence(fetched: Answers) -> None:
    found = fetched.answers["public"]
    assert fetched.rows("public") == [{"q": f"question {number}"} for number in range(250)]
    source = HubDataset.parse(found["source"])
    assert (source.config, source.split, len(source.revision or "")) == ("default", "train", 40)
    assert (found["license"], found["truncated"], found["rows"]) == ("mit", False, 250)
    assert found["progress"] == [100, 200, 250]
    name = f"alice--plain--default--train--{source.revision[:8]}"
    assert found["files"] == [f"{name}.jsonl", f"{name}.origin.json"]


def test_limit_says_whether_there_is_more(fetched: Answers) -> None:
    assert len(fetched.rows("limit")) == 10 and fetched.answers["limit"]["truncated"]
    assert len(fetched.rows("limit is the end")) == 250 and not fetched.answers["limit is the end"]["truncated"]


def test_revision_is_a_tag_resolved_to_its_commit(fetched: Answers) -> None:
    assert fetched.rows("first commit") == [{"q": "old"}]
    assert "@v1" not in fetched.answers["first commit"]["source"]


def test_cancelling_leaves_nothing_behind(fetched: Answers) -> None:
    assert fetched.answers["cancelled"] == {"error": "100", "type": "Cancelled", "files": []}


@pytest.mark.parametrize(
    ("key", "rows"),
    {
        "private, owner": [{"text": "train", "n": 1}],
        "test split": [{"text": "test", "n": 1}],
        "gated, let in": [{"x": 1, "y": "two"}],
        "second configuration": [{"x": "b"}],
        "split of a configuration": [{"x": "c"}],
        "default configuration": [{"x": "b"}],
        "only split": [{"x": 1, "y": 2}],
        "array": [{"x": [1, {"a": "b"}]}, {"x": ["s"]}],
    }.items(),
)
def test_rows_of(fetched: Answers, key: str, rows: list[Any]) -> None:
    assert fetched.rows(key) == rows


@pytest.mark.parametrize(
    ("key", "words"),
    {
        "too long": ["longer than the 100 bytes", "first 5 rows", "limit"],
        "private, stranger": ["not on the Hub, or is private", "sign in, or set HF_TOKEN"],
        "private, other": ["this token may not read it"],
        "private, bad token": ["token", "invalid or has expired", "sign in, or set HF_TOKEN"],
        "no such split": ["no split 'dev'", "train, test"],
        "no such revision": ["alice/plain@v9", "no such revision"],
        "no such dataset": ["not on the Hub", "spelling"],
        "gated, stranger": ["is gated", "ask for access", "sign in"],
        "gated, other": ["is gated", "ask for access", "account of this token"],
        "two configurations": ["several configurations", "first, second"],
        "no such configuration": ["no configuration 'third'", "first, second"],
        "mixed formats": ["rows.jsonl", "is no csv file"],
        "script": ["script.py, which is never run here", "refs/convert/parquet"],
        "no files": ["no data files", "Parquet"],
        "images": ["'imagefolder'", "Parquet"],
        "files of this machine": ["outside of the repository"],
        "broken line": ["cannot be read", "JSON parse error"],
        "no rows": ["no rows"],
        "fault on the way": ["fault of its own (status 503)"],
    }.items(),
)
def test_what_is_wrong_is_one_sentence_with_the_remedy(fetched: Answers, key: str, words: list[str]) -> None:
    error = fetched.error(key)
    assert [word for word in words if word not in error] == [], error
    assert "\n" not in error and JOBS[key]["text"].split("/")[1].split("@")[0] in error


def test_columns_of_bytes_are_left_out_by_name_and_the_rest_is_json(fetched: Answers) -> None:
    assert fetched.answers["types"]["left_out"] == ["picture", "clips"]
    turns = [{"role": "user", "content": "hello"}]
    times = {"at": "2020-01-02T03:04:05", "on": "2020-01-02"}
    assert fetched.rows("types") == [{"text": "one", **times, "price": "1.20", "share": None, "turns": turns}]


def test_tokens_are_in_no_file_no_output_and_go_to_the_hub_alone(fetched: Answers) -> None:
    assert [path for path, content in fetched.written.items() if MARK.encode() in content] == []
    assert MARK not in fetched.said
    sent = [seen.authorization for seen in fetched.requests if seen.host.startswith("localhost")]
    assert len(sent) > 1 and set(sent) == {None}, "LFS contents come from another server, without the token"
    assert not any(ENVIRONMENT in (seen.authorization or "") for seen in fetched.requests)


def test_nothing_else_is_asked_and_torch_stays_out(fetched: Answers) -> None:
    assert set(fetched.hosts) <= {"127.0.0.1", "localhost"}
    assert not fetched.torch


def test_without_connection_one_sentence_says_so(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        jobs = json.dumps({"gone": {"text": "alice/plain", "folder": str(tmp_path / "out")}})
        done = client(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, CHILD, jobs)
    (answer,) = json.loads(done.stdout)["answers"].values()
    assert "cannot be reached" in answer["error"] and "check the connection" in answer["error"]


@pytest.mark.parametrize(
    ("text", "source", "canonical"),
    [
        ("hub:a/b", HubDataset("a/b"), "hub:a/b"),
        (" a/b ", HubDataset("a/b"), "hub:a/b"),
        ("hub:a/b:c", HubDataset("a/b", "c"), "hub:a/b:c"),
        ("hub:a/b:c-1.x:train@refs/convert/parquet", HubDataset("a/b", "c-1.x", "train", "refs/convert/parquet"), None),
        ("hub:a/b::test@v1", HubDataset("a/b", None, "test", "v1"), "hub:a/b::test@v1"),
        ("datasets/a/b", HubDataset("a/b"), "hub:a/b"),
        ("https://huggingface.co/datasets/a/b", HubDataset("a/b"), "hub:a/b"),
        ("https://huggingface.co/datasets/a/b/tree/v1", HubDataset("a/b", None, None, "v1"), "hub:a/b@v1"),
        ("https://hf.co/datasets/a/b/viewer/en/test?p=1", HubDataset("a/b", "en", "test"), "hub:a/b:en:test"),
    ],
)
def test_names_of_datasets(text: str, source: HubDataset, canonical: str | None) -> None:
    assert HubDataset.parse(text) == source
    assert str(source) == (canonical or text)
    assert HubDataset.parse(str(source)) == source


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("hub:", "OWNER/NAME"),
        ("hub:squad", "OWNER/NAME"),
        ("hub:a/b/c", "OWNER/NAME"),
        ("hub:a/../b", "OWNER/NAME"),
        ("hub:a/ü", "OWNER/NAME"),
        ("hub:a/b:c:d:e", "'d:e' is no name of a split"),
        ("hub:a/b@", "nothing follows '@'"),
        ("hub:a/b@x y", "no revision"),
        ("hub:a/b::train[:10%]", "no name of a split"),
        ("hub:a/b:c/d", "no name of a configuration"),
        ("https://huggingface.co/a/b", "no page of a dataset"),
        ("https://example.com/datasets/a/b", "no page of a dataset"),
    ],
)
def test_what_is_no_name_of_a_dataset(text: str, word: str) -> None:
    with pytest.raises(DatasetError, match="dataset .*") as found:
        HubDataset.parse(text)
    assert word in str(found.value) and text in str(found.value)


# Pushing


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client of this process is told of by `endpoint=`; LFS as in the other tests."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with hub(tmp_path / "hub") as found:
        found.add_user("alice", organizations={"acme": "write", "readers": "read"})
        found.add_user("bob")
        found.add_token("alice", text=ALICE)
        found.add_token("alice", "read", text=READER)
        yield found


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared dataset's folder, with files beside it that are nobody's business."""
    folder = tmp_path / "prepared"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(configs(("default", "train", "data/train-*"), ("default", "test", "data/test-*")))
    (folder / "data" / "train-00000-of-00002.parquet").write_bytes(parquet(text=["one", "two"]))
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(parquet(text=["three"]))
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(parquet(text=["four"]))
    (folder / "lineage.json").write_text(LINEAGE)
    (folder / "changes.csv").write_text("row,change\n")
    for name in (".env", "original.jsonl", "data/original.csv", "data/deeper.parquet/x.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    return folder


LINEAGE = json.dumps({"version": 3, "fingerprint": "f1", "rows": {"train": 3, "eval": 1}})
LOADED = """
import datasets, json
datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # both ask other servers
found = datasets.load_dataset("alice/prepared", token=%r)
print(json.dumps({name: list(split["text"]) for name, split in found.items()}))
"""
PUSHED = {
    ".gitattributes",
    "README.md",
    "changes.csv",
    "lineage.json",
    "data/test-00000-of-00001.parquet",
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "release.json",
}


def plan(served: Hub, folder: Path, repo_id: str = "prepared", *, token: str = ALICE, **changed: Any) -> PushPlan:
    return dataset_push(folder, repo_id, token=token, endpoint=served.url, **changed).plan()


def push(served: Hub, folder: Path, repo_id: str = "prepared", *, token: str = ALICE, **changed: Any) -> Any:
    """As a person does: what would change is looked at, then agreed to."""
    shown = plan(served, folder, repo_id, token=token, private=changed.get("private", True))
    asked = {"message": "Push", "agreed": shown.digest} | changed
    agreed = asked.pop("agreed")
    return dataset_push(folder, repo_id, token=token, endpoint=served.url, **asked).run(agreed)


def test_push_makes_a_private_repository_in_one_commit_that_the_library_loads(
    served: Hub, prepared: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    pushed = push(served, prepared, report=said.append)
    repo = served.repo("alice/prepared")
    assert repo.private and set(repo.head.files) == PUSHED
    assert [commit.title for commit in repo.commits] == ["initial commit", "Push"]
    assert (pushed.commit, len(pushed.files), pushed.changed) == (repo.head.oid, 6, True)
    assert pushed.url == f"{served.url}/datasets/alice/prepared"
    assert served.read(repo, "lineage.json") == LINEAGE.encode()
    assert repo.refs["refs/tags/v3"] == repo.head.oid and pushed.version == "v3"
    record = json.loads(served.read(repo, "release.json"))
    assert (record["dataset_fingerprint"], record["metrics"]) == ("f1", {"train_rows": 3.0, "eval_rows": 1.0})
    assert [line.split()[0] for line in said] == ["Creating", "Sending", "Checked:"]
    done = client(served.url, tmp_path, LOADED % ALICE)
    assert json.loads(done.stdout) == {"train": ["one", "two", "three"], "test": ["four"]}
    assert {seen.authorization for seen in served.requests if seen.host.startswith("localhost")} == {None}


def test_pushing_again_without_a_change_makes_no_commit(served: Hub, prepared: Path) -> None:
    first, again = push(served, prepared), push(served, prepared, "alice/prepared")
    assert (again.changed, again.commit, len(again.files)) == (False, first.commit, 6)
    assert len(served.repo("alice/prepared").commits) == 2


def test_pushing_a_changed_dataset_replaces_its_files_and_keeps_those_of_others(served: Hub, prepared: Path) -> None:
    push(served, prepared)
    repo = served.repo("alice/prepared")
    served.commit(repo, {"notes.txt": "mine", "data/notes.txt": "mine"})
    (prepared / "data" / "train-00001-of-00002.parquet").unlink()
    (prepared / "data" / "train-00000-of-00002.parquet").rename(prepared / "data" / "train-00000-of-00001.parquet")
    assert push(served, prepared).changed
    gone = {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"}
    assert set(repo.head.files) == PUSHED - gone | {"data/train-00000-of-00001.parquet", "notes.txt", "data/notes.txt"}
    assert [commit.title for commit in repo.commits][2:] == ["Change", "Push"]


def test_a_repository_of_others_is_added_to_and_nothing_in_it_goes_unless_it_is_forced(
    served: Hub, prepared: Path
) -> None:
    served.add_user("acme")
    repo = served.add_repo("acme/data", {"data/theirs.parquet": parquet(x=[1]), "README.md": "theirs"}, private=True)
    with pytest.raises(HubError, match=r"holds README\.md as no push from here made them.*--force"):
        push(served, prepared, "acme/data")
    assert served.read(repo, "README.md") == b"theirs"
    assert push(served, prepared, "acme/data", force=True).changed
    assert set(repo.head.files) == PUSHED | {"data/theirs.parquet"}
    assert served.read(repo, "README.md") == (prepared / "README.md").read_bytes()


def test_an_existing_dataset_changes_only_as_was_shown(served: Hub, prepared: Path) -> None:
    push(served, prepared)
    repo = served.repo("alice/prepared")
    served.commit(repo, {"notes.txt": "mine"})
    (prepared / "data" / "test-00000-of-00001.parquet").unlink()
    (prepared / "lineage.json").write_text(json.dumps({"version": 4}))
    shown = plan(served, prepared)
    assert (shown.version, shown.replaces, shown.adds) == ("v4", "v3", ())
    assert shown.changes == ("lineage.json", "release.json") and shown.removes == ("data/test-00000-of-00001.parquet",)
    assert "notes.txt" in shown.keeps and shown.sentences()[0] == "alice/prepared: becomes v4 in place of v3"
    with pytest.raises(HubError, match="is there already; look at what") as found:
        push(served, prepared, agreed=None)
    assert "removes data/test-00000-of-00001.parquet" in str(found.value)
    (prepared / "changes.csv").unlink()
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        push(served, prepared, agreed=shown.digest)
    assert repo.head.title == "Change" and push(served, prepared).version == "v4"


def test_each_version_is_kept_under_its_number_and_can_be_read_again(served: Hub, prepared: Path) -> None:
    first = push(served, prepared)
    (prepared / "changes.csv").write_text("row,change,why\n")
    assert push(served, prepared).version == "v3.1", "two contents are not one version"
    (prepared / "lineage.json").write_text(json.dumps({"version": 12, "fingerprint": "f2"}))
    push(served, prepared)
    listed = versions("alice/prepared", ALICE, kind="dataset", endpoint=served.url)
    assert [(v.version, v.release and v.release.dataset_fingerprint, v.current) for v in listed] == [
        ("v12", "f2", True),
        ("v3.1", "f1", False),
        ("v3", "f1", False),
    ]
    assert served.read(served.repo("alice/prepared"), "changes.csv", "v3") == b"row,change\n"
    assert listed[-1].commit == first.commit


def test_a_name_that_a_model_has_is_not_taken_for_a_dataset(served: Hub, prepared: Path) -> None:
    served.add_repo("alice/prepared", kind="models", private=True)
    with pytest.raises(HubError, match="there is a model of this name; choose another name for the dataset"):
        push(served, prepared)
    assert ("datasets", "alice/prepared") not in served.repos


def test_a_push_that_was_cut_off_before_its_tag_is_ended_by_the_next(served: Hub, prepared: Path) -> None:
    served.faults.append(("POST", "/tag/", 500, "no"))
    with pytest.raises(HubError, match="was pushed as commit .* but not tagged as 'v3'.*push again to tag it"):
        push(served, prepared)
    served.faults.clear()
    repo = served.repo("alice/prepared")
    assert not push(served, prepared).changed and repo.refs["refs/tags/v3"] == repo.head.oid
    assert len(repo.commits) == 2


def test_a_public_repository_is_not_pushed_to_as_private(served: Hub, prepared: Path) -> None:
    repo = served.add_repo("alice/open")
    with pytest.raises(HubError, match="is there already and is public"):
        push(served, prepared, "alice/open")
    assert len(repo.commits) == 1
    assert push(served, prepared, "alice/open", private=False).changed


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("bob/prepared", ALICE, "alice may not write; you may write to: alice, acme"),
        ("readers/prepared", ALICE, "alice may not write"),
        ("prepared", READER, "the token of alice may only read"),
        ("prepared", f"{MARK}invalid", "invalid or has expired; sign in"),
        ("prepared", "", "no token of the Hub is there; sign in"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_sent(
    served: Hub, prepared: Path, repo_id: str, token: str, words: str
) -> None:
    with pytest.raises(HubError) as found:
        push(served, prepared, repo_id, token=token)
    assert words in str(found.value) and MARK not in str(found.value)
    assert {seen.path for seen in served.requests} <= {"/api/whoami-v2"} and not served.repos


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/api/repos/create", 403, "does not allow it to this token"),
        ("PUT", "/cdn/", 400, "A fault that the test asked for"),
        ("POST", "/preupload/", 403, "new and still empty: the Hub does not allow it"),
        ("POST", "/commit/", 412, "changed by someone else"),
        ("POST", "/commit/", 500, "fault of its own (status 500)"),
    ],
)
def test_a_fault_publishes_nothing_and_pushing_again_mends_it(
    served: Hub, prepared: Path, method: str, path: str, status: int, words: str
) -> None:
    served.faults.append((method, path, status))
    with pytest.raises(HubError) as found:
        push(served, prepared)
    assert words in str(found.value) and "\n" not in str(found.value) and MARK not in str(found.value)
    assert all(set(repo.head.files) == {".gitattributes"} for repo in served.repos.values())
    served.faults.clear()
    assert push(served, prepared).changed


def test_a_hub_that_is_gone_is_one_sentence(served: Hub, prepared: Path) -> None:
    served.stop()
    with pytest.raises(HubError, match="cannot be reached.*check the connection"):
        push(served, prepared)


def test_what_someone_else_wrote_meanwhile_is_not_pushed_over(served: Hub, prepared: Path) -> None:
    push(served, prepared)
    repo = served.repo("alice/prepared")

    def meanwhile(path: str, said: list[str]) -> Any:
        def report(line: str) -> None:
            if line.startswith("Sending") and not said:
                said.append(line)
                served.commit(repo, {path: "theirs"}, title="Meanwhile")

        return report

    (prepared / "changes.csv").write_text("mine")
    assert push(served, prepared, report=meanwhile("notes.txt", [])).changed, "it changed nothing that was agreed to"
    assert served.read(repo, "notes.txt") == b"theirs" and served.read(repo, "changes.csv") == b"mine"
    (prepared / "changes.csv").write_text("mine again")
    with pytest.raises(HubError, match=r"holds changes\.csv as no push from here made them"):
        push(served, prepared, report=meanwhile("changes.csv", []))
    (prepared / "data" / "new.parquet").write_bytes(parquet(text=["new"]))
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        push(served, prepared, report=meanwhile("data/new.parquet", []), force=True)
    assert repo.head.title == "Meanwhile"


def test_what_arrived_is_compared(served: Hub, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_commit = served.add_commit
    damaged = ("README.md", "data/test-00000-of-00001.parquet")

    def damaging(repo: Any, ref: str, files: Any, gone: Any, **named: Any) -> Any:
        if "lineage.json" in files:
            wrong = {path: served.store(path, (prepared / path).read_bytes()[::-1]) for path in damaged}
            files = {path: file for path, file in files.items() if path != "lineage.json"} | wrong
        return add_commit(repo, ref, files, gone, **named)

    monkeypatch.setattr(served, "add_commit", damaging)
    with pytest.raises(HubError) as found:
        push(served, prepared)
    names = str(found.value).partition("holds other bytes than were sent in ")[2].partition(";")[0].split(", ")
    assert sorted(names) == sorted([*damaged, "lineage.json"])


def test_links_out_of_the_folder_and_folders_without_data_are_refused(
    served: Hub, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.csv").write_text("secret")
    (prepared / "changes.csv").unlink()
    (prepared / "changes.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(HubError, match=r"changes\.csv .*: is a link to a place outside"):
        push(served, prepared)
    with pytest.raises(HubError, match=r"has no data/\*\.parquet; prepare the dataset first"):
        push(served, tmp_path / "nothing")
    assert not served.requests


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my data", "holds a space"),
        ("alice/data/x", "more than one slash"),
        ("alice/", "is not complete"),
        ("", "is not complete"),
        ("a..b", "holds '..'"),
        ("a--b", "holds '--'"),
        ("-data", "starts or ends with '-' or '.'"),
        ("données", "holds 'é'"),
        ("data.git", "ends with '.git'"),
        ("d" * 91, "is 97 characters long"),
        ("bob/data", "alice may not write"),
    ],
)
def test_bad_names_are_told_with_the_remedy(name: str, words: str) -> None:
    with pytest.raises(HubError) as found:
        full_name(name, Account("alice", ("acme",), may_write=True))
    assert words in str(found.value) and repr(name) in str(found.value)


@pytest.mark.parametrize("name", ["data", " data ", "alice/data", "Acme/data.v1_x-2", "d" * 90])
def test_good_names_get_their_owner(name: str) -> None:
    owner = "" if "/" in name else "alice/"
    assert full_name(name, Account("alice", ("acme",), may_write=True)) == owner + name.strip()
