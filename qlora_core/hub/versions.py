"""The versions of a repository on the Hub, and the way back to one of them."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import RepoType
from qlora_core.hub.releases import RECORD, Release
from qlora_core.hub.repos import look, read_release, tags, url_of, writable_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MOST_VERSIONS = 100


@dataclass(frozen=True)
class Version:
    """A tag of a repository; `release` is None where it was not made from here. `current`: the main branch holds it now."""

    version: str
    commit: str
    release: Release | None
    current: bool


@dataclass(frozen=True)
class RolledBack:
    """`restores` and `removes` name the files that differ from the version's, before the rollback. `commit` is the one that the
    main branch is at."""

    url: str
    commit: str
    version: str
    changed: bool
    restores: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()


def versions(
    repo_id: str, token: str | None, *, kind: RepoType = "model", endpoint: str | None = None
) -> list[Version]:
    """The newest tagged versions, at most MOST_VERSIONS, and what the main branch holds where that has no tag. Raises HubError."""
    api = _api(token, endpoint)
    if token and "/" not in repo_id:
        repo_id = f"{account(token, endpoint=endpoint).name}/{repo_id.strip()}"
    with hub_errors(f"{kind} {repo_id!r}", token):
        head = api.repo_info(repo_id, repo_type=kind).sha
        now = read_release(api, repo_id, kind, head)
        known = dict(
            sorted(tags(api, repo_id, kind).items(), key=lambda tag: _parts(tag[0]), reverse=True)[:MOST_VERSIONS]
        )
        found = [(name, commit, read_release(api, repo_id, kind, commit)) for name, commit in known.items()]
    if now and now.version and now.version not in {name for name, *_ in found}:  # a pull request that was merged
        found.append((now.version, head, now))
    made = [
        Version(name, commit, release, commit == head or (now is not None and release == now))
        for name, commit, release in found
    ]
    return sorted(made, key=lambda version: _parts(version.version), reverse=True)


def measured(release: Release) -> str:
    """Its metrics in words; empty where nothing was measured."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:,.0f}' if name.endswith('rows') else f'{value:.4f}'}"
        for name, value in release.metrics.items()
    )


def change(version: Version, before: Version | None) -> str:
    """What differs from an older version, only where both were evaluated on the same rows; empty where nothing can be compared."""
    new, old = version.release, before.release if before else None
    if new is None or old is None:
        return ""
    if not new.eval_fingerprint or new.eval_fingerprint != old.eval_fingerprint:
        return "evaluated on other rows"
    both = [name for name in new.metrics if name in old.metrics and name != "train_loss"]
    return ", ".join(f"{name.replace('_', ' ')} {new.metrics[name] - old.metrics[name]:+.4f}" for name in both)


def rollback(
    repo_id: str,
    version: str,
    token: str,
    *,
    kind: RepoType = "model",
    endpoint: str | None = None,
    force: bool = False,
    plan: bool = False,
    seen: str | None = None,
) -> RolledBack:
    """A new commit on the main branch with the files of that version; files that no push from here made stay.

    `force` replaces what others have changed there since, `plan` only tells what would change. `seen` is the `commit` of such a
    plan that somebody was shown: with another commit on the main branch by now, nothing is changed. Raises HubError.
    """
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    api = _api(token, endpoint)
    repo_id = writable_name(api, repo_id, kind, token)
    what = f"{kind} {repo_id!r}"
    with hub_errors(what, token):
        remote = look(api, repo_id, kind)
        if remote is None:
            raise HubError(f"{what}: is not there, or this token may not read it; check the spelling")
        if seen not in (None, remote.head):
            raise HubError(f"{what}: has changed since this was shown; look again at what going back would change")
        if version not in remote.tags:
            known = ", ".join(remote.tags) or "none yet"
            raise HubError(f"{what}: has no version {version!r}; those there are: {known}")
        wanted = read_release(api, repo_id, kind, remote.tags[version])
        if wanted is None:
            raise HubError(f"{what}: version {version!r} has no {RECORD}, so what belongs to it is not known")
        at = remote.tags[version]
        entries = api.get_paths_info(repo_id, [*wanted.files, RECORD], revision=at, repo_type=kind)
        then = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}
        back = [name for name, oid in then.items() if remote.files.get(name) != oid]
        ours = remote.release.files if remote.release else {}
        gone = [name for name in ours if name in remote.files and name not in then]
        told = RolledBack(url_of(api, repo_id, kind), remote.head or "", version, False, tuple(back), tuple(gone))
        foreign = [
            n for n in (*back, *gone) if n in remote.files and n != RECORD and remote.files[n] not in ours.get(n, ())
        ]
        if foreign and not force and not plan:
            raise HubError(
                f"{what}: {', '.join(foreign)} there was changed by someone else, and going back to {version!r} would replace it; "
                "force it (--force, or the box beside it on the page), or keep what is there"
            )
        if plan or not (back or gone):
            return told
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationCopy(name, name, src_revision=remote.tags[version]) for name in back),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=f"Roll back to {version}",
            repo_type=kind,
            parent_commit=remote.head,
        )
    return replace(told, commit=commit.oid, changed=True)


def _api(token: str | None, endpoint: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token or False)


def _parts(version: str) -> tuple[Any, ...]:
    """v10 comes after v9.1."""
    numbers = re.fullmatch(r"v?(\d{1,9}(?:\.\d{1,9})*)", version)
    return (tuple(map(int, numbers[1].split("."))) if numbers else (), version)
