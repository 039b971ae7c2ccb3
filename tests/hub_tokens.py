"""Whose a token of the Hub for tests is and what it may: of an account, fine-grained, or of a person who signed in to an app."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

WRITERS = ("admin", "write", "contributor")
READ, WRITE, FINE_GRAINED, OAUTH = "read", "write", "fineGrained", "oauth"


class Owned(Protocol):
    """What rights are asked about: a repository."""

    kind: str
    id: str
    by_app: bool

    @property
    def owner(self) -> str: ...


@dataclass(frozen=True)
class Token:
    """`scoped` is of a fine-grained one: "user:alice", "org:acme" or "model:alice/x" -> permissions. `scopes` and `granted`,
    the organizations that the person let the app into, are of one from a sign-in, which the app's repositories are open to."""

    user: str
    role: str
    organizations: Mapping[str, str]  # those of the user -> role there
    scoped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scopes: frozenset[str] = frozenset()
    granted: frozenset[str] = frozenset()
    expires: float | None = None

    @property
    def is_valid(self) -> bool:
        return self.expires is None or self.expires > time.time()

    def writes(self, owner: str, repo: Owned | None = None) -> bool:
        """Into that repository, or, without one, whether it may make one there."""
        if not self._writes_as_a_person(owner):
            return False
        if self.role == FINE_GRAINED:
            kinds = [f"{repo.kind.removesuffix('s')}:{repo.id}"] if repo else []
            return any("repo.write" in self.scoped.get(name, ()) for name in (f"user:{owner}", f"org:{owner}", *kinds))
        if self.role == OAUTH:
            if owner != self.user and owner not in self.granted:
                return False
            if repo is None:
                return bool(self.scopes & {"contribute-repos", "manage-repos"})
            return bool(self.scopes & {"write-repos", "manage-repos"}) or self._made(repo)
        return self.role == WRITE

    def reads(self, owner: str, repo: Owned | None = None) -> bool:
        """What is private there."""
        if self.role == OAUTH and repo is not None and not self._made(repo):
            mine = owner == self.user or owner in self.granted
            return mine and bool(self.scopes & {"read-repos", "write-repos", "manage-repos"})
        return owner == self.user or owner in self.organizations

    def _made(self, repo: Owned) -> bool:
        return repo.by_app and "contribute-repos" in self.scopes

    def _writes_as_a_person(self, owner: str) -> bool:
        return owner == self.user or self.organizations.get(owner) in WRITERS

    def to_json(self) -> dict[str, Any]:
        """As whoami-v2 tells it."""
        names = {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "isPro": False}
        shown = self.granted if self.role == OAUTH else self.organizations
        orgs = [{"type": "org", "name": n, "roleInOrg": role} for n, role in self.organizations.items() if n in shown]
        if self.role == OAUTH:
            auth: dict[str, Any] = {"type": "oauth"}
        else:
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
        if self.role == FINE_GRAINED:
            entities = [(name.split(":", 1), permissions) for name, permissions in self.scoped.items()]
            scoped = [
                {"entity": {"type": kind, "name": name}, "permissions": list(found)} for (kind, name), found in entities
            ]
            auth["accessToken"]["fineGrained"] = {"global": [], "canReadGatedRepos": False, "scoped": scoped}
        if self.expires is not None:
            auth["expiresAt"] = datetime.fromtimestamp(self.expires, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return names | {"avatarUrl": "", "orgs": orgs, "auth": auth}
