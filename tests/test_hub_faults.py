"""Pushes that fail on their way: every fault is told as what it is, publishes nothing by half, and pushing again ends it."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, alpaca, wait_for, write_rows
from hub_lfs import NO_SPACE
from hub_served import ALICE, MARK
from hub_served import pytestmark as pytestmark
from hub_served import served as served
from hub_server import CUT, HOLD, Hub

from qlora_core.errors import HubError
from qlora_core.hub import Pushed, Release, account, model_push

WEIGHTS = "adapter_model.safetensors"
CARD = {"README.md": b"---\nlicense: mit\n---\n# A card\n"}
# A push as `model_push` does it, in a process that can be killed; the token comes through a pipe.
CHILD = """
import sys
from pathlib import Path
from qlora_core.hub import Release, model_push

folder, url = Path(sys.argv[1]), sys.argv[2]
asked = {"token": sys.stdin.read(), "endpoint": url, "release": Release("adapter"), "files": %r}
push = model_push(folder, "mine", **asked)
push.run(push.plan().digest)
"""


@pytest.fixture
def xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads by Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(b"weights, first")
    return folder


def push(served: Hub, folder: Path, token: str = ALICE) -> Pushed:
    asked: dict[str, Any] = {"token": token, "endpoint": served.url, "release": Release("adapter"), "files": CARD}
    wanted = model_push(folder, "mine", **asked)
    return wanted.run(wanted.plan().digest)


def changed(folder: Path, size: int = 3500) -> bytes:
    (folder / WEIGHTS).write_bytes(content := random.Random(size).randbytes(size))
    return content


def state(served: Hub) -> Any:
    """What anybody can see of the repository: its commits and where each name points."""
    repo = served.repos.get(("models", "alice/mine"))
    return repo and ([commit.oid for commit in repo.commits], dict(repo.refs))


def refused(served: Hub, folder: Path) -> str:
    """The push fails, and what can be seen is as it was."""
    before = state(served)
    with pytest.raises(HubError) as found:
        push(served, folder)
    assert state(served) == before and MARK not in str(found.value)
    return str(found.value)


def arrives(served: Hub, folder: Path, content: bytes, version: str) -> None:
    """Pushing again brings exactly one commit with all of it, and its tag."""
    before = len(served.repo("alice/mine", "models").commits)
    assert push(served, folder).version == version
    repo = served.repo("alice/mine", "models")
    assert len(repo.commits) == before + 1 and repo.refs[f"refs/tags/{version}"] == repo.head.oid
    assert served.read(repo, WEIGHTS) == content and served.read(repo, "README.md") == CARD["README.md"]


WORDS = {
    401: "does not accept the token: it is invalid or has expired",
    403: "does not allow it",
    409: "was changed by someone else at the same time, and nothing was written",
    412: "was changed by someone else at the same time, and nothing was written",
    413: "has no space for it",
    429: "asks to wait",
    500: "fault of its own (status 500)",
    503: "fault of its own (status 503)",
}
STEPS = {
    "the account": ("GET", "/whoami-v2"),
    "the repository": ("GET", "/api/models/alice/mine$"),
    "what is new": ("POST", "/preupload/"),
    "where to put it": ("POST", "/objects/batch"),
    "the contents": ("PUT", "/cdn/"),
    "their check": ("POST", "/lfs-verify"),
    "the commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("status", WORDS)
@pytest.mark.parametrize("step", STEPS)
def test_a_refusal_at_any_step_publishes_nothing_and_pushing_again_ends_it(
    served: Hub, adapter: Path, step: str, status: int
) -> None:
    push(served, adapter)
    content = changed(adapter)
    served.faults = [(*STEPS[step], status)]
    assert WORDS[status] in refused(served, adapter)
    served.faults = []
    arrives(served, adapter, content, "v2")


@pytest.mark.parametrize("step", STEPS)
def test_a_connection_that_is_cut_for_good_is_told_and_one_that_comes_back_is_not_noticed(
    served: Hub, adapter: Path, step: str
) -> None:
    push(served, adapter)
    content = changed(adapter, 8_000_000)
    served.once = [(*STEPS[step], CUT)] * 20
    assert "cannot be reached, or the connection broke" in refused(served, adapter)
    served.once = []
    arrives(served, adapter, content, "v2")


def test_a_sign_in_that_is_refused_is_told_what_it_may_lack(served: Hub, adapter: Path) -> None:
    """A push in a process of its own does not know the scopes; the Hub says only that it is not allowed."""
    text = f"hf_oauth_{MARK}"
    served.add_oauth_token("alice", "openid profile contribute-repos read-repos", text=text)
    push(served, adapter)
    changed(adapter)
    with pytest.raises(HubError) as found:
        push(served, adapter, token=text)
    told = str(found.value)
    assert "has not made takes the scope write-repos or manage-repos" in told and MARK not in told
    assert len(served.repo("alice/mine", "models").commits) == 2


# In parts


def test_what_a_gitignore_there_keeps_out_is_told_and_nothing_is_pushed_without_it(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    served.commit(served.repo("alice/mine", "models"), {".gitignore": "*.safetensors"})
    changed(adapter)
    before = state(served)
    for _ in range(2):
        with pytest.raises(HubError, match=rf"its \.gitignore keeps out {WEIGHTS}, so nothing was pushed; change that"):
            push(served, adapter)
        assert state(served) == before


@pytest.mark.parametrize("token", [f"{ALICE}\n", f"{ALICE}\nalice", f"{ALICE} x", f"{ALICE}\u200b", f"{ALICE}ü"])
def test_a_token_that_no_header_can_hold_is_refused_and_never_repeated(served: Hub, adapter: Path, token: str) -> None:
    with pytest.raises(HubError, match="the token holds a space, a line break or another character") as refused:
        push(served, adapter, token)
    assert MARK not in str(refused.value) and not served.requests


@pytest.mark.parametrize("url", ["http://localhost:port", "ftp://localhost", "http://[::1", "localhost"])
def test_a_wrong_address_of_the_hub_is_told(url: str) -> None:
    with pytest.raises(HubError, match="^account: ") as told:
        account(ALICE, endpoint=url)
    assert MARK not in str(told.value)


def test_what_answers_and_is_no_hub_is_told(served: Hub) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"error": "sign in at the proxy"})
        with pytest.raises(HubError, match="^account: what answered is no Hub; correct HF_ENDPOINT"):
            account(ALICE, endpoint=served.url)


def test_a_large_file_goes_in_parts_and_parts_that_fail_are_sent_again(served: Hub, adapter: Path) -> None:
    served.part_bytes = 1000
    content = changed(adapter)
    served.once = [("PUT", "/cdn-part/.*/2", CUT), ("PUT", "/cdn-part/.*/3", 503)]
    push(served, adapter)
    assert served.read(served.repo("alice/mine", "models"), WEIGHTS) == content
    sent = [seen for seen in served.requests if seen.method == "PUT"]
    assert [seen.path[-1] for seen in sent if "/cdn-part/" in seen.path] == ["1", "2", "3", "3", "4"]
    assert {seen.authorization for seen in sent} == {None}, "the token goes to the Hub alone"
    served.requests.clear()
    assert not push(served, adapter).changed and not any(seen.method == "PUT" for seen in served.requests)


@pytest.mark.parametrize("fault", [("PUT", "/cdn-part/.*/3", 403), ("POST", "/lfs-complete", 400)])
def test_parts_of_a_file_are_no_file(served: Hub, adapter: Path, fault: tuple[str, str, int]) -> None:
    served.part_bytes = 1000
    push(served, adapter)
    content = changed(adapter)
    served.faults = [fault]
    refused(served, adapter)
    served.faults = []
    arrives(served, adapter, content, "v2")


# Space


def test_no_space_is_told_with_what_to_do_and_not_as_a_matter_of_rights(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    content = changed(adapter)
    served.private_space_bytes = 3000
    told = refused(served, adapter)
    assert "has no space for it" in told and NO_SPACE in told and "get more space on the settings page" in told
    served.private_space_bytes = None
    arrives(served, adapter, content, "v2")


def test_by_xet_no_space_and_no_right_look_the_same_and_both_are_said(served: Hub, adapter: Path, xet: None) -> None:
    served.private_space_bytes = 0
    with pytest.raises(HubError, match="this token may not write there, or there is no space left for it"):
        push(served, adapter)
    assert [commit.title for commit in served.repo("alice/mine", "models").commits] == ["initial commit"]


# Xet


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, WORDS[401]),
        (403, "does not allow the upload"),
        (429, WORDS[429]),
        (500, WORDS[500]),
        (503, WORDS[503]),
        (CUT, "cannot be reached, or the connection broke"),
    ],
)
def test_a_fault_of_xet_is_told_as_what_it_is(
    served: Hub, adapter: Path, xet: None, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(served, adapter)
    content = changed(adapter)
    fault = ("GET", "/xet-write-token/", status)
    served.faults, served.once = ([], [fault] * 20) if status == CUT else ([fault], [])
    assert words in refused(served, adapter)
    served.faults, served.once = [], []
    arrives(served, adapter, content, "v2")


# Killed


@contextmanager
def child(served: Hub, folder: Path, *, xet: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own, with a cache of its own."""
    names = {"HF_HOME": str(folder.parent / "hf"), "HF_HUB_DISABLE_XET": "" if xet else "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD % CARD, str(folder), served.url],
        env=os.environ | names,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(ALICE)
        process.stdin.close()
        process.stdin = None
        try:
            yield process
        finally:
            process.kill()


def killed(served: Hub, process: subprocess.Popen[Any]) -> None:
    """Where the Hub lets it wait, and without a chance to clear up."""
    wait_for(lambda: served.holding.is_set() or process.poll() is not None, seconds=60)
    assert process.poll() is None, "it ended before it came to where it is held"
    process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("method", "path", "parts", "xet"),
    [
        ("PUT", "/cdn/", None, False),
        ("PUT", "/cdn-part/.*/3", 2_000_000, False),
        ("POST", "/lfs-complete", 2_000_000, False),
        ("POST", "/commit/", None, False),
        ("GET", "/xet-write-token/", None, True),
        ("POST", "/commit/", None, True),
    ],
)
def test_a_client_that_is_killed_in_an_upload_publishes_nothing_and_the_next_one_ends_it(
    served: Hub, adapter: Path, method: str, path: str, parts: int | None, xet: bool
) -> None:
    push(served, adapter)
    content, before = changed(adapter, 8_000_000), state(served)
    served.part_bytes = parts
    served.once = [(method, path, HOLD)]
    with child(served, adapter, xet=xet) as process:
        killed(served, process)
    assert state(served) == before
    assert served.read(served.repo("alice/mine", "models"), WEIGHTS) == b"weights, first"
    with child(served, adapter, xet=xet) as process:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    repo = served.repo("alice/mine", "models")
    assert [commit.title for commit in repo.commits] == ["initial commit", "v1: adapter", "v2: adapter"]
    assert repo.refs["refs/tags/v2"] == repo.head.oid and served.read(repo, WEIGHTS) == content


