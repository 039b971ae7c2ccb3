"""What a push would change in a repository, before it does; and why it may not. Sends nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import KINDS
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import Content, RepoType, git_oid, sha256
from qlora_core.hub.releases import FORCE, RECORD, Release, free_version, gate, next_version
from qlora_core.hub.repos import HUBS_OWN, STAYS_PRIVATE, Remote, look, read_release, writable_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LISTED = 8
IN_WORDS = {
    "adapter": "an adapter", "merged": "a whole model", "dataset": "a dataset", "report": "a report of a study"
}  # fmt: skip


@dataclass(frozen=True)
class PushPlan:
    """What a push does to a repository, by path. `foreign`: those of `changes` and `removes` that no push from here has put
    there as they are. `parent` is the commit that all this was compared with; None where the repository is made first.

    `content`: a hash of what is sent and of what it replaces. `refusals` stand against it unless it is forced, `doubts` are to be
    known; `stays_private` where it was to be public."""

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
    content: str = ""
    refusals: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    stays_private: bool = False
    pull_request: bool = False

    @property
    def changes_anything(self) -> bool:
        """Whether there is something to push besides the record of the push itself, which must change where its version does."""
        named = any(name != RECORD for name in (*self.adds, *self.changes, *self.removes))
        return self.creates or named or self.version != self.replaces

    @property
    def touches_others(self) -> bool:
        """Whether something is there already. A first push that failed leaves a repository with nothing in it."""
        return self.changes_anything and bool(self.changes or self.removes or self.keeps)

    @property
    def digest(self) -> str:
        """Names what is shown: who agrees to it agrees to this and to nothing else."""
        told = (
            self.repo_id, self.revision, self.creates, self.private, self.version, self.adds, self.changes, self.removes,
            self.content, self.refusals, self.doubts,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    @property
    def refused(self) -> tuple[str, ...]:
        """The refusals, each with its remedy."""
        return tuple(f"{why}; force it ({FORCE}), or choose another repository" for why in self.refusals)

    def sentences(self) -> list[str]:
        where = f"{self.repo_id}" + ("" if self.revision == "main" else f", revision {self.revision}")
        if self.creates:
            who = "private" if self.private else "public, for everybody to see"
            return [f"{where}: is to be made, {who}, as {self.version}", f"  with {_listed(self.adds)}"]
        if not self.changes_anything:
            return [
                f"{where}: holds exactly these files already, as {self.replaces}",
                *([f"  {STAYS_PRIVATE}"] if self.stays_private else []),
            ]
        proposed = ", once its pull request is merged," if self.pull_request else ""
        instead = f" in place of {self.replaces}" if self.replaces else ""
        found = [f"{where}: becomes {self.version}{proposed}{instead}"]
        for what in ("adds", "changes", "removes", "keeps"):
            if names := getattr(self, what):
                found.append(f"  {what} {_listed(names)}")
        if self.stays_private:
            found.append(f"  {STAYS_PRIVATE}")
        return found


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def plan(
    api: "HfApi",
    repo_id: str,
    kind: RepoType,
    files: Mapping[str, Content],
    release: Release,
    *,
    token: str,
    private: bool,
    revision: str,
    pull_request: bool = False,
) -> tuple[PushPlan, Remote]:
    """Looks at all that can be known beforehand: the token, its rights, the name, the repository. Raises HubError."""
    repo_id = writable_name(api, repo_id, kind, token)
    with hub_errors(f"{kind} {repo_id!r}", token):
        remote = look(api, repo_id, kind, revision=revision, private=private)
    if remote is None:
        _refuse_other_types(api, repo_id, kind, release, token)
        if pull_request:
            raise HubError(
                f"{kind} {repo_id!r}: is not there yet, so there is nothing to make a pull request to; push to it"
            )
        version = release.version or "v1"
        names, content = (*sorted(files), RECORD), _content(files, {})
        made = PushPlan(repo_id, revision, True, private, None, version, None, adds=names, content=content)
        return made, Remote(None, {}, {}, None)
    _refuse_other_content(repo_id, kind, release, remote)
    found = _compared(repo_id, kind, files, release, remote, private=private, revision=revision)
    found = replace(found, pull_request=pull_request)
    if not found.changes_anything and _is_tag_of_another(api, repo_id, kind, remote):
        found = replace(found, version=next_version({*remote.tags, found.version}), changes=(RECORD,))
    return found, remote


def _compared(
    repo_id: str,
    kind: RepoType,
    files: Mapping[str, Content],
    release: Release,
    remote: Remote,
    *,
    private: bool,
    revision: str,
) -> PushPlan:
    before = remote.release
    same = {name for name, content in files.items() if remote.files.get(name) in (sha256(content), git_oid(content))}
    recorded = before.files if before else {}
    removes = tuple(sorted(name for name in recorded if name in remote.files and name not in files))
    adds = tuple(sorted(name for name in files if name not in remote.files))
    changes = tuple(sorted(name for name in files if name in remote.files and name not in same))
    keeps = tuple(sorted(n for n in remote.files if n not in {*changes, *removes, RECORD, *HUBS_OWN}))
    # Recorded are both hashes, so that either way of storing tells what was changed there by hand.
    foreign = tuple(n for n in (*changes, *removes) if remote.files[n] not in recorded.get(n, ()))
    anything = bool(adds or changes or removes) or before is None
    version = _version(f"{kind} {repo_id!r}", release, remote) if anything or before is None else before.version
    record = (RECORD,) if anything else ()
    adds, changes = (adds, (*changes, *record)) if RECORD in remote.files else ((*adds, *record), changes)
    what, replaces = f"{kind} {repo_id!r}", before.version if before else None
    worse, unknown = gate(what, before, release) if anything else (None, None)
    theirs = f"{what}: holds {', '.join(foreign)} as no push from here made them, and this one would replace them"
    replaced = {name: remote.files[name] for name in (*changes, *removes) if name != RECORD}
    return PushPlan(
        repo_id, revision, False, private, remote.head, version, replaces, adds, changes, removes, keeps, foreign,
        content=_content(files, replaced),
        refusals=(*((theirs,) if foreign else ()), *((worse,) if worse else ())),
        doubts=(unknown,) if unknown else (),
        stays_private=not private and bool(remote.private),
    )  # fmt: skip


def _content(files: Mapping[str, Content], replaced: Mapping[str, str]) -> str:
    sent = {name: sha256(content) for name, content in files.items()}
    return hashlib.sha256(json.dumps([sent, replaced], sort_keys=True).encode()).hexdigest()


def _is_tag_of_another(api: "HfApi", repo_id: str, kind: RepoType, remote: Remote) -> bool:
    """Whether the version that the record names is the tag of other contents, as after two pushes to two branches at once."""
    before = remote.release
    tagged = remote.tags.get(before.version) if before else None
    return tagged not in (None, remote.head) and read_release(api, repo_id, kind, tagged) != before


def _version(what: str, release: Release, remote: Remote) -> str:
    # That of the last record too: of a merged pull request, or where the tag could not be made, no tag tells of it.
    known = {*remote.tags, *([remote.release.version] if remote.release else [])}
    if not release.version:
        return next_version(known)
    if release.what == "dataset":  # its own number, which others may have used here
        return free_version(release.version, known)
    if release.version in known:
        raise HubError(f"{what}: has a version {release.version!r} already; name another, or none for the next number")
    return release.version


def _refuse_other_types(api: "HfApi", repo_id: str, kind: RepoType, release: Release, token: str) -> None:
    """The Hub would allow it, and whoever looks for the one would find the other first."""
    what = kind if kind == "model" else release.what
    for other in KINDS:
        with hub_errors(f"{other} {repo_id!r}", token):
            if other != kind and api.repo_exists(repo_id, repo_type=other):
                raise HubError(
                    f"{kind} {repo_id!r}: there is a {other} of this name; choose another name for the {what}"
                )


def _refuse_other_content(repo_id: str, kind: RepoType, release: Release, remote: Remote) -> None:
    """transformers loads an adapter that lies beside a model in place of it, and tables of a report would be read as the rows of
    a dataset that lies there."""
    held = remote.release.what if remote.release else _kind_of(remote.files)
    others = sorted(set(remote.files) - {*HUBS_OWN, "README.md"})
    if held is not None and held != release.what:
        told = f"holds {IN_WORDS.get(held, f'a {held}')}"
    elif remote.release is None and others and release.what == "report":
        told = f"is there already and holds something else than a report from here ({', '.join(others[:3])})"
    else:
        return
    raise HubError(
        f"{kind} {repo_id!r}: {told}, so {IN_WORDS.get(release.what, release.what)} cannot be put into it; choose another name"
    )


def _kind_of(files: Mapping[str, Any]) -> str | None:
    if "adapter_config.json" in files:
        return "adapter"
    return "merged" if "config.json" in files else None
