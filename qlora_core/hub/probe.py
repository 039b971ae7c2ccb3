"""Asks the Hub, before a training and before a push, whether that push can be made; everything that is in its way at once.

Sends nothing and imports no torch. What the Hub does not tell beforehand is said to be unknown.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Literal

from qlora_core.errors import HubError
from qlora_core.hub import scopes
from qlora_core.hub.access import FINE_GRAINED, KINDS, OAUTH, Account, account, full_name
from qlora_core.hub.faults import TOKENS_PAGE, hub_errors
from qlora_core.hub.files import RepoType
from qlora_core.hub.repos import STAYS_PRIVATE, public_already
from qlora_core.hub.scopes import COLLECTS, COLLECTS_PERMISSION, DISCUSSES
from qlora_core.wording import size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Also = Literal["pull request", "collection"]
SPACE_UNKNOWN = (
    "how much space is left there is not known before the push; what does not fit is refused and publishes nothing"
)
LISTED = 1000  # repositories whose sizes are added up


@dataclass(frozen=True)
class Probe:
    """What the Hub told. `account` is None where it does not know the token, `scopes` where they were not told. Of the
    repository, None is unknown; `private` is of one that is there. `problems` are in the way, `notes` only good to know."""

    account: Account | None
    scopes: tuple[str, ...] | None = None
    repo_id: str | None = None
    exists: bool | None = None
    private: bool | None = None
    may_write: bool | None = None
    space: str = SPACE_UNKNOWN
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def name(self) -> str | None:
        return self.account.name if self.account else None

    @property
    def kind(self) -> str | None:
        """Of the token: "read", "write", "fine-grained" or "sign-in"."""
        return self.account.kind if self.account else None

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Where it may make repositories, or write into those that are there: the account's own name first."""
        return (
            self.account.namespaces
            if self.account and scopes.has(self.scopes, (*scopes.WRITES, *scopes.CREATES))
            else ()
        )

    @property
    def writable(self) -> tuple[str, ...]:
        """The namespaces, and the single repositories that a fine-grained token was let into."""
        return (*self.namespaces, *(self.account.repositories if self.account else ()))

    @property
    def expires(self) -> float | None:
        return self.account.expires if self.account else None

    def sentences(self) -> list[str]:
        """All of it in words, what is in the way last."""
        if self.account is None:
            return list(self.problems)
        given = f", with the scopes {', '.join(self.scopes)}" if self.scopes is not None else ""
        until = f", until {datetime.fromtimestamp(self.expires):%d %b %H:%M}" if self.expires else ""
        found = [f"{_token(self.account)}{given}{until}; it may write to: {', '.join(self.writable) or 'nothing'}"]
        if self.repo_id and self.exists is not None:
            state = "is not there yet" if not self.exists else "is there, " + ("private" if self.private else "public")
            found.append(f"{self.repo_id}: {state}; {self.space}")
        return [*found, *self.notes, *self.problems]


def probe(
    token: str,
    repo_id: str | None = None,
    *,
    kind: RepoType = "model",
    private: bool = True,
    also: Collection[Also] = (),
    scope: str | None = None,
    endpoint: str | None = None,
) -> Probe:
    """Of a push to `repo_id`, as a pull request or with a collection if `also` says so; without `repo_id`, of the token alone.

    `scope` is what the sign-in was given, as gr.OAuthToken holds it: the Hub tells it to nobody else. Raises nothing that has
    to do with the Hub: a token that it does not know, or a Hub that cannot be reached, is a problem of the result.
    """
    try:
        who = account(token, endpoint=endpoint)
    except HubError as error:
        return Probe(None, problems=error.problems)
    given = tuple(scope.split()) if scope and who.kind == OAUTH else None
    look = _Look(who, token, given, kind, private, tuple(also), endpoint)
    return look.at(repo_id) if repo_id is not None else look.found()


