"""Collections of the Hub through the true client against a Hub on loopback: made once, added to, rights, faults."""

from typing import Any

import pytest
from hub_collections import Kept, add_collection, collections
from hub_served import ALICE, MARK, READER
from hub_served import served as served
from hub_server import Hub

from qlora_core.errors import HubError
from qlora_core.hub import CollectionItem, push_collection
from qlora_core.hub.collections import check_collection

FINE, FINE_COLLECTS = f"{MARK}fine", f"{MARK}collects"
# As the Hub names those of a sign-in.
SIGNED_IN, SIGNED_IN_COLLECTS = f"hf_oauth_{MARK}plain", f"hf_oauth_{MARK}collects"
MINE = [
    CollectionItem("alice/tickets-lora", "model", "Adapter, QLoRA, rank 8: evaluation loss 0.81"),
    CollectionItem("alice/tickets-merged", "model", "Merged onto the dequantised base"),
    CollectionItem("alice/tickets", "dataset", "The rows it learnt from"),
    CollectionItem("alice/tickets-study", "dataset", "Report of the study"),
    CollectionItem("acme/base", "model", "Of the organization"),
]


@pytest.fixture(autouse=True)
def prepared(served: Hub) -> None:
    """Tokens with and without the right to write collections, and what goes into them."""
    served.add_fine_grained_token("alice", {"user:alice": ["repo.write"]}, text=FINE)
    served.add_fine_grained_token("alice", {"user:alice": ["repo.write", "collection.write"]}, text=FINE_COLLECTS)
    scopes = "openid profile contribute-repos read-repos"
    served.add_oauth_token("alice", scopes, text=SIGNED_IN)
    served.add_oauth_token("alice", f"{scopes} write-collections", text=SIGNED_IN_COLLECTS)
    for item in MINE:
        served.add_repo(item.repo_id, kind=f"{item.kind}s", private=True)


def push(served: Hub, title: str = "Tickets", items: Any = MINE, **changed: Any) -> str:
    return push_collection(title, items, **{"token": ALICE, "endpoint": served.url} | changed)


def only(served: Hub) -> Kept:
    (found,) = collections(served).values()
    return found


def held(found: Kept) -> list[tuple[str, str, str]]:
    return [(item["id"], item["type"], item.get("note", {}).get("text", "")) for item in found.items]


def test_what_was_pushed_becomes_one_private_collection_that_says_what_each_is(served: Hub) -> None:
    said: list[str] = []
    url = push(served, description="Of one study", report=said.append)
    found = only(served)
    assert url == f"{served.url}/collections/{found.slug}"
    assert (found.title, found.owner, found.private, found.description) == ("Tickets", "alice", True, "Of one study")
    assert held(found) == [(item.repo_id, item.kind, item.note) for item in MINE]
    assert said == ["Making the private collection Tickets", *(f"Adding {item}" for item in MINE)]


def test_the_same_again_asks_for_nothing_and_what_is_new_is_added(served: Hub) -> None:
    url = push(served, items=MINE[:2])
    served.requests.clear()
    assert push(served, " Tickets ", MINE[:2]) == url
    assert {seen.method for seen in served.requests} == {"GET"}
    only(served).items[0]["note"] = {"text": "in my own words"}
    assert push(served) == url
    assert [item["id"] for item in only(served).items] == [item.repo_id for item in MINE]
    assert held(only(served))[0][2] == "in my own words"


def test_it_is_found_again_beyond_the_first_page_and_under_its_own_name_only(served: Hub) -> None:
    for number in range(7):
        add_collection(served, f"Other {number}", "alice")
    add_collection(served, "Tickets", "bob", private=False)
    mine = add_collection(served, "Tickets", "alice", description="as I wrote it")
    assert push(served).endswith(mine.slug) and len(mine.items) == len(MINE)
    assert len(collections(served)) == 9 and mine.description == "as I wrote it"
    assert push(served, "tickets") != push(served), "another title is another collection"


