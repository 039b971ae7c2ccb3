"""Collections of the Hub for tests: their endpoints, which exist once this is imported. Knows nothing of the app."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub_endpoints import Call, endpoint
from hub_state import Refused
from hub_tokens import FINE_GRAINED, OAUTH, WRITERS, Token
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from hub_server import Hub

A_PAGE, SHOWN_ITEMS = 3, 4  # collections a page of the list; items that it tells of each
TITLE_CHARACTERS = 60
SLUG = "(?P<slug>[^/]+/[^/]+)"


@dataclass
class Kept:
    slug: str
    title: str
    owner: str
    private: bool
    description: str
    items: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, *, listed: bool = False) -> dict[str, Any]:
        values: dict[str, Any] = {"slug": self.slug, "title": self.title, "description": self.description}
        values |= {"owner": {"name": self.owner, "type": "user"}, "private": self.private, "theme": "green"}
        values |= {"upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        # The client numbers those of a list itself.
        return values | ({"items": self.items[:SHOWN_ITEMS]} if listed else {"items": self.items, "position": 0})


def collections(hub: "Hub") -> dict[str, Kept]:
    """By slug."""
    return hub.__dict__.setdefault("collections", {})


def add_collection(hub: "Hub", title: str, owner: str, *, private: bool = True, description: str = "") -> Kept:
    words = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in title.lower()).split())
    slug = f"{owner}/{words}-{len(collections(hub)):024x}"
    found = collections(hub)[slug] = Kept(slug, title, owner, private, description)
    return found


def _writes(token: Token | None, owner: str) -> bool:
    if token is None or not (owner == token.user or token.organizations.get(owner) in WRITERS):
        return False
    if token.role == OAUTH:
        return "write-collections" in token.scopes and (owner == token.user or owner in token.granted)
    if token.role == FINE_GRAINED:
        return any("collection.write" in token.scoped.get(f"{kind}:{owner}", ()) for kind in ("user", "org"))
    return token.writes(owner)


def _sees(token: Token | None, found: Kept) -> bool:
    mine = token is not None and (found.owner == token.user or found.owner in token.organizations)
    return mine or not found.private


def _writable(hub: "Hub", call: Call, slug: str) -> Kept:
    found = collections(hub).get(slug)
    if found is None or not _sees(call.token, found):
        raise Refused(404, "Collection not found")
    if not _writes(call.token, found.owner):
        raise Refused(403, "You don't have the rights to edit this collection")
    return found


@endpoint("GET", "/api/collections")
def list_collections(hub: "Hub", call: Call) -> Response:
    owner, start = call.query.get("owner"), int(call.query.get("cursor", 0))
    known = [one for one in collections(hub).values() if owner in (None, one.owner) and _sees(call.token, one)]
    more = len(known) > start + A_PAGE
    link = {"Link": f'<{hub.url}/api/collections?owner={owner}&cursor={start + A_PAGE}>; rel="next"'} if more else {}
    return JSONResponse([one.to_json(listed=True) for one in known[start : start + A_PAGE]], 200, link)


@endpoint("POST", "/api/collections")
def create_collection(hub: "Hub", call: Call) -> Response:
    asked = call.json
    title, owner = asked["title"], asked["namespace"]
    if not _writes(call.token, owner):
        raise Refused(403, f"You don't have the rights to create a collection under the namespace {owner!r}")
    if len(title) > TITLE_CHARACTERS or len(asked.get("description", "")) > 150:
        raise Refused(400, "Too long: title or description")
    there = next((one for one in collections(hub).values() if (one.title, one.owner) == (title, owner)), None)
    if there:
        return JSONResponse({"error": "This collection already exists", "slug": there.slug}, 409)
    made = add_collection(hub, title, owner, private=asked["private"], description=asked.get("description", ""))
    return JSONResponse(made.to_json())


@endpoint("GET", f"/api/collections/{SLUG}")
def get_collection(hub: "Hub", call: Call, slug: str) -> Response:
    found = collections(hub).get(slug)
    if found is None or not _sees(call.token, found):
        raise Refused(404, "Collection not found")
    return JSONResponse(found.to_json())


@endpoint("POST", f"/api/collections/{SLUG}/items")
def add_item(hub: "Hub", call: Call, slug: str) -> Response:
    found, asked = _writable(hub, call, slug), call.json
    item, note = asked["item"], asked.get("note")
    repo = hub.repos.get((f"{item['type']}s", item["id"]))
    if repo is None or (repo.private and not (call.token and call.token.reads(repo.owner, repo))):
        raise Refused(404, f"{item['type']} {item['id']} not found", "RepoNotFound")
    if any((one["type"], one["id"]) == (item["type"], item["id"]) for one in found.items):
        raise Refused(409, "This item is already in the collection")
    told = {"note": {"text": note, "html": note}} if note else {}
    found.items.append({"_id": f"{len(found.items):024x}", **item, "position": len(found.items), **told})
    return JSONResponse(found.to_json())
