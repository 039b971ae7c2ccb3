"""Datasets from the Hub as rows, through the true clients against a Hub on loopback: what comes, what is refused, what is told."""

import io
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_served import ALICE, BOB, ENVIRONMENT, MARK, client
from hub_server import Hub, hub

from qlora_core.data.hub_source import HubDataset
from qlora_core.errors import DatasetError

CAROL = f"{MARK}carol"
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
    "gated, let in": {"text": "alice/gated", "token": CAROL},
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
    for user, text in (("alice", ALICE), ("bob", BOB), ("carol", CAROL)):
        served.add_user(user)
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
        "private, stranger": ["not on the Hub, or is private", "sign in, or use a token from"],
        "private, other": ["this token may not read it"],
        "private, bad token": ["token", "invalid or has expired", "sign in, or use a token from"],
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
