"""Prepared datasets to the Hub through the true client against a Hub on loopback: what goes there, as which version."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_served import ALICE, client
from hub_served import pytestmark as pytestmark
from hub_served import served as served
from hub_server import Hub

from qlora_core.errors import HubError
from qlora_core.hub import Pushed, dataset_push, versions

SPLITS = "data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]"
CARD = f"---\nconfigs: [{{config_name: default, {SPLITS}}}]\n---\n# A dataset\n"
LINEAGE = json.dumps({"version": 3, "fingerprint": "f1", "rows": {"train": 3, "eval": 1}})
ROWS = {
    "data/train-00000-of-00002.parquet": ["one", "two"],
    "data/train-00001-of-00002.parquet": ["three"],
    "data/test-00000-of-00001.parquet": ["four"],
}
PUSHED = {".gitattributes", "README.md", "changes.csv", "lineage.json", "release.json", *ROWS}
LOADED = """
import datasets, json
datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # both ask other servers
found = datasets.load_dataset("alice/prepared", token=%r)
print(json.dumps({name: list(split["text"]) for name, split in found.items()}))
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared dataset's folder, with files beside it that are nobody's business."""
    folder = tmp_path / "prepared"
    (folder / "data").mkdir(parents=True)
    for name, rows in ROWS.items():
        pq.write_table(pa.table({"text": rows}), folder / name)
    (folder / "README.md").write_text(CARD)
    (folder / "lineage.json").write_text(LINEAGE)
    (folder / "changes.csv").write_text("row,change\n")
    for name in (".env", "original.jsonl", "data/original.csv", "data/deeper.parquet/x.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    return folder


def push(served: Hub, folder: Path, repo_id: str = "prepared", **changed: Any) -> Pushed:
    """As a person does: what would change is looked at, then agreed to."""
    wanted = dataset_push(folder, repo_id, **{"token": ALICE, "endpoint": served.url, "message": "Push"} | changed)
    return wanted.run(wanted.plan().digest)


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


def test_pushing_a_changed_dataset_replaces_its_files_and_keeps_those_of_others(served: Hub, prepared: Path) -> None:
    push(served, prepared)
    repo = served.repo("alice/prepared")
    served.commit(repo, {"notes.txt": "mine", "data/notes.txt": "mine"})
    (prepared / "data" / "train-00001-of-00002.parquet").unlink()
    (prepared / "data" / "train-00000-of-00002.parquet").rename(prepared / "data" / "train-00000-of-00001.parquet")
    assert push(served, prepared).changed
    gone = {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"}
    assert set(repo.head.files) == PUSHED - gone | {"data/train-00000-of-00001.parquet", "notes.txt", "data/notes.txt"}


def test_a_repository_of_others_is_added_to_and_nothing_in_it_goes_unless_it_is_forced(
    served: Hub, prepared: Path
) -> None:
    repo = served.add_repo("acme/data", {"data/theirs.parquet": b"PAR1", "README.md": "theirs"}, private=True)
    with pytest.raises(HubError, match=r"holds README\.md as no push from here made them.*--force"):
        push(served, prepared, "acme/data")
    assert served.read(repo, "README.md") == b"theirs"
    assert push(served, prepared, "acme/data", force=True).changed
    assert set(repo.head.files) == PUSHED | {"data/theirs.parquet"}
    assert served.read(repo, "README.md") == CARD.encode()


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


def test_a_folder_without_data_is_refused(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"has no data/\*\.parquet; prepare the dataset first"):
        push(served, tmp_path / "nothing")
    assert not served.requests
