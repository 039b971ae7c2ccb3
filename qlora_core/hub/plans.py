"""What a push would change in a model repository, before it does; and why it may not. Sends nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.faults import SIGN_IN, hub_errors
from qlora_core.hub.files import Content, git_oid, sha256
from qlora_core.hub.releases import RECORD, Release, next_version, read_release, tags

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What the Hub itself puts into a new repository.
HUBS_OWN = (".gitattributes",)
LISTED = 8


@dataclass(frozen=True)
class PushPlan:
    """What a push does to a repository, by path. `foreign`: those of `changes` and `removes` that no push from here has put
    there as they are. `parent` is the commit that all this was compared with; None where the repository is made first."""

    repo_id: str
    revision: str
    creates: bool
    private: bool
    parent: str | None
    version: str
    replaces: str | None
    adds: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def changes_anything(self) -> bool:
        """Whether there is something to push besides the record of the push itself."""
        return self.creates or any(name != RECORD for name in (*self.adds, *self.changes, *self.removes))

    @property
    def digest(self) -> str:
        """Names what is shown: who agrees to it agrees to this and to nothing else."""
        told = (
            self.repo_id,
            self.revision,
            self.creates,
            self.private,
            self.version,
            self.adds,
            self.changes,
            self.removes,
        )
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def sentences(self) -> list[str]:
        where = f"{self.repo_id}" + ("" if self.revision == "main" else f", revision {self.revision}")
        if self.creates:
            return [f"{where}: is made, {'private' if self.private else 'public'}, with {len(self.adds)} files"]
        if not self.changes_anything:
            return [f"{where}: holds exactly these files already, as {self.replaces}"]
        found = [f"{where}: becomes {self.version}" + (f" in place of {self.replaces}" if self.replaces else "")]
        for what in ("adds", "changes", "removes", "keeps"):
            if names := getattr(self, what):
                more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
                found.append(f"  {what} {', '.join(names[:LISTED])}{more}")
        return found


@dataclass(frozen=True)
class Remote:
    """A repository as it is: `files` by path -> SHA-256 of what is in LFS, git's blob hash of the rest."""

    head: str | None
    files: Mapping[str, str]
    tags: Mapping[str, str]
    release: Release | None


def plan(
    api: "HfApi",
    repo_id: str,
    files: Mapping[str, Content],
    release: Release,
    *,
    token: str,
    private: bool,
    revision: str,
    pull_request: bool = False,
) -> tuple[PushPlan, Remote]:
    """Looks at all that can be known beforehand: the token, its rights, the name, the repository. Raises HubError."""
    repo_id = writable_name(api, repo_id, token)
    with hub_errors(f"model {repo_id!r}", token):
        remote = look(api, repo_id, revision, private=private, pull_request=pull_request)
    if remote is None:
        _refuse_other_types(api, repo_id, token)
        if pull_request:
            raise HubError(
                f"model {repo_id!r}: is not there yet, so there is nothing to make a pull request to; push to it"
            )
        version = release.version or "v1"
        made = PushPlan(repo_id, revision, True, private, None, version, None, adds=(*sorted(files), RECORD))
        return made, Remote(None, {}, {}, None)
    return _compared(repo_id, files, release, remote, private=private, revision=revision), remote


def writable_name(api: "HfApi", repo_id: str, token: str) -> str:
    who = account(token, endpoint=api.endpoint)
    for prefix in ("datasets/", "spaces/"):
        if repo_id.strip().startswith(prefix):
            raise HubError(
                f"repository name {repo_id!r}: is that of a {prefix[:-2]}; a model needs a repository of its own"
            )
    found = full_name(repo_id, who)
    if not who.may_write:
        raise HubError(
            f"model {found!r}: the token of {who.name} may only read; make one that may write, then {SIGN_IN}"
        )
    return found


def look(
    api: "HfApi", repo_id: str, revision: str, *, private: bool = False, pull_request: bool = False
) -> Remote | None:
    """None where there is no such repository. A revision that is not there starts from the main branch."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if private and info.private is False:
        raise HubError(
            f"model {repo_id!r}: is there already and is public, so what is pushed would be too; choose another name, make it "
            "private on its settings page, or push it as public"
        )
    known = tags(api, repo_id)
    if revision in known:
        raise HubError(f"model {repo_id!r}: its revision {revision!r} is a tag, which stays as it is; name a branch")
    try:
        head = api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        head = info.sha
    entries = [e for e in api.list_repo_tree(repo_id, recursive=True, revision=head) if isinstance(e, RepoFile)]
    files = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}
    return Remote(head, files, known, read_release(api, repo_id, head) if RECORD in files else None)


def _compared(
    repo_id: str, files: Mapping[str, Content], release: Release, remote: Remote, *, private: bool, revision: str
) -> PushPlan:
    before = remote.release
    _refuse_other_kind(repo_id, release, remote)
    same = {name for name, content in files.items() if remote.files.get(name) in (sha256(content), git_oid(content))}
    recorded = before.files if before else {}
    removes = tuple(sorted(name for name in recorded if name in remote.files and name not in files))
    adds = tuple(sorted(name for name in files if name not in remote.files))
    changes = tuple(sorted(name for name in files if name in remote.files and name not in same))
    keeps = tuple(sorted(n for n in remote.files if n not in {*changes, *removes, RECORD, *HUBS_OWN}))
    # Recorded are both hashes, so that either way of storing tells what was changed there by hand.
    foreign = tuple(n for n in (*changes, *removes) if remote.files[n] not in recorded.get(n, ()))
    replaces = before.version if before else None
    anything = bool(adds or changes or removes) or before is None
    # That of the last record too: of a merged pull request, or where the tag could not be made, no tag tells of it.
    known = {*remote.tags, *([before.version] if before else [])}
    version = release.version or (next_version(known) if anything else before.version)
    if anything and version in known:
        raise HubError(
            f"model {repo_id!r}: has a version {version!r} already; name another, or none for the next number"
        )
    record = (RECORD,) if anything else ()
    adds, changes = (adds, (*changes, *record)) if RECORD in remote.files else ((*adds, *record), changes)
    return PushPlan(
        repo_id, revision, False, private, remote.head, version, replaces, adds, changes, removes, keeps, foreign
    )


def _refuse_other_types(api: "HfApi", repo_id: str, token: str) -> None:
    """The Hub would allow it, and whoever looks for the model would find the other first."""
    for kind in ("dataset", "space"):
        with hub_errors(f"{kind} {repo_id!r}", token):
            if api.repo_exists(repo_id, repo_type=kind):
                raise HubError(f"model {repo_id!r}: there is a {kind} of this name; choose another name for the model")


def _refuse_other_kind(repo_id: str, release: Release, remote: Remote) -> None:
    """transformers loads an adapter that lies beside a model in place of it."""
    held = remote.release.what if remote.release else _kind(remote.files)
    if held is not None and held != release.what:
        raise HubError(
            f"model {repo_id!r}: holds {_named(held)}, so {_named(release.what)} cannot be put into it; choose another name"
        )


def _kind(files: Mapping[str, Any]) -> str | None:
    if "adapter_config.json" in files:
        return "adapter"
    return "merged" if "config.json" in files else None


def _named(what: str) -> str:
    return "an adapter" if what == "adapter" else "a whole model"
