"""Whose a token is, where it may write, and what a repository may be called."""

import os
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_core.errors import HubError
from qlora_core.hub import scopes
from qlora_core.hub.faults import SIGN_IN, TOKENS_PAGE, hub_errors

NAME_CHARACTERS = 96  # of owner and name together, as huggingface_hub checks
WRITERS = ("admin", "write", "contributor")  # roles in an organization
KINDS = ("model", "dataset", "space")


READ, WRITE, FINE_GRAINED, OAUTH = "read", "write", "fine-grained", "sign-in"


@dataclass(frozen=True)
class Account:
    """Whose the token is, and what it may do; `organizations` are those in which it may write, `repositories` single ones of
    a fine-grained token. `permissions` are such a token's own, as "org:acme repo.write"; `expires` is a time stamp, if told."""

    name: str
    organizations: tuple[str, ...]
    may_write: bool
    kind: str = WRITE
    writes_own: bool = True
    repositories: tuple[str, ...] = ()
    permissions: tuple[str, ...] = ()
    expires: float | None = None

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Where it may make repositories: the account's own name first."""
        return (*((self.name,) if self.writes_own else ()), *self.organizations) if self.may_write else ()

    def writes_to(self, owner: str) -> bool:
        own = (self.name,) if self.writes_own else ()
        return owner.casefold() in {name.casefold() for name in (*own, *self.organizations)}

    def lacks(self, permission: str) -> bool:
        """Of a fine-grained token that tells its permissions; of another it is not known."""
        return bool(self.permissions) and not any(told.endswith(f" {permission}") for told in self.permissions)

    def read_only(self) -> str:
        """Of a token that may not write: that, and what to do."""
        if self.kind == FINE_GRAINED:
            return (
                f"the token of {self.name} may write nowhere; give it write access to your repositories, or to those of an "
                f"organization, on {TOKENS_PAGE}"
            )
        return f"the token of {self.name} may only read; make one that may write, then {SIGN_IN}"


def machine_token() -> str | None:
    """HF_TOKEN, or that of `hf auth login`; None on a Space, where every visitor would act as its owner."""
    from huggingface_hub import get_token

    return None if os.environ.get("SPACE_ID") else get_token()


def account(token: str, *, endpoint: str | None = None) -> Account:
    """Ask the Hub whose the token is. Raises HubError where it does not know it."""
    from huggingface_hub import HfApi

    if not token:
        raise HubError(f"no token of the Hub is there; {SIGN_IN}")
    with hub_errors("account", token):
        told = HfApi(endpoint=endpoint, token=token).whoami()
    try:
        return _account(told, token)
    except (LookupError, TypeError, AttributeError):
        raise HubError("account: what answered is no Hub; correct HF_ENDPOINT, or look at the proxy between") from None


def _account(told: dict[str, Any], token: str) -> Account:
    auth = told.get("auth") or {}
    access = auth.get("accessToken") or {}
    role, name = access.get("role"), told["name"]
    # Where no role is told (a sign-in's may not be), the Hub itself refuses what is not allowed.
    member = tuple(org["name"] for org in told.get("orgs") or [] if org.get("roleInOrg") in (*WRITERS, None))
    expires = _time(auth.get("expiresAt") or access.get("expiration"))
    if role == "fineGrained" and (entries := (access.get("fineGrained") or {}).get("scoped")) is not None:
        return _fine_grained(name, member, entries, expires)
    of_a_person = not access or token.startswith(scopes.PREFIX)
    kind = OAUTH if of_a_person else READ if role == "read" else FINE_GRAINED if role == "fineGrained" else WRITE
    return Account(name, member, role != "read", kind, expires=expires)


def _fine_grained(name: str, member: tuple[str, ...], entries: list[Any], expires: float | None) -> Account:
    named = [(entry["entity"].get("type"), entry["entity"].get("name"), entry["permissions"]) for entry in entries]
    writable = [(kind, entity) for kind, entity, permissions in named if "repo.write" in permissions]
    organizations = tuple(entity for kind, entity in writable if kind == "org" and entity in member)
    own = any(kind == "user" and entity in (name, None) for kind, entity in writable)
    single = tuple(entity for kind, entity in writable if kind in ("model", "dataset", "space") and entity)
    permissions = tuple(f"{kind}:{entity or name} {p}" for kind, entity, found in named for p in found)
    may_write = own or bool(organizations or single)
    return Account(name, organizations, may_write, FINE_GRAINED, own, single, permissions, expires)


def _time(told: Any) -> float | None:
    try:
        return datetime.fromisoformat(told).timestamp() if isinstance(told, str) else None
    except ValueError:
        return None


def full_name(repo_id: str, who: Account) -> str:
    """`owner/name`, with the person's own name where none is given. Raises HubError with all that is wrong with it."""
    owner, _, name = repo_id.strip().rpartition("/") if "/" in repo_id else (who.name, "", repo_id.strip())
    whole, problems = f"{owner}/{name}", []
    if owner in (prefixes := [f"{kind}s" for kind in KINDS]) or owner.partition("/")[0] in prefixes:
        problems.append(f"starts with the kind, {owner.partition('/')[0]!r}; write 'name' or 'owner/name' without it")
    elif "/" in owner:
        problems.append("has more than one slash; write 'name' or 'owner/name'")
    elif not name or not owner:
        problems.append(f"is not complete; write 'name' or 'owner/name', as in '{who.name}/my-dataset'")
    if strange := sorted(set(re.findall(r"[^\w./-]|[^\x00-\x7f]", whole))):
        shown = " ".join("a space" if character.isspace() else repr(character) for character in strange)
        problems.append(f"holds {shown}; use letters a to z, digits, '-', '_' and '.'")
    if found := [pair for pair in ("..", "--") if pair in whole]:
        problems.append(f"holds {' and '.join(map(repr, found))}, which the Hub does not allow; use one '-' or '.'")
    if any(part != part.strip(".-") for part in (owner, name)):
        problems.append("starts or ends with '-' or '.'; start and end with a letter or a digit")
    if name.endswith(".git"):
        problems.append("ends with '.git', which the Hub does not allow; leave it out")
    if len(whole) > NAME_CHARACTERS:
        problems.append(f"is {len(whole)} characters long with its owner; the Hub allows {NAME_CHARACTERS}")
    if not problems and who.may_write and not who.writes_to(owner) and whole not in who.repositories:
        names = ", ".join((*who.namespaces, *who.repositories))
        problems.append(
            f"belongs to {owner!r}, where {_as(who)} may not write; you may write to: {names}{_grant(who, owner)}"
        )
    if problems:
        raise HubError(*(f"repository name {repo_id!r}: {problem}" for problem in problems))
    return whole


def _as(who: Account) -> str:
    return f"this token of {who.name}" if who.kind == FINE_GRAINED else who.name


def _grant(who: Account, owner: str) -> str:
    """What a member of the organization can do, where the token and not the membership may be what is missing."""
    if who.kind == OAUTH:
        return f"; if {owner!r} is an organization of yours, sign out and in again and grant it to this app, or type a token"
    if who.kind == FINE_GRAINED:
        return f"; or give this token write access to the repositories of {owner!r} on {TOKENS_PAGE}"
    return ""
