"""What was pushed together as one collection on the Hub: made once, found again by its title, added to. Pushes nothing itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_core.errors import HubError
from qlora_core.hub.access import FINE_GRAINED, OAUTH, Account, account
from qlora_core.hub.faults import TOKENS_PAGE, hub_errors
from qlora_core.hub.files import RepoType
from qlora_core.hub.scopes import COLLECTS, COLLECTS_PERMISSION

if TYPE_CHECKING:
    from huggingface_hub import Collection, HfApi

# https://huggingface.co/docs/huggingface_hub/package_reference/collections
TITLE_CHARACTERS, DESCRIPTION_CHARACTERS, NOTE_CHARACTERS = 60, 150, 500


@dataclass(frozen=True)
class CollectionItem:
    """A repository by its whole name, `owner/name`; `note` says beside it what it is."""

    repo_id: str
    kind: RepoType
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.repo_id}"


def push_collection(
    title: str,
    items: Sequence[CollectionItem],
    *,
    namespace: str | None = None,
    token: str,
    private: bool = True,
    description: str = "",
    endpoint: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> str:
    """The URL of the collection of this title that holds the items; made where there is none, else added to.

    `namespace`: whose it is, the token's account where none is given. Items that are in it already stay as they are, with the
    notes they have; `private` and `description` are of a new one. Raises HubError, which names what was pushed before and stays.
    """
    from huggingface_hub import HfApi

    title = title.strip()
    with _kept(items):
        check_collection(title, items, description=description)
        who = account(token, endpoint=endpoint)
        owner = namespace or who.name
        _check_owner(title, who, owner)
        api = HfApi(endpoint=endpoint, token=token)
        with _collecting(f"collection {title!r}", who, owner, token):
            found = _find(api, title, owner)
            if found is None:
                report(f"Making the {'private' if private else 'public'} collection {title}")
                # `exists_ok`: one of this title that the list does not tell of is taken too.
                found = api.create_collection(
                    title, namespace=owner, description=description or None, private=private, exists_ok=True
                )
            if private and not found.private:
                raise HubError(_public_already(title))
        held = {(item.item_type, item.item_id.casefold()) for item in found.items}
        for item in items:
            if (item.kind, item.repo_id.casefold()) in held:
                continue
            report(f"Adding {item}")
            with _collecting(f"collection {title!r}: {item} could not be added", who, owner, token):
                api.add_collection_item(found.slug, item.repo_id, item.kind, note=item.note or None, exists_ok=True)
    return found.url


def plan_collection(
    title: str, namespace: str, *, token: str, private: bool = True, endpoint: str | None = None
) -> str:
    """What `push_collection` would do, as a sentence. Raises HubError where it would not do it."""
    from huggingface_hub import HfApi

    title = title.strip()
    check_collection(title)
    who = account(token, endpoint=endpoint)
    _check_owner(title, who, namespace)
    with _collecting(f"collection {title!r}", who, namespace, token):
        found = _find(HfApi(endpoint=endpoint, token=token), title, namespace)
    if found is None:
        return f"collection {title!r} of {namespace}: is made, {'private' if private else 'public'}"
    if private and not found.private:
        raise HubError(_public_already(title))
    return f"collection {title!r} of {namespace}: is added to; it is {'private' if found.private else 'public'}"


def _public_already(title: str) -> str:
    return (
        f"collection {title!r}: is there already and is public, so its list would be too; choose another title, make "
        "it private on its page, or ask for a public one"
    )


def check_collection(title: str, items: Sequence[CollectionItem] = (), *, description: str = "") -> None:
    """What can be known before anything is pushed. Raises HubError with all that is wrong."""
    problems = []
    if not title.strip():
        problems.append("collection: has no title; name it")
    if len(title) > TITLE_CHARACTERS:
        problems.append(
            f"collection {title!r}: its title is {len(title)} characters long; the Hub allows {TITLE_CHARACTERS}"
        )
    if len(description) > DESCRIPTION_CHARACTERS:
        problems.append(
            f"collection {title!r}: its description is {len(description)} characters long; the Hub allows {DESCRIPTION_CHARACTERS}"
        )
    for item in items:
        if len(item.note) > NOTE_CHARACTERS:
            problems.append(f"{item}: its note is {len(item.note)} characters long; the Hub allows {NOTE_CHARACTERS}")
    if problems:
        raise HubError(*problems)


def _find(api: "HfApi", title: str, owner: str) -> "Collection | None":
    """With all of its items; the list tells the first four."""
    slugs = (one.slug for one in api.list_collections(owner=owner) if one.title.strip() == title)
    slug = next(slugs, None)
    return api.get_collection(slug) if slug else None


def _check_owner(title: str, who: Account, owner: str) -> None:
    if who.kind == FINE_GRAINED:
        # Its rights to repositories say nothing of those to collections; where it does not tell of these, the Hub does when asked.
        if who.lacks(COLLECTS_PERMISSION):
            raise HubError(f"collection {title!r}: {_remedy(who, owner)}")
        return
    if not who.may_write:
        raise HubError(f"collection {title!r}: {who.read_only()}")
    if not who.writes_to(owner):
        names = ", ".join(who.namespaces)
        raise HubError(f"collection {title!r}: {owner!r} is not where {who.name} may write; you may write to: {names}")


@contextmanager
def _collecting(what: str, who: Account, owner: str, token: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors(what, token):
        try:
            yield
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 403:
                raise
            raise HubError(f"{what}: {_remedy(who, owner)}") from None


def _remedy(who: Account, owner: str) -> str:
    if who.kind == OAUTH:
        return (
            f"this sign-in may not write collections of {owner!r}; sign out and in again with the scope {COLLECTS} (and, of an "
            "organization, grant it to this app), or type a token that may write collections"
        )
    if who.kind == FINE_GRAINED:
        return f"this token may not write collections of {owner!r}; give it write access to them on {TOKENS_PAGE}"
    return f"the Hub does not allow it to {who.name}; use a token that may write collections of {owner!r}"


@contextmanager
def _kept(items: Sequence[CollectionItem]) -> Iterator[None]:
    """Whatever goes wrong with the collection, the pushes before it are there."""
    try:
        yield
    except HubError as error:
        pushed = ", ".join(map(str, items))
        raise HubError(*error.problems, *([f"on the Hub all the same: {pushed}"] if pushed else [])) from None
