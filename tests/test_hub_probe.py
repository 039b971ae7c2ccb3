"""What a token may do and whether a push can be made, told beforehand and all at once, by a Hub on loopback."""

import time
from typing import Any

import pytest
from hub_served import ALICE, MARK, READER
from hub_served import served as served
from hub_server import Hub

from qlora_core.hub import Probe, probe

GONE, SIGNED_IN = f"{MARK}gone", f"hf_oauth_{MARK}alice"
SCOPES = "openid profile contribute-repos gated-repos"


@pytest.fixture(autouse=True)
def held(served: Hub) -> None:
    """A sign-in that was let into one organization, and what is there to be pushed to."""
    served.add_oauth_token("alice", SCOPES, granted=["acme"], text=SIGNED_IN)
    served.add_repo("alice/there", {"model.safetensors": b"x" * 3000}, kind="models", private=True)
    served.add_repo("alice/open", kind="models")
    served.add_repo("alice/rows", kind="datasets")
    served.add_repo("acme/there", kind="models", private=True)


def asked(served: Hub, token: str, repo_id: str | None = None, **named: Any) -> Probe:
    """Nothing is written, and nothing tells the token."""
    found = probe(token, repo_id, endpoint=served.url, **named)
    assert {seen.method for seen in served.requests} <= {"GET"}
    assert MARK not in repr(found) + str(found.sentences())
    return found


def test_a_token_alone_tells_whose_it_is_and_where_it_may_write(served: Hub) -> None:
    found = asked(served, ALICE)
    assert (found.name, found.kind, found.scopes, found.ok) == ("alice", "write", None, True)
    assert found.namespaces == ("alice", "acme", "closed") and found.expires is None
    assert found.sentences() == ["the write token of alice; it may write to: alice, acme, closed"]
    signed_in = asked(served, SIGNED_IN, scope=SCOPES)
    assert (signed_in.kind, signed_in.scopes, signed_in.ok) == ("sign-in", tuple(SCOPES.split()), True)
    assert signed_in.namespaces == ("alice", "acme")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (GONE, "invalid or has expired; sign in"),
        ("", "no token of the Hub is there"),
        (READER, "may only read; make one"),
    ],
)
def test_a_token_that_will_not_do_is_told_without_any_repository(served: Hub, token: str, words: str) -> None:
    found = asked(served, token)
    assert not found.ok and words in found.problems[0] and found.namespaces == ()


def test_a_sign_in_that_has_expired_meanwhile_is_told(served: Hub) -> None:
    text = f"hf_oauth_{MARK}old"
    served.add_oauth_token("alice", SCOPES, expires=time.time() + 3600, text=text)
    valid = asked(served, text, scope=SCOPES)
    assert (
        valid.ok and valid.expires == pytest.approx(time.time() + 3600, abs=60) and ", until " in valid.sentences()[0]
    )
    served.add_oauth_token("alice", SCOPES, expires=time.time() - 1, text=text)
    assert "invalid or has expired" in asked(served, text, scope=SCOPES).problems[0]


def test_what_is_there_and_what_is_not(served: Hub) -> None:
    there = asked(served, ALICE, "there")
    assert (there.repo_id, there.exists, there.private, there.may_write) == ("alice/there", True, True, True)
    assert (
        there.ok
        and "alice uses 2.9 KiB in private repositories; how much space is left there is not known" in there.space
    )
    new = asked(served, ALICE, "acme/new")
    assert (new.repo_id, new.exists, new.private, new.may_write, new.ok) == ("acme/new", False, None, True, True)
    data = asked(served, ALICE, "rows", kind="dataset", private=False)
    assert (data.exists, data.private, data.ok) == (True, False, True)
    assert "alice/rows: is there, public" in data.sentences()[1]


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (ALICE, "my model/a..b-", ["holds a space", "holds '..'", "starts or ends with '-'"]),
        (ALICE, "datasets/alice/rows", ["starts with the kind, 'datasets'"]),
        (ALICE, "readers/x", ["alice may not write; you may write to: alice, acme, closed"]),
        (ALICE, "open", ["is there already and is public"]),
        (ALICE, "rows", ["there is a dataset of this name"]),
        (READER, "a b", ["may only read; make one", "holds a space"]),
        (READER, "open", ["may only read; make one", "is there already and is public"]),
    ],
)
def test_everything_in_the_way_is_told_at_once(served: Hub, token: str, repo_id: str, words: list[str]) -> None:
    found = asked(served, token, repo_id)
    assert not found.ok and len(found.problems) == len(words), found.problems
    for told, problem in zip(words, found.problems, strict=True):
        assert told in problem