@dataclass
class _Look:
    """One look, while its findings come together."""

    who: Account
    token: str = field(repr=False)
    scopes: tuple[str, ...] | None
    kind: RepoType
    private: bool
    also: tuple[Also, ...]
    endpoint: str | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def found(self, **known: object) -> Probe:
        """Everything so far, with what is known of the token alone."""
        problems = [*([] if self.who.may_write else [self.who.read_only()]), *self.problems]
        if not scopes.has(self.scopes, (*scopes.WRITES, *scopes.CREATES)):
            problems.insert(0, f"{_token(self.who)}: may only read; {scopes.ask_for(scopes.CREATES, self.who.name)}")
        if "collection" in self.also and (missing := self._missing(COLLECTS, COLLECTS_PERMISSION)):
            problems.append(f"a collection: {missing}")
        return Probe(self.who, self.scopes, problems=tuple(problems), notes=tuple(self.notes), **known)  # type: ignore[arg-type]

    def at(self, repo_id: str) -> Probe:
        try:
            name = full_name(repo_id, self.who)
        except HubError as error:
            self.problems += error.problems
            return self.found()
        what = f"{self.kind} {name!r}"
        try:
            with hub_errors(what, self.token):
                exists, private = self._existing(name)
                may_write = self._there(what, name, private) if exists else self._new(what, name)
        except HubError as error:
            self.problems += error.problems
            return self.found(repo_id=name)
        space = self._space(name.partition("/")[0]) if may_write is not False else SPACE_UNKNOWN
        return self.found(repo_id=name, exists=exists, private=private, may_write=may_write, space=space)

    def _existing(self, name: str) -> tuple[bool, bool | None]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return True, bool(self.api.repo_info(name, repo_type=self.kind).private)
        except RepositoryNotFoundError:
            return False, None

    def _there(self, what: str, name: str, private: bool | None) -> bool | None:
        """Whether this token may write there; None where the Hub does not tell."""
        if self.private and private is False:
            self.problems.append(public_already(what))
        if private and not self.private:
            self.notes.append(f"{what}: {STAYS_PRIVATE}")
        if "pull request" in self.also:
            missing = self._missing(DISCUSSES, "discussion.write")
            if missing:
                self.problems.append(f"{what}: a pull request to it: {missing}")
            return not missing and self.who.may_write
        allowed = self._allowed(name)
        if allowed is None:
            self.notes.append(f"{what}: the Hub does not tell whether this token may write there; the push will")
        elif not allowed and self.who.may_write:
            self.problems.append(f"{what}: is there already, and {self._why_not()}")
        return allowed

    def _allowed(self, name: str) -> bool | None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.auth_check(name, repo_type=self.kind, write=True)
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in (403, 404):
                raise
            # 404: a Hub of one's own that does not have this question.
            return False if status == 403 else None
        return True

    def _why_not(self) -> str:
        if self.who.kind == OAUTH:
            reach = "this sign-in reaches only repositories that this app has made"
            return f"{reach}; choose another name, or {scopes.ask_for(scopes.WRITES, self.who.name)}"
        if self.who.kind == FINE_GRAINED:
            return (
                f"this token may not write there; choose another name, or give it write access to it on {TOKENS_PAGE}"
            )
        return f"{self.who.name} may not write there; choose another name, or ask its owner for write access"

    def _new(self, what: str, name: str) -> bool:
        """Whether this token may make it."""
        before = len(self.problems)
        if "pull request" in self.also:
            self.problems.append(f"{what}: is not there yet, so there is nothing to make a pull request to; push to it")
        for other in (kind for kind in KINDS if kind != self.kind):
            if self.api.repo_exists(name, repo_type=other):
                self.problems.append(
                    f"{what}: there is a {other} of this name; choose another name for the {self.kind}"
                )
        creates = scopes.has(self.scopes, scopes.CREATES)
        if not creates and scopes.has(self.scopes, scopes.WRITES):
            self.problems.append(
                f"{what}: is not there, and may not be made; {scopes.ask_for(scopes.CREATES, self.who.name)}"
            )
        if name in self.who.repositories and not self.who.writes_to(name.partition("/")[0]):
            self.problems.append(
                f"{what}: is not there, and this token may write into it but not make it; make it on the Hub first"
            )
        if not scopes.has(self.scopes, scopes.READS_PRIVATE):
            self.notes.append(
                f"{what}: is not there as far as this sign-in can see; a private one that another app or you have made would "
                "refuse the push, which then needs another name or the scope write-repos"
            )
        return self.who.may_write and creates and len(self.problems) == before

    def _missing(self, wanted: str, permission: str) -> str:
        """What the token lacks for discussions or collections; empty where it lacks nothing, or that is not told."""
        if self.who.kind == OAUTH:
            lacks = not scopes.has(self.scopes, (wanted,))
            return f"this sign-in may not do that; {scopes.ask_for((wanted,), self.who.name)}" if lacks else ""
        lacks = self.who.lacks(permission)
        return f"this token may not do that; give it the permission {permission} on {TOKENS_PAGE}" if lacks else ""

    def _space(self, owner: str) -> str:
        """The Hub tells what is used, to tokens that may know, and nowhere how much is allowed."""
        if not self.private:
            return SPACE_UNKNOWN
        namespace = None if owner.casefold() == self.who.name.casefold() else owner
        try:
            with hub_errors("space", self.token):
                found = list(islice(self.api.list_user_repos(namespace), LISTED + 1))
        except (HubError, LookupError):
            return SPACE_UNKNOWN
        used = [repo.storage for repo in found if repo.visibility == "private"]
        least = "at least " if len(found) > LISTED else ""
        return f"{owner} uses {least}{size(sum(used))} in private repositories; {SPACE_UNKNOWN}"


def _token(who: Account) -> str:
    return f"the sign-in of {who.name}" if who.kind == OAUTH else f"the {who.kind} token of {who.name}"