def test_a_client_that_is_killed_in_its_first_upload_leaves_an_empty_repository(served: Hub, adapter: Path) -> None:
    content = changed(adapter, 8_000_000)
    served.once = [("PUT", "/cdn/", HOLD)]
    with child(served, adapter) as process:
        killed(served, process)
    repo = served.repo("alice/mine", "models")
    assert repo.private and set(repo.head.files) == {".gitattributes"} and set(repo.refs) == {"refs/heads/main"}
    arrives(served, adapter, content, "v1")


def test_a_client_that_is_killed_after_its_commit_is_tagged_by_the_next_one(served: Hub, adapter: Path) -> None:
    served.once = [("POST", "/tag/", HOLD)]
    with child(served, adapter) as process:
        killed(served, process)
    repo = served.repo("alice/mine", "models")
    assert len(repo.commits) == 2 and "refs/tags/v1" not in repo.refs
    assert not push(served, adapter).changed
    assert len(repo.commits) == 2 and repo.refs["refs/tags/v1"] == repo.head.oid


def test_the_command_line_killed_in_an_upload_can_be_given_again(served: Hub, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.Popen[str]:
        names = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ALICE, "PYTHONPATH": str(ROOT)}
        names |= {"HF_HUB_DISABLE_XET": "1", "QLORA_LAB_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore"}
        whole = [sys.executable, "-m", "qlora_core", *arguments]
        return subprocess.Popen(whole, env=os.environ | names, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    rows = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(20)])
    with command("prepare", str(rows), "--out", str(tmp_path / "prepared")) as process:
        assert process.wait(timeout=120) == 0, process.stderr and process.stderr.read()
    served.once = [("PUT", "/cdn/", HOLD)]
    with command("push", str(tmp_path / "prepared"), "--repo-id", "rows", "--yes") as process:
        killed(served, process)
    repo = served.repo("alice/rows")
    assert set(repo.head.files) == {".gitattributes"} and len(repo.commits) == 1
    with command("push", str(tmp_path / "prepared"), "--repo-id", "rows", "--yes") as process:
        assert process.wait(timeout=120) == 0, process.stderr and process.stderr.read()
    assert len(repo.commits) == 2 and any(name.endswith(".parquet") for name in repo.head.files)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if MARK.encode() in path.read_bytes()]
