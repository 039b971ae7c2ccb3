"""Models on the Hub through the true client against a Hub on loopback: plans, pushes, versions, faults."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_served import ALICE, MARK, READER
from hub_served import pytestmark as pytestmark
from hub_served import served as served
from hub_server import Hub

from qlora_core.errors import HubError
from qlora_core.hub import Account, Pushed, PushPlan, Release, full_name, model_push, rollback, versions
from qlora_core.hub.arrived import download

SENT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "images/loss.png",
    "release.json",
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder, with what must stay at home beside it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights, first")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("optimizer.pt", "rng_state.pth", "events.jsonl", "log.txt", "model.bin", "checkpoints/x.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    return folder


def release(loss: float = 2.0, rows: str = "rows", **changed: Any) -> Release:
    values: dict[str, Any] = {"what": "adapter", "eval_fingerprint": rows, "metrics": {"eval_loss": loss}}
    return Release(**values | {"dataset_fingerprint": "data", "git_commit": "c0ffee"} | changed)


def asked(served: Hub, changed: dict[str, Any]) -> dict[str, Any]:
    files = {"README.md": b"---\nlicense: mit\n---\n# A card\n", "images/loss.png": b"\x89PNG"}
    return {"token": ALICE, "endpoint": served.url, "files": files, "release": release()} | changed


def plan(served: Hub, folder: Path, repo_id: str = "mine", **changed: Any) -> PushPlan:
    return model_push(folder, repo_id, **asked(served, changed)).plan()


def push(served: Hub, folder: Path, repo_id: str = "mine", **changed: Any) -> Pushed:
    """As a person does: what would change is looked at, then agreed to."""
    wanted = model_push(folder, repo_id, **asked(served, changed))
    return wanted.run(wanted.plan().digest)


def weights(folder: Path, text: str) -> Path:
    (folder / "adapter_model.safetensors").write_bytes(text.encode())
    return folder


def test_a_push_makes_a_private_repository_with_what_belongs_there_in_one_commit(served: Hub, adapter: Path) -> None:
    planned = plan(served, adapter)
    assert planned.creates and set(planned.adds) == SENT and not served.repos
    pushed = push(served, adapter)
    repo = served.repo("alice/mine", "models")
    assert repo.private and set(repo.head.files) == SENT | {".gitattributes"}
    assert [commit.title for commit in repo.commits] == ["initial commit", "v1: adapter"]
    assert (pushed.commit, pushed.version, pushed.changed) == (repo.head.oid, "v1", True)
    assert repo.refs["refs/tags/v1"] == pushed.commit and pushed.url == f"{served.url}/alice/mine"
    record = json.loads(served.read(repo, "release.json"))
    assert (record["version"], record["git_commit"], record["dataset_fingerprint"]) == ("v1", "c0ffee", "data")
    assert record["metrics"] == {"eval_loss": 2.0} and set(record["files"]) == SENT - {"release.json"}
    assert {seen.authorization for seen in served.requests if seen.host.startswith("localhost")} == {None}


def test_with_xet_the_same_arrives(served: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    first = push(served, adapter)
    repo = served.repo("alice/mine", "models")
    assert not any(seen.path.endswith("/objects/batch") for seen in served.requests)
    assert any("/xet-write-token/" in seen.path for seen in served.requests)
    assert served.read(repo, "adapter_model.safetensors") == b"weights, first"
    assert served.read(repo, "images/loss.png") == b"\x89PNG"
    assert not push(served, adapter).changed
    assert push(served, weights(adapter, "second")).version == "v2"
    assert served.read(repo, "adapter_model.safetensors") == b"second"
    (cache := tmp_path / "cache").mkdir()
    found = download(first, cache, token=ALICE, endpoint=served.url)
    assert (found / "adapter_model.safetensors").read_bytes() == b"weights, first"
    assert rollback("mine", "v1", ALICE, endpoint=served.url).changed
    assert served.read(repo, "adapter_model.safetensors") == b"weights, first"


@pytest.mark.parametrize("xet", [False, True])
def test_large_files_are_told_one_by_one_and_come_in_the_same_commit(
    served: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, xet: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr("qlora_core.hub.push.LARGE_BYTES", 4)
    told: list[tuple[Any, ...]] = []
    push(served, adapter, report=lambda *said: told.append(said))
    repo = served.repo("alice/mine", "models")
    # The picture is in LFS too; small texts have no way of their own.
    large = [said for said in told if said[-1] == "bytes"]
    assert ("Sending adapter_model.safetensors", "bytes") in [(said[0], said[3]) for said in large]
    assert [said[1] for said in large] == sorted({said[1] for said in large}) and large[0][1] == 0
    assert [commit.title for commit in repo.commits] == ["initial commit", "v1: adapter"]
    assert served.read(repo, "adapter_model.safetensors") == b"weights, first"
    proposed = push(served, weights(adapter, "second"), pull_request=True, report=lambda *said: None)
    assert repo.at("refs/pr/1").oid == proposed.commit


def test_pushing_again_makes_no_commit_and_no_version(served: Hub, adapter: Path) -> None:
    first, again = push(served, adapter), push(served, adapter)
    assert (again.changed, again.commit, again.version) == (False, first.commit, "v1")
    repo = served.repo("alice/mine", "models")
    assert len(repo.commits) == 2 and [ref for ref in repo.refs if "tags" in ref] == ["refs/tags/v1"]


def test_an_existing_repository_changes_only_as_was_shown(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    repo = served.repo("alice/mine", "models")
    served.commit(repo, {"notes.txt": "mine"})
    weights(adapter, "second")
    (adapter / "chat_template.jinja").unlink()
    planned = plan(served, adapter)
    assert planned.changes == ("adapter_model.safetensors", "release.json") and planned.adds == ()
    assert planned.removes == ("chat_template.jinja",) and "notes.txt" in planned.keeps and planned.foreign == ()
    with pytest.raises(HubError, match="is there already; look at what") as found:
        model_push(adapter, "mine", **asked(served, {})).run()
    assert "removes chat_template.jinja" in str(found.value)
    assert push(served, adapter).version == "v2"
    assert set(repo.head.files) == SENT - {"chat_template.jinja"} | {".gitattributes", "notes.txt"}


def test_what_a_person_changed_there_is_not_replaced_without_a_word(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    repo = served.repo("alice/mine", "models")
    served.commit(repo, {"README.md": "---\nlicense: mit\n---\n# Mine\n"})
    with pytest.raises(HubError, match=r"holds README\.md as no push from here made them.*--force"):
        push(served, adapter)
    assert push(served, adapter, force=True).version == "v2"
    assert served.read(repo, "README.md") == b"---\nlicense: mit\n---\n# A card\n"


def test_versions_are_listed_compared_and_gone_back_to(served: Hub, adapter: Path) -> None:
    first = push(served, adapter)
    (adapter / "added_tokens.json").write_text("{}")
    push(served, weights(adapter, "second"), release=release(1.9))
    repo = served.repo("alice/mine", "models")
    served.commit(repo, {"notes.txt": "mine"})
    listed = versions("alice/mine", ALICE, endpoint=served.url)
    assert [(v.version, v.release.metrics["eval_loss"], v.current) for v in listed if v.release] == [
        ("v2", 1.9, True),
        ("v1", 2.0, False),
    ]
    back = rollback("mine", "v1", ALICE, endpoint=served.url)
    kept = {path: file.sha256 for path, file in repo.head.files.items() if path != "notes.txt"}
    assert kept == {path: file.sha256 for path, file in repo.at(first.commit).files.items()}
    assert "notes.txt" in repo.head.files and repo.head.title == "Roll back to v1" and back.changed
    assert [v.version for v in versions("alice/mine", ALICE, endpoint=served.url) if v.current] == ["v1"]
    assert not rollback("mine", "v1", ALICE, endpoint=served.url).changed
    assert push(served, weights(adapter, "third")).version == "v3", "numbers are not given twice"
    with pytest.raises(HubError, match="has no version 'v9'; those there are: v1, v2, v3"):
        rollback("mine", "v9", ALICE, endpoint=served.url)


def test_a_merged_pull_request_is_a_version_though_nobody_tagged_it(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    proposed = push(served, weights(adapter, "second"), pull_request=True)
    repo = served.repo("alice/mine", "models")
    repo.refs["refs/heads/main"] = proposed.commit
    listed = versions("alice/mine", ALICE, endpoint=served.url)
    assert [(v.version, v.current) for v in listed] == [("v2", True), ("v1", False)]
    assert push(served, weights(adapter, "third")).version == "v3", "two contents are not one version"


def test_going_back_does_not_undo_what_others_changed_there(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    push(served, weights(adapter, "second"))
    repo = served.repo("alice/mine", "models")
    served.commit(repo, {"README.md": "# Theirs\n"})
    told = rollback("mine", "v1", ALICE, endpoint=served.url, plan=True)
    assert set(told.restores) == {"README.md", "adapter_model.safetensors", "release.json"} and not told.changed
    with pytest.raises(HubError, match=r"README\.md there was changed by someone else"):
        rollback("mine", "v1", ALICE, endpoint=served.url)
    assert served.read(repo, "README.md") == b"# Theirs\n"
    assert rollback("mine", "v1", ALICE, endpoint=served.url, force=True).changed


def test_going_back_does_what_was_shown_or_nothing(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    push(served, weights(adapter, "second"))
    shown = rollback("mine", "v1", ALICE, endpoint=served.url, plan=True)
    third = push(served, weights(adapter, "third"))
    with pytest.raises(HubError, match="has changed since this was shown"):
        rollback("mine", "v1", ALICE, endpoint=served.url, seen=shown.commit)
    assert served.repo("alice/mine", "models").head.oid == third.commit
    again = rollback("mine", "v1", ALICE, endpoint=served.url, plan=True)
    assert rollback("mine", "v1", ALICE, endpoint=served.url, seen=again.commit).changed


@pytest.mark.parametrize("loss", ["1" + "0" * 400, '"low"'])
def test_a_record_whose_loss_is_no_number_is_none(loss: str) -> None:
    assert Release.from_bytes(f'{{"what": "adapter", "metrics": {{"eval_loss": {loss}}}}}'.encode()) is None


def test_a_version_that_was_much_better_on_the_same_rows_is_not_published_over_unless_forced(
    served: Hub, adapter: Path
) -> None:
    push(served, adapter)
    weights(adapter, "second")
    with pytest.raises(HubError, match=r"version v1 has an evaluation loss of 2\.0000 .* 10\.0% worse"):
        push(served, adapter, release=release(2.2))
    assert len(served.repo("alice/mine", "models").commits) == 2
    assert push(served, adapter, release=release(2.2), force=True).version == "v2"


def test_what_was_agreed_to_is_this_content_over_that(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    shown = plan(served, weights(adapter, "second"))
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        model_push(weights(adapter, "third"), "mine", **asked(served, {})).run(shown.digest)
    card = {"README.md": b"---\nlicense: mit\n---\n# Another card\n", "images/loss.png": b"\x89PNG"}
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        model_push(weights(adapter, "second"), "mine", **asked(served, {"files": card})).run(shown.digest)
    served.commit(served.repo("alice/mine", "models"), {"adapter_model.safetensors": b"theirs"})
    again = plan(served, weights(adapter, "second"))
    assert again.digest != shown.digest and "adapter_model.safetensors" in again.refusals[0]


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"metrics": {}}, {}, "version v1 has no evaluation loss on record"),
        ({}, {"metrics": {}}, "this version has no evaluation loss on record"),
        ({"rows": "others"}, {}, "version v1 was evaluated on other rows"),
    ],
)
def test_that_the_better_one_is_not_known_is_said(
    served: Hub, adapter: Path, before: dict[str, Any], now: dict[str, Any], words: str
) -> None:
    push(served, adapter, release=release(**before))
    (doubt,) = plan(served, weights(adapter, "second"), release=release(**now)).doubts
    assert words in doubt and "is not known" in doubt


def test_what_came_into_a_repository_while_it_was_made_is_not_built_upon(served: Hub, adapter: Path) -> None:
    def meanwhile(*said: Any) -> None:
        if said[0].startswith("Sending 7"):
            served.commit(served.repo("alice/mine", "models"), {"config.json": "{}", "model.safetensors": "theirs"})

    with pytest.raises(HubError, match="changed by someone else"):
        push(served, adapter, report=meanwhile)
    with pytest.raises(HubError, match="holds a whole model, so an adapter cannot"):
        push(served, adapter)


def test_a_number_that_another_branch_took_is_not_the_version_of_two_contents(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    repo = served.repo("alice/mine", "models")
    branch = push(served, weights(adapter, "branch"), revision="trial")
    assert branch.version == "v2"
    # As where two pushes were planned at once: the record of main says v2 too, and the tag is of the other.
    del repo.refs["refs/tags/v2"]
    served.once.append(("POST", "/tag/", 409))
    with pytest.raises(HubError, match="another push has taken it; push again, and it gets the next number"):
        push(served, weights(adapter, "main"))
    repo.refs["refs/tags/v2"] = branch.commit
    again = push(served, weights(adapter, "main"))
    assert again.version == "v3" and repo.refs["refs/tags/v3"] == repo.head.oid
    assert json.loads(served.read(repo, "release.json"))["version"] == "v3"


def test_a_strangers_record_is_not_read_where_it_is_huge(served: Hub) -> None:
    record = json.dumps({"what": "adapter", "run_id": "x" * 2_000_000})
    repo = served.add_repo("bob/strange", {"release.json": record}, kind="models")
    repo.refs["refs/tags/v1"] = repo.head.oid
    (only,) = versions("bob/strange", ALICE, endpoint=served.url)
    assert only.release is None
    assert not any("/resolve/" in seen.path for seen in served.requests)


def test_a_public_push_goes_into_a_public_repository_and_a_private_one_stays_private(
    served: Hub, adapter: Path
) -> None:
    served.add_repo("alice/open", kind="models")
    assert push(served, adapter, "open", private=False).changed
    push(served, adapter)
    shown = plan(served, weights(adapter, "second"), private=False)
    assert any("stays private" in sentence for sentence in shown.sentences())


@pytest.mark.parametrize("revision", ["a b", "../x", "x.lock", "/x", "a//b", "-x"])
def test_a_branch_that_is_none_is_refused_before_a_repository_is_made(
    served: Hub, adapter: Path, revision: str
) -> None:
    with pytest.raises(HubError, match="is no name of a branch"):
        push(served, adapter, revision=revision)
    assert not served.repos


def test_a_version_can_be_named_once(served: Hub, adapter: Path) -> None:
    assert push(served, adapter, release=release(version="1.0")).version == "1.0"
    assert not push(served, adapter, release=release(version="1.0")).changed
    with pytest.raises(HubError, match=r"has a version '1\.0' already"):
        push(served, weights(adapter, "second"), release=release(version="1.0"))
    for name in ("a b", "a/b", "..", "main", "x" * 65):
        with pytest.raises(HubError, match="version .*: is "):
            push(served, adapter, release=release(version=name))


def test_a_branch_and_a_pull_request_leave_the_main_branch_as_it_is(served: Hub, adapter: Path) -> None:
    first = push(served, adapter)
    repo = served.repo("alice/mine", "models")
    weights(adapter, "second")
    branch = push(served, adapter, revision="trial")
    assert (repo.at("trial").oid, repo.head.oid, branch.version) == (branch.commit, first.commit, "v2")
    proposed = push(served, weights(adapter, "third"), pull_request=True)
    assert proposed.pull_request == f"{served.url}/alice/mine/discussions/1"
    assert (repo.at("refs/pr/1").oid, repo.head.oid) == (proposed.commit, first.commit)
    assert "refs/tags/v3" not in repo.refs
    again = push(served, weights(adapter, "third"), pull_request=True)
    assert (again.pull_request, again.commit, again.changed) == (proposed.pull_request, proposed.commit, False)
    assert "refs/pr/2" not in repo.refs, "one proposal is made once"
    assert push(served, weights(adapter, "fourth"), pull_request=True).pull_request.endswith("/discussions/2")  # type: ignore[union-attr]
    with pytest.raises(HubError, match="leave the revision out"):
        push(served, adapter, pull_request=True, revision="trial")
    with pytest.raises(HubError, match="revision 'v1' is a tag"):
        push(served, adapter, revision="v1")
    with pytest.raises(HubError, match="nothing to make a pull request to"):
        push(served, adapter, "new", pull_request=True)


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        ("my model", ALICE, "holds a space"),
        ("datasets/alice/x", ALICE, "is that of a dataset"),
        ("readers/mine", ALICE, "alice may not write; you may write to: alice, acme"),
        ("mine", READER, "may only read"),
        ("mine", f"{MARK}gone", "invalid or has expired"),
        ("mine", "", "no token of the Hub"),
        ("taken", ALICE, "there is a dataset of this name"),
        ("space", ALICE, "there is a space of this name"),
        ("whole", ALICE, "holds a whole model, so an adapter cannot"),
        ("open", ALICE, "is there already and is public"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_sent(
    served: Hub, adapter: Path, repo_id: str, token: str, words: str
) -> None:
    served.add_repo("alice/taken", kind="datasets")
    served.add_repo("alice/space", kind="spaces")
    served.add_repo("alice/whole", {"config.json": "{}"}, kind="models", private=True)
    served.add_repo("alice/open", kind="models")
    with pytest.raises(HubError) as found:
        push(served, adapter, repo_id, token=token)
    assert words in str(found.value) and MARK not in str(found.value)
    assert {seen.method for seen in served.requests} <= {"GET"}


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


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/api/repos/create", 403, "does not allow it"),
        ("POST", "/api/repos/create", 409, "there is one of this name that this token cannot see"),
        ("POST", "/preupload/", 403, "new and still empty: the Hub does not allow it"),
        ("PUT", "/cdn/", 400, "A fault that the test asked for"),
        ("POST", "/tag/", 500, "but not tagged as 'v1'; push again to tag it"),
    ],
)
def test_a_fault_publishes_nothing_and_pushing_again_ends_it(
    served: Hub, adapter: Path, method: str, path: str, status: int, words: str
) -> None:
    served.faults.append((method, path, status))
    with pytest.raises(HubError) as found:
        push(served, adapter)
    assert words in str(found.value) and "\n" not in str(found.value) and MARK not in str(found.value)
    assert all(len(repo.commits) == 1 + (path == "/tag/") for repo in served.repos.values())
    served.faults.clear()
    push(served, adapter)
    repo = served.repo("alice/mine", "models")
    assert len(repo.commits) == 2 and repo.refs["refs/tags/v1"] == repo.head.oid


@pytest.mark.parametrize("status", [0, 500, 503, 429])
def test_what_the_client_tries_again_is_not_noticed(served: Hub, adapter: Path, status: int) -> None:
    served.once += [("PUT", "/cdn/", status)] * 2
    assert push(served, adapter).changed and served.once == []


def test_a_connection_cut_at_the_commit_is_told_and_what_was_sent_is_not_sent_again(served: Hub, adapter: Path) -> None:
    served.once.append(("POST", "/commit/", 0))
    with pytest.raises(HubError, match="connection broke"):
        push(served, adapter)
    served.requests.clear()
    assert push(served, adapter).changed
    assert not any(seen.method == "PUT" for seen in served.requests)


def test_a_commit_in_between_is_gone_around_once_where_it_changes_nothing_of_ours(served: Hub, adapter: Path) -> None:
    push(served, adapter)
    repo = served.repo("alice/mine", "models")

    def meanwhile(path: str) -> Any:
        def report(line: str) -> None:
            if line.startswith("Sending") and repo.head.files.get(path) != served.store(path, "theirs"):
                served.commit(repo, {path: "theirs"}, title="Meanwhile")

        return report

    assert push(served, weights(adapter, "second"), report=meanwhile("notes.txt")).version == "v2"
    assert [commit.title for commit in repo.commits][2:] == ["Meanwhile", "v2: adapter"]
    assert served.read(repo, "notes.txt") == b"theirs"
    with pytest.raises(HubError, match=r"holds README\.md as no push from here made them"):
        push(served, weights(adapter, "third"), report=meanwhile("README.md"))
    (adapter / "added_tokens.json").write_text("{}")
    with pytest.raises(HubError, match="has changed since its changes were shown"):
        push(served, adapter, report=meanwhile("added_tokens.json"), force=True)
    assert repo.head.title == "Meanwhile"


def test_what_arrived_damaged_or_not_at_all_is_told(
    served: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_commit = served.add_commit

    def damaging(repo: Any, ref: str, files: Any, gone: Any, **named: Any) -> Any:
        damaged = ("tokenizer.json", "adapter_model.safetensors") if "README.md" in files else ()
        wrong = {path: served.store(path, (adapter / path).read_bytes()[::-1]) for path in damaged}
        arrived = {path: file for path, file in files.items() if path != "README.md"}
        return add_commit(repo, ref, arrived | wrong, gone, **named)

    monkeypatch.setattr(served, "add_commit", damaging)
    with pytest.raises(HubError, match="holds other bytes than were sent in ") as found:
        push(served, adapter)
    names = str(found.value).partition("were sent in ")[2].partition(";")[0].split(", ")
    assert sorted(names) == ["README.md", "adapter_model.safetensors", "tokenizer.json"]
    assert "refs/tags/v1" not in served.repo("alice/mine", "models").refs


def test_links_out_of_the_folder_and_folders_without_a_model_are_refused(
    served: Hub, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(HubError, match="is a link to a place outside"):
        push(served, adapter)
    with pytest.raises(HubError, match=r"has no adapter_config\.json, adapter_model\.safetensors"):
        push(served, tmp_path / "nothing")
    assert not served.requests
