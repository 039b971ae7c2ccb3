"""What a Hub for tests holds: users, tokens, repositories with their history, contents by hash. Knows no protocol."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub_tokens import FINE_GRAINED, OAUTH, Token

# What the .gitattributes of a new repository lists, in short; files above the size are LFS too.
LFS_SUFFIXES = (".parquet", ".arrow", ".safetensors", ".bin", ".gguf", ".zip", ".gz", ".png", ".wav")
LFS_BYTES = 5_000_000


class Refused(Exception):
    """Ends a request with this status; `code` is the Hub's X-Error-Code, by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class File:
    """`oid` is git's blob hash: of the content, or of the pointer to it in LFS."""

    size: int
    sha256: str
    oid: str
    lfs: bool

    def to_json(self, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        return values | {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else values


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, File]

    def folders(self) -> set[str]:
        return {str(parent) for path in self.files for parent in Path(path).parents} - {"."}


@dataclass
class Repo:
    kind: str  # "models" | "datasets" | "spaces", as in paths
    id: str
    private: bool
    gated: bool
    granted: set[str] = field(default_factory=set)  # names that a gated repository lets in
    commits: list[Commit] = field(default_factory=list)  # all of them, of every branch, in order
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main -> oid
    by_app: bool = False  # made with a token from a sign-in

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.at("main")

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref or (the start of) a hash."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        found = [commit for commit in self.commits if len(oid) >= 7 and commit.oid.startswith(oid)]
        if not found:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def history(self, revision: str) -> list[Commit]:
        by_oid, found = {commit.oid: commit for commit in self.commits}, [self.at(revision)]
        while parent := found[-1].parent:
            found.append(by_oid[parent])
        return found


class State:
    """What a test fills and reads; the endpoints in `hub_server` do the same for clients."""

    def __init__(self, folder: Path) -> None:
        self.objects = folder / "objects"  # contents by SHA-256
        self.objects.mkdir(parents=True, exist_ok=True)
        self.parts: dict[tuple[str, int], bytes] = {}  # of uploads in parts, until they are complete
        self.part_bytes: int | None = None  # larger uploads come in parts of that size
        self.private_space_bytes: int | None = None  # more than that is refused in private repositories
        self.users: dict[str, Mapping[str, str]] = {}  # name -> organizations and the role there
        self.tokens: dict[str, Token] = {}
        self.repos: dict[tuple[str, str], Repo] = {}

    def add_user(self, name: str, *, organizations: Mapping[str, str] | None = None) -> None:
        self.users[name] = organizations or {}

    def add_token(self, user: str, role: str = "write", *, text: str = "") -> str:
        text = text or f"hf_{role}{len(self.tokens)}{user}"
        self.tokens[text] = Token(user, role, self.users[user])
        return text

    def add_fine_grained_token(self, user: str, scoped: Mapping[str, Sequence[str]], *, text: str) -> str:
        """`scoped` as in Token: "org:acme" -> ["repo.write"]."""
        self.tokens[text] = Token(user, FINE_GRAINED, self.users[user], scoped=scoped)
        return text

    def add_oauth_token(
        self, user: str, scopes: str, *, granted: Sequence[str] = (), expires: float | None = None, text: str
    ) -> str:
        """What a sign-in gives to an app: scopes as in "openid profile contribute-repos"."""
        into = frozenset(granted)
        self.tokens[text] = Token(
            user, OAUTH, self.users[user], scopes=frozenset(scopes.split()), granted=into, expires=expires
        )
        return text

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        kind: str = "datasets",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, gated)
        self.commit(repo, {".gitattributes": "*.parquet filter=lfs\n"}, title="initial commit")
        if files:
            self.commit(repo, files, title="Add files")
        return repo

    def commit(
        self, repo: Repo, changes: Mapping[str, bytes | str | None], *, title: str = "Change", branch: str = "main"
    ) -> Commit:
        """Contents by path; None deletes."""
        files = {path: self.store(path, content) for path, content in changes.items() if content is not None}
        gone = {path for path, content in changes.items() if content is None}
        return self.add_commit(repo, f"refs/heads/{branch}", files, gone, title=title, author=repo.owner)

    def repo(self, repo_id: str, kind: str = "datasets") -> Repo:
        return self.repos[kind, repo_id]

    def read(self, repo: Repo, path: str, revision: str = "main") -> bytes:
        return self.content(repo.at(revision).files[path])

    def store(self, path: str, content: bytes | str) -> File:
        content = content.encode() if isinstance(content, str) else content
        sha256 = hashlib.sha256(content).hexdigest()
        (self.objects / sha256).write_bytes(content)
        return self.file_of(path, sha256, len(content))

    def file_of(self, path: str, sha256: str, size: int, *, lfs: bool | None = None) -> File:
        lfs = is_lfs(path, size) if lfs is None else lfs
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        content = pointer if lfs else (self.objects / sha256).read_bytes()
        return File(size, sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), lfs)

    def keep(self, sha256: str, content: bytes) -> None:
        """An upload in one piece; only what is what it claims to be is kept."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, "The content does not match its hash")
        (self.objects / sha256).write_bytes(content)

    def content(self, file: File) -> bytes:
        return (self.objects / file.sha256).read_bytes()

    def add_commit(
        self,
        repo: Repo,
        ref: str,
        files: Mapping[str, File],
        gone: set[str],
        *,
        title: str,
        author: str,
        text: str = "",
    ) -> Commit:
        parent = repo.at(ref) if ref in repo.refs else repo.head if repo.commits else None
        kept = {path: file for path, file in (parent.files if parent else {}).items() if path not in gone}
        oid = hashlib.sha1(f"{repo.kind} {repo.id} {ref} {len(repo.commits)} {title}".encode()).hexdigest()
        commit = Commit(oid, parent and parent.oid, title, text, author, _now(), {**kept, **files})
        repo.commits.append(commit)
        repo.refs[ref] = oid
        return commit


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES
