"""Whose a token is, where it may write, and what a repository may be called."""

import os
import re
from dataclasses import dataclass

from qlora_core.errors import HubError
from qlora_core.hub.faults import SIGN_IN, hub_errors

NAME_CHARACTERS = 96  # of owner and name together, as huggingface_hub checks


@dataclass(frozen=True)
class Account:
    """Whose the token is; `organizations` are those in which that person may write."""

    name: str
    organizations: tuple[str, ...]
    may_write: bool

    def writes_to(self, owner: str) -> bool:
        return owner.casefold() in {name.casefold() for name in (self.name, *self.organizations)}


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
    role = (told.get("auth", {}).get("accessToken") or {}).get("role")
    # Where no role is told (tokens of a signed-in person), the Hub itself refuses what is not allowed.
    writable = ("admin", "write", "contributor", None)
    names = tuple(org["name"] for org in told.get("orgs", []) if org.get("roleInOrg") in writable)
    return Account(told["name"], names, role != "read")


def full_name(repo_id: str, who: Account) -> str:
    """`owner/name`, with the person's own name where none is given. Raises HubError with all that is wrong with it."""
    owner, _, name = repo_id.strip().rpartition("/") if "/" in repo_id else (who.name, "", repo_id.strip())
    whole, problems = f"{owner}/{name}", []
    if "/" in owner:
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
    if not problems and not who.writes_to(owner):
        names = ", ".join((who.name, *who.organizations))
        problems.append(f"belongs to {owner!r}, where {who.name} may not write; you may write to: {names}")
    if problems:
        raise HubError(*(f"repository name {repo_id!r}: {problem}" for problem in problems))
    return whole