def test_one_that_the_list_does_not_tell_of_is_not_made_twice(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    first = push(served, items=MINE[:1])
    monkeypatch.setattr(HfApi, "list_collections", lambda self, **named: iter(()))
    assert push(served) == first and len(only(served).items) == len(MINE)


def test_an_organization_may_have_it_and_everybody_may_see_it_where_asked(served: Hub) -> None:
    push(served, namespace="acme", private=False)
    assert (only(served).owner, only(served).private) == ("acme", False)
    with pytest.raises(HubError, match="is there already and is public") as found:
        push(served, namespace="acme")
    assert "on the Hub all the same: model alice/tickets-lora" in str(found.value)


@pytest.mark.parametrize(
    ("token", "namespace", "words"),
    [
        (READER, None, "may only read"),
        (ALICE, "bob", "'bob' is not where alice may write; you may write to: alice, acme"),
        (ALICE, "readers", "'readers' is not where alice may write"),
        (ALICE, "../alice", "is not where alice may write"),
        (
            SIGNED_IN,
            None,
            "may not write collections of 'alice'; sign out and in again with the scope write-collections",
        ),
        (SIGNED_IN_COLLECTS, "acme", "'acme' is not where alice may write"),
        (
            FINE,
            None,
            "may not write collections of 'alice'; give it write access to them on https://huggingface.co/settings",
        ),
        (FINE_COLLECTS, "acme", "may not write collections of 'acme'"),
        (f"{MARK}gone", None, "invalid or has expired"),
        ("", None, "no token of the Hub"),
    ],
)
def test_who_may_not_is_told_the_remedy_and_that_the_pushes_stay(
    served: Hub, token: str, namespace: str | None, words: str
) -> None:
    with pytest.raises(HubError) as found:
        push(served, items=MINE[:3:2], token=token, namespace=namespace)
    assert words in found.value.problems[0] and MARK not in str(found.value)
    assert found.value.problems[1] == "on the Hub all the same: model alice/tickets-lora, dataset alice/tickets"
    assert not collections(served) and all("\n" not in problem for problem in found.value.problems)


@pytest.mark.parametrize("token", [SIGNED_IN_COLLECTS, FINE_COLLECTS])
def test_a_token_with_just_that_right_may(served: Hub, token: str) -> None:
    push(served, items=MINE[:3], token=token)
    assert len(only(served).items) == 3


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/api/collections$", 500, "fault of its own (status 500)"),
        ("POST", "/api/collections$", 429, "asks to wait"),
        ("GET", "/api/collections/alice", 503, "fault of its own (status 503)"),
        ("POST", "/items$", 500, "model alice/tickets-merged could not be added: the Hub has a fault"),
        ("POST", "/items$", 403, "model alice/tickets-merged could not be added: the Hub does not allow it to alice"),
    ],
)
def test_after_a_fault_the_next_push_does_the_rest(
    served: Hub, method: str, path: str, status: int, words: str
) -> None:
    if path != "/api/collections$":
        push(served, items=MINE[:1])
    served.faults.append((method, path, status))
    with pytest.raises(HubError) as found:
        push(served)
    assert words in str(found.value) and "on the Hub all the same" in str(found.value) and MARK not in str(found.value)
    served.faults.clear()
    push(served)
    assert only(served).items[-1]["id"] == MINE[-1].repo_id


def test_an_item_that_is_not_there_is_named_and_the_others_are_added_before(served: Hub) -> None:
    gone = CollectionItem("alice/gone", "dataset")
    with pytest.raises(HubError, match="dataset alice/gone could not be added: is not on the Hub"):
        push(served, items=[MINE[0], gone])
    assert held(only(served)) == [(MINE[0].repo_id, "model", MINE[0].note)]


@pytest.mark.parametrize("title", ["x" * 200, "データ ../ <b> `x` | --- \n#", "..", "a/b", "🎟"])
def test_any_title_is_kept_as_it_is_or_refused_by_the_hub_in_one_sentence(served: Hub, title: str) -> None:
    if len(title) > 60:
        with pytest.raises(HubError, match="its title is 200 characters long; the Hub allows 60"):
            push(served, title)
        return
    assert push(served, title) == push(served, title) and only(served).title == title.strip()


def test_what_the_hub_would_refuse_is_told_before_anything_is_pushed() -> None:
    with pytest.raises(HubError) as found:
        check_collection(" ", [CollectionItem("alice/x", "model", "n" * 501)], description="d" * 151)
    assert len(found.value.problems) == 3
    assert "has no title" in str(found.value) and "is 151 characters long; the Hub allows 150" in str(found.value)
    check_collection("Tickets", MINE, description="d" * 150)


def test_tokens_go_to_the_hub_alone(served: Hub) -> None:
    push(served)
    assert {seen.host.partition(":")[0] for seen in served.requests} == {"127.0.0.1"}
    assert MARK not in repr(collections(served))
