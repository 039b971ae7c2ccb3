"""A Hub on loopback for tests: the HTTP protocol that huggingface_hub 2.4.0 speaks, with LFS. Knows nothing of the app.

Clients find it by `HF_ENDPOINT=hub.url` (read when they are imported); they upload by LFS with `HF_HUB_DISABLE_XET=1`, else by
Xet, and download over HTTP either way. LFS files come from
and go to another origin, `hub.cdn_url`, as on the true Hub; `hub.requests` tells whether a token went there.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import hub_lfs  # noqa: F401 - adds its endpoints
import yaml
from hub_endpoints import ENDPOINTS, Call, endpoint, ranged
from hub_state import Commit, File, Refused, Repo, State, is_lfs
from hub_tokens import OAUTH
from hub_xet import XetStore
from loopback import serving
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

CUT, HOLD = 0, -1  # in place of a status
KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}


@dataclass(frozen=True)
class Seen:
    """A request that came in. `authorization` is the header as it was sent."""

    method: str
    host: str
    path: str
    authorization: str | None


class Hub(State):
    """The endpoints. `faults` answers requests with a status: (method, regular expression of the path, status), and a message
    where there is one; a test adds and removes them."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder)
        self.url, self.cdn_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.requests: list[Seen] = []
        self.xet = XetStore(folder.resolve() / "xet")
        self.faults: list[tuple[Any, ...]] = []
        # As `faults`, each for one request. CUT ends the connection when some of what is sent has come; HOLD lets the client
        # wait there until it goes, and `holding` tells that it waits.
        self.once: list[tuple[Any, ...]] = []
        self.holding = threading.Event()
        self.stop: Callable[[], None] = lambda: None

    def _lookup(self, call: Call, kind: str, repo_id: str, *, write: bool) -> Repo:
        repo, owner = self.repos.get((kind, repo_id)), repo_id.partition("/")[0]
        if repo is None or (repo.private and not (call.token and call.token.reads(owner, repo))):
            raise Refused(404 if call.token else 401, "Repository not found", "RepoNotFound")
        if write and not call.token:
            raise Refused(401, "Invalid username or password.")
        if write and call.token and not call.token.writes(owner, repo):
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _granted(self, call: Call, repo: Repo) -> None:
        """Of a gated repository all may see that it is there and what it holds; the contents only who was let in."""
        if repo.gated and not (call.token and (call.token.user in repo.granted or call.token.reads(repo.owner, repo))):
            message = f"Access to dataset {repo.id} is restricted."
            raise Refused(403 if call.token else 401, message, "GatedRepo")

    # Accounts and repositories

    @endpoint("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Response:
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        return JSONResponse(call.token.to_json())

    @endpoint("POST", "/api/repos/create")
    def create(self, call: Call) -> Response:
        asked = call.json
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or call.token.user, KINDS[asked.get("type", "model")]
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if not call.token.writes(owner):
            raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner!r}")
        if (kind, repo_id) in self.repos:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        made = self.add_repo(repo_id, kind=kind, private=asked.get("visibility") == "private")
        made.by_app = call.token.role == OAUTH
        return JSONResponse({"url": url, "name": repo_id})

    @endpoint("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Response:
        try:
            found = _front_matter(call.json["content"])
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [], "warnings": warnings})

    # Reading

    @endpoint("GET", "/api/{repo}(?:/revision/{revision})?")
    def info(self, call: Call, repo: Repo, revision: str | None) -> Response:
        commit = repo.at(revision or "main")
        card = _front_matter(self.content(commit.files["README.md"]).decode()) if "README.md" in commit.files else {}
        names = card.get("license", [])
        tags = [f"license:{name}" for name in ([names] if isinstance(names, str) else names)]
        siblings = [_sibling(path, file, blobs="blobs" in call.query) for path, file in commit.files.items()]
        values = {"id": repo.id, "author": repo.owner, "sha": commit.oid, "private": repo.private, "tags": tags}
        values |= {"gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        values |= {"createdAt": repo.commits[0].date, "lastModified": commit.date, "siblings": siblings}
        return JSONResponse(values | ({"cardData": card} if card else {}))

    @endpoint("GET", "/api/{repo}/auth-check")
    def auth_check(self, call: Call, repo: Repo) -> Response:
        self._granted(call, repo)
        return JSONResponse({})

    @endpoint("GET", "/api/{repo}/auth-check/write", write=True)
    def auth_check_write(self, call: Call, repo: Repo) -> Response:
        return JSONResponse({})

    @endpoint("GET", "/api/{repo}/tree/{revision}(?:/{path*})?")
    def tree(self, call: Call, repo: Repo, revision: str, path: str | None = None) -> Response:
        commit = repo.at(revision)
        under = path.rstrip("/") if path else ""
        if under and under not in commit.folders():
            raise Refused(404, f"{under} does not exist on {revision!r}", "EntryNotFound", _at(commit))
        deep = call.query.get("recursive", "").lower() in ("true", "1")
        paths = [name for name in (*commit.folders(), *commit.files) if name.startswith(f"{under}/" if under else "")]
        depth = under.count("/") + 1 if under else 0
        return JSONResponse([_entry(commit, name) for name in sorted(paths) if deep or name.count("/") == depth])

    @endpoint("POST", "/api/{repo}/paths-info/{revision}")
    def paths_info(self, call: Call, repo: Repo, revision: str) -> Response:
        commit = repo.at(revision)
        paths = parse_qs(call.body.decode()).get("paths", [])
        known = commit.folders() | commit.files.keys()
        return JSONResponse([_entry(commit, path) for path in paths if path in known])

    @endpoint("GET", "/api/{repo}/refs")
    def refs(self, call: Call, repo: Repo) -> Response:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        groups = {"heads": "branches", "tags": "tags", "convert": "converts", "pr": "pullRequests"}
        for ref, oid in repo.refs.items():
            _, group, name = ref.split("/", 2)
            found[groups[group]].append({"name": name, "ref": ref, "targetCommit": oid})
        return JSONResponse(found)

    @endpoint("GET", "/api/{repo}/commits/{revision}")
    def commits(self, call: Call, repo: Repo, revision: str) -> Response:
        return JSONResponse([_commit_json(commit) for commit in repo.history(revision)])

    @endpoint("GET HEAD", "/{page}/resolve/{revision}/{path*}")
    def resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Response:
        self._granted(call, repo)
        commit = repo.at(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", _at(commit))
        if not file.lfs:
            return ranged(call, self.content(file), {**_at(commit), "ETag": f'"{file.oid}"'})
        linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        return Response(None, 302, {**_at(commit), **linked, "Location": f"{self.cdn_url}/cdn/{file.sha256}"})

    # Writing

    @endpoint("POST", "/api/{repo}/preupload/{revision}", write=True)
    def preupload(self, call: Call, repo: Repo, revision: str) -> Response:
        commit, answers = repo.at(revision), []
        ignored = self.read(repo, ".gitignore").decode().split() if ".gitignore" in commit.files else []
        for asked in call.json["files"]:
            there, lfs = commit.files.get(asked["path"]), is_lfs(asked["path"], asked["size"])
            oid = there and (there.sha256 if there.lfs else there.oid)
            mode = "lfs" if lfs else "regular"
            ignore = any(fnmatch(asked["path"], pattern) for pattern in ignored)
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return JSONResponse({"files": answers})

    @endpoint("POST", "/api/{repo}/commit/{revision}", write=True)
    def make_commit(self, call: Call, repo: Repo, revision: str) -> Response:
        files: dict[str, File] = {}
        gone: set[str] = set()
        head: dict[str, Any] = {}
        parent = repo.at(revision)
        for line in call.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                head = value
            elif key == "file":
                files[value["path"]] = self.store(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                path = self.objects / value["oid"]
                if not path.exists() and not self.xet.fetch(value["oid"], value.get("size"), path):
                    raise Refused(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = self.file_of(value["path"], value["oid"], path.stat().st_size, lfs=True)
            elif key == "deletedFile":
                gone.add(value["path"])
            else:
                gone |= {path for path in parent.files if path.startswith(value["path"].rstrip("/") + "/")}
        if missing := gone - parent.files.keys():
            raise Refused(404, f"A file with this name doesn't exist: {sorted(missing)}", "EntryNotFound")
        if head.get("parentCommit") not in (None, parent.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        proposed = call.query.get("create_pr") == "1"
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref, author = (
            f"refs/pr/{number}" if proposed else f"refs/heads/{revision}",
            call.token.user if call.token else "",
        )
        text = head.get("description", "")
        commit = self.add_commit(repo, ref, files, gone, title=head["summary"], author=author, text=text)
        url = f"{self.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}/commit/{commit.oid}"
        request = {"pullRequestUrl": f"{url.partition('/commit/')[0]}/discussions/{number}"} if proposed else {}
        return JSONResponse({"success": True, "commitOid": commit.oid, "commitUrl": url, **request})

    @endpoint("GET", "/api/{repo}/discussions")
    def discussions(self, call: Call, repo: Repo) -> Response:
        """All that there are are pull requests, and open."""
        numbers = sorted(int(ref.removeprefix("refs/pr/")) for ref in repo.refs if ref.startswith("refs/pr/"))
        told = {"status": "open", "isPullRequest": True, "author": {"name": repo.owner}}
        told |= {"repo": {"name": repo.id, "type": repo.kind.removesuffix("s")}}
        found = [
            {
                **told,
                "num": number,
                "title": repo.at(f"refs/pr/{number}").title,
                "createdAt": repo.at(f"refs/pr/{number}").date,
            }
            for number in numbers
        ]
        return JSONResponse({"discussions": found, "count": len(found), "start": 0})

    @endpoint("POST", "/api/{repo}/(?P<group>branch|tag)/{revision}", write=True)
    def make_ref(self, call: Call, repo: Repo, group: str, revision: str) -> Response:
        """A branch is named in the path and starts elsewhere; a tag is named in the body and the path says where it points."""
        asked = call.json if call.body else {}
        ref = f"refs/heads/{revision}" if group == "branch" else f"refs/tags/{asked['tag']}"
        if ref in repo.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(revision if group == "tag" else asked.get("startingPoint", "main")).oid
        return JSONResponse({})

    # Serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, path = Request(scope, receive), scope["raw_path"].decode()
        fault = next((f for f in self.once if f[0] == request.method and re.search(f[1], path)), None)
        if fault and fault[2] in (CUT, HOLD):
            self.once.remove(fault)
            await receive()  # the first part of what is sent has come
            if fault[2] == CUT:
                receive.__self__.transport.abort()  # type: ignore[attr-defined]
                return
            self.holding.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await self._answer(request, path, await request.body())(scope, receive, send)

    def _answer(self, request: Request, path: str, body: bytes) -> Response:
        sent = request.headers.get("authorization")
        self.requests.append(Seen(request.method, request.headers.get("host", ""), path, sent))
        try:
            for fault in (*self.once, *self.faults):
                method, where, status, *told = fault
                if method == request.method and re.search(where, path):
                    if fault in self.once:
                        self.once.remove(fault)
                    raise Refused(status, *(told or ["A fault that the test asked for"]))
            token = self.tokens.get((sent or "").removeprefix("Bearer "))
            if sent and (token is None or not token.is_valid):
                raise Refused(401, "Invalid credentials in Authorization header")
            call = Call(request.method, request.headers, request.query_params, body, token)
            for methods, pattern, handler, write in ENDPOINTS:
                if request.method in methods and (match := pattern.fullmatch(path)):
                    values: dict[str, Any] = {
                        name: value and unquote(value) for name, value in match.groupdict().items()
                    }
                    if "owner" in values:
                        kind, repo_id = values.pop("kind") or "models", f"{values.pop('owner')}/{values.pop('name')}"
                        values["repo"] = self._lookup(call, kind, repo_id, write=write)
                    return handler(self, call, **values)
            raise Refused(404, f"Nothing is served at {path}")
        except Refused as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            return JSONResponse({"error": error.message}, error.status, {**headers, **error.headers})


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def _at(commit: Commit) -> dict[str, str]:
    return {"X-Repo-Commit": commit.oid}


def _commit_json(commit: Commit) -> dict[str, Any]:
    title, author = {"title": commit.title, "message": commit.description}, [{"user": commit.author}]
    return {"id": commit.oid, **title, "authors": author, "date": commit.date}


def _entry(commit: Commit, path: str) -> dict[str, Any]:
    if path in commit.files:
        return commit.files[path].to_json(path)
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _sibling(path: str, file: File, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    return {"rfilename": path, "size": file.size, "blobId": file.oid, **lfs}


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Serves on a free port of 127.0.0.1 until the block ends or `stop()`; contents lie below the folder."""
    with serving(lambda port: Hub(folder, port)) as (served, stop):
        served.stop = stop
        yield served
