"""How contents reach the Hub for tests: LFS in one piece or in parts, a token for Xet, and how much there is space for."""

import hashlib
import time
from math import ceil
from typing import TYPE_CHECKING, Any

from hub_endpoints import Call, endpoint, ranged
from hub_state import Refused, Repo
from hub_tokens import OAUTH
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from hub_server import Hub

# As the true Hub words it.
NO_SPACE = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."


@endpoint("POST", r"/{page}\.git/info/lfs/objects/batch", write=True)
def batch(hub: "Hub", call: Call, repo: Repo) -> Response:
    asked = call.json["objects"]
    new = [found for found in asked if not (hub.objects / found["oid"]).exists()]
    _refuse_without_space(hub, repo, sum(found["size"] for found in new))
    parts = hub.part_bytes is not None and any(found["size"] > hub.part_bytes for found in new)
    answers = []
    for found in asked:
        oid, size = found["oid"], found["size"]
        verify = {"href": f"{hub.url}/api/{repo.kind}/{repo.id}/lfs-verify"}
        actions = {"actions": {"upload": _upload(hub, oid, size), "verify": verify}} if found in new else {}
        answers.append({"oid": oid, "size": size} | actions)
    return JSONResponse({"transfer": "multipart" if parts else "basic", "objects": answers})


def _upload(hub: "Hub", oid: str, size: int) -> dict[str, Any]:
    if hub.part_bytes is None or size <= hub.part_bytes:
        return {"href": f"{hub.cdn_url}/cdn/{oid}"}
    numbers = range(1, ceil(size / hub.part_bytes) + 1)
    header = {f"{number:05}": f"{hub.cdn_url}/cdn-part/{oid}/{number}" for number in numbers}
    return {"href": f"{hub.url}/lfs-complete", "header": {"chunk_size": str(hub.part_bytes), **header}}


@endpoint("GET HEAD PUT", "/cdn/{sha256}")
def cdn(hub: "Hub", call: Call, sha256: str) -> Response:
    path, headers = hub.objects / sha256, {"ETag": f'"{sha256}"'}
    if call.method != "PUT":
        return ranged(call, path.read_bytes(), headers)
    hub.keep(sha256, call.body)
    return Response(None, 200, headers)


@endpoint("PUT", "/cdn-part/{sha256}/{number}")
def part(hub: "Hub", call: Call, sha256: str, number: str) -> Response:
    hub.parts[sha256, int(number)] = call.body
    return Response(None, 200, {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@endpoint("POST", "/lfs-complete")
def complete(hub: "Hub", call: Call) -> Response:
    told, contents = call.json, []
    for named in told["parts"]:
        content = hub.parts.pop((told["oid"], named["partNumber"]), None)
        if content is None or f'"{hashlib.md5(content).hexdigest()}"' != named["etag"]:
            raise Refused(400, f"Part {named['partNumber']} was not uploaded")
        contents.append(content)
    hub.keep(told["oid"], b"".join(contents))
    return JSONResponse({})


@endpoint("POST", "/api/{repo}/lfs-verify", write=True)
def verify(hub: "Hub", call: Call, repo: Repo) -> Response:
    path = hub.objects / call.json["oid"]
    if not path.exists() or path.stat().st_size != call.json["size"]:
        raise Refused(404, "Object not found")
    return JSONResponse({})


@endpoint("GET", "/api/{repo}/xet-write-token/{revision}", write=True)
def xet_write_token(hub: "Hub", call: Call, repo: Repo, revision: str) -> Response:
    _refuse_without_space(hub, repo, 1)
    token = {"casUrl": hub.xet.new_url(), "accessToken": "of-the-store", "exp": int(time.time()) + 3600}
    names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
    return JSONResponse(token, 200, {header: str(token[name]) for name, header in names.items()})


@endpoint("GET", "/api/(?:organizations/{name}/)?settings/repositories")
def used(hub: "Hub", call: Call, name: str | None = None) -> Response:
    """What each repository of an account takes; only a token of the account itself may know."""
    if call.token is None or call.token.role == OAUTH or not call.token.reads(name or call.token.user):
        raise Refused(403, "Forbidden")
    found = [repo for repo in hub.repos.values() if repo.owner == (name or call.token.user)]
    return JSONResponse([_usage(repo) for repo in found])


def _usage(repo: Repo) -> dict[str, Any]:
    storage = sum(file.size for file in repo.head.files.values() if file.lfs)
    names = {"id": repo.id, "type": repo.kind.removesuffix("s"), "updatedAt": repo.head.date}
    return names | {"visibility": "private" if repo.private else "public", "storage": storage, "storagePercent": 0.5}


def _refuse_without_space(hub: "Hub", repo: Repo, size: int) -> None:
    if hub.private_space_bytes is not None and repo.private and size > hub.private_space_bytes:
        raise Refused(403, NO_SPACE)