@pytest.mark.parametrize(
    ("repo_id", "scopes", "also", "words"),
    [
        ("there", "contribute-repos read-repos", [], "that takes the scope write-repos or manage-repos"),
        ("new", "write-repos", [], "may not be made; that takes the scope contribute-repos or manage-repos"),
        ("new", "read-repos", [], "may only read; that takes the scope contribute-repos or manage-repos"),
        ("closed/new", "contribute-repos", [], "sign out and in again and grant it to this app"),
        ("open", "contribute-repos", ["pull request"], "this sign-in may not do that; that takes the scope write-discussions"),
        ("new", "contribute-repos", ["collection"], "this sign-in may not do that; that takes the scope write-collections"),
    ],
)  # fmt: skip
def test_a_sign_in_is_told_the_scope_or_the_grant_that_it_lacks(
    served: Hub, repo_id: str, scopes: str, also: list[Any], words: str
) -> None:
    text = f"hf_oauth_{MARK}{scopes.replace(' ', '')}"
    scopes = f"openid profile {scopes}"
    served.add_oauth_token("alice", scopes, granted=["acme"], text=text)
    found = asked(served, text, repo_id, scope=scopes, also=also, private=False)
    assert len(found.problems) == 1 and words in found.problems[0], found.problems


def test_a_sign_in_may_do_what_its_scopes_allow(served: Hub) -> None:
    served.add_repo("alice/ours", kind="models", private=True).by_app = True
    for repo_id, scopes, also in (
        ("new", "contribute-repos", []),
        ("acme/new", "contribute-repos", []),
        ("ours", "contribute-repos", []),
        ("there", "write-repos", []),
        ("there", "manage-repos", []),
        ("there", "contribute-repos read-repos write-discussions", ["pull request"]),
        ("new", "contribute-repos write-collections", ["collection"]),
    ):
        text = f"hf_oauth_{MARK}{repo_id}{scopes}".replace(" ", "")
        served.add_oauth_token("alice", scopes, granted=["acme"], text=text)
        found = asked(served, text, repo_id, scope=scopes, also=also)  # type: ignore[arg-type]
        assert found.ok and found.may_write, (repo_id, scopes, found.problems)


def test_what_a_sign_in_cannot_see_is_said(served: Hub) -> None:
    found = asked(served, SIGNED_IN, "there", scope=SCOPES)
    assert found.exists is False and found.ok
    assert (
        "as far as this sign-in can see; a private one that another app or you have made would refuse" in found.notes[0]
    )
    assert "how much space is left there is not known" in found.space and "uses" not in found.space


def test_a_fine_grained_token_writes_where_it_was_let_in(served: Hub) -> None:
    text = f"{MARK}fine"
    served.add_fine_grained_token(
        "alice", {"org:acme": ["repo.write", "collection.write"], "model:alice/there": ["repo.write"]}, text=text
    )
    found = asked(served, text)
    assert (found.kind, found.namespaces, found.writable) == ("fine-grained", ("acme",), ("acme", "alice/there"))
    assert asked(served, text, "alice/there").ok and asked(served, text, "acme/new", also=["collection"]).ok
    refused = asked(served, text, "alice/new").problems[0]
    assert "this token of alice may not write; you may write to: acme, alice/there; or give this token" in refused
    pull_request = asked(served, text, "acme/there", also=["pull request"])
    assert "give it the permission discussion.write" in pull_request.problems[0] and pull_request.may_write is False
    served.add_fine_grained_token("alice", {"user:alice": ["repo.content.read"]}, text=text)
    assert "may write nowhere; give it write access" in asked(served, text, "alice/new").problems[0]


def test_a_hub_that_cannot_be_asked_is_a_problem_and_one_that_does_not_tell_is_a_note(served: Hub) -> None:
    served.faults.append(("GET", "/auth-check/write", 404))
    unknown = asked(served, ALICE, "there")
    assert unknown.ok and unknown.may_write is None and "does not tell whether this token may write" in unknown.notes[0]
    served.faults = [("GET", "/api/models/", 503)]
    assert "fault of its own (status 503)" in asked(served, ALICE, "there").problems[0]
    served.faults = [("GET", "/whoami-v2", 429)]
    assert "asks to wait" in asked(served, ALICE, "there").problems[0]
    served.stop()
    assert "cannot be reached" in asked(served, ALICE).problems[0]
