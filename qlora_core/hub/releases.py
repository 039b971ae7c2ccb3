"""Versions of a model repository: the record in each commit, the list of them, going back to one, and the gate before a new."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.faults import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

RECORD = "release.json"
LOSSES = ("eval_loss", "trained_eval_loss")  # of an adapter; of the model from which a merged one was made
WORSE_SHARE = 0.05  # of the evaluation loss, above which a version is not published over another
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Release:
    """What a version is. `version` is "" until it is known; `files` by path -> SHA-256 and git's blob hash, besides the record.

    `metrics` holds numbers by name; the first of LOSSES is compared where `eval_fingerprint` is the same."""

    what: str
    version: str = ""
    run_id: str = ""
    base_model: str = ""
    dataset_fingerprint: str = ""
    eval_fingerprint: str = ""
    git_commit: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Release | None":
        """None for a file of this name that something else wrote."""
        try:
            values = json.loads(content)
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            known["files"] = {str(name): (str(a), str(b)) for name, (a, b) in known.get("files", {}).items()}
            known["metrics"] = {str(name): float(value) for name, value in known.get("metrics", {}).items()}
            found = cls(**known)
        except (ValueError, TypeError, AttributeError):
            return None
        texts = (
            found.what,
            found.version,
            found.run_id,
            found.base_model,
            found.dataset_fingerprint,
            found.eval_fingerprint,
        )
        return found if all(isinstance(text, str) for text in texts) else None


@dataclass(frozen=True)
class Version:
    """A tag of a repository; `release` is None where it was not made from here. `current`: the main branch holds it now."""

    version: str
    commit: str
    release: Release | None
    current: bool


@dataclass(frozen=True)
class RolledBack:
    """`restores` and `removes` name the files that differ from the version's, before the rollback."""

    url: str
    commit: str
    version: str
    changed: bool
    restores: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()


def versions(repo_id: str, token: str | None, *, endpoint: str | None = None) -> list[Version]:
    """The tagged versions, newest number first, and what the main branch holds where that has no tag. Raises HubError."""
    api = _api(token, endpoint)
    with hub_errors(f"model {repo_id!r}", token):
        head = api.model_info(repo_id).sha
        now = read_release(api, repo_id, head)
        found = [(name, commit, read_release(api, repo_id, commit)) for name, commit in tags(api, repo_id).items()]
    if now and now.version and now.version not in {name for name, *_ in found}:  # a pull request that was merged
        found.append((now.version, head, now))
    made = [
        Version(name, commit, release, commit == head or (now is not None and release == now))
        for name, commit, release in found
    ]
    return sorted(made, key=lambda version: (_number(version.version), version.version), reverse=True)


def rollback(
    repo_id: str, version: str, token: str, *, endpoint: str | None = None, force: bool = False, plan: bool = False
) -> RolledBack:
    """A new commit on the main branch with the files of that version; files that no push from here made stay.

    `force` replaces what others have changed there since, `plan` only tells what would change. Raises HubError.
    """
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    from qlora_core.hub.plans import look, writable_name

    api = _api(token, endpoint)
    repo_id = writable_name(api, repo_id, token)
    what = f"model {repo_id!r}"
    with hub_errors(what, token):
        remote = look(api, repo_id, "main")
        if remote is None:
            raise HubError(f"{what}: is not there, or this token may not read it; check the spelling")
        if version not in remote.tags:
            known = ", ".join(remote.tags) or "none yet"
            raise HubError(f"{what}: has no version {version!r}; those there are: {known}")
        wanted = read_release(api, repo_id, remote.tags[version])
        if wanted is None:
            raise HubError(f"{what}: version {version!r} has no {RECORD}, so what belongs to it is not known")
        then = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
                for entry in api.get_paths_info(repo_id, [*wanted.files, RECORD], revision=remote.tags[version])}  # fmt: skip
        back = [name for name, oid in then.items() if remote.files.get(name) != oid]
        ours = remote.release.files if remote.release else {}
        gone = [name for name in ours if name in remote.files and name not in then]
        told = RolledBack(f"{api.endpoint}/{repo_id}", remote.head or "", version, False, tuple(back), tuple(gone))
        foreign = [
            n for n in (*back, *gone) if n in remote.files and n != RECORD and remote.files[n] not in ours.get(n, ())
        ]
        if foreign and not force and not plan:
            raise HubError(
                f"{what}: {', '.join(foreign)} there was changed by someone else, and going back to {version!r} would replace it; "
                "do so with --force, or keep what is there"
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
            parent_commit=remote.head,
        )
    return replace(told, commit=commit.oid, changed=True)


def gate(repo_id: str, before: Release | None, new: Release) -> str | None:
    """Why the new version should not replace the one before: a loss on the same rows that is more than 5 % higher."""
    if before is None or not new.eval_fingerprint or before.eval_fingerprint != new.eval_fingerprint:
        return None
    old, now = (next((r.metrics[name] for name in LOSSES if name in r.metrics), None) for r in (before, new))
    if old is None or now is None or now <= old * (1 + WORSE_SHARE):
        return None
    return (
        f"model {repo_id!r}: its version {before.version} has an evaluation loss of {old:.4f} on the same rows, this one "
        f"{now:.4f}, which is {now / old - 1:.1%} worse; push it with --force, into another repository, or not at all"
    )


def tags(api: "HfApi", repo_id: str) -> dict[str, str]:
    """Name -> commit."""
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}


def next_version(known: Iterable[str]) -> str:
    return f"v{max(map(_number, known), default=0) + 1}"


def check_version(version: str) -> None:
    if version and (not VERSION.fullmatch(version) or ".." in version or version.endswith((".", ".lock"))):
        raise HubError(
            f"version {version!r}: is no name of a version; use letters a to z, digits, '-', '_' and '.', as in 'v2' or '1.0.3'"
        )
    if version in ("main", "HEAD"):
        raise HubError(f"version {version!r}: is the name of a branch; choose another, as in 'v2'")


def read_release(api: "HfApi", repo_id: str, commit: str | None) -> Release | None:
    """The record of a commit, read past every cache; None where there is none."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if not api.get_paths_info(repo_id, [RECORD], revision=commit):
        return None
    url = hf_hub_url(repo_id, RECORD, revision=commit, endpoint=api.endpoint)
    headers = {"Authorization": f"Bearer {api.token}"} if api.token else {}
    answer = get_session().get(url, headers=headers, follow_redirects=True)
    hf_raise_for_status(answer)
    return Release.from_bytes(answer.content)


def _api(token: str | None, endpoint: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token or False)


def _number(version: str) -> int:
    found = re.fullmatch(r"v(\d{1,9})", version)
    return int(found[1]) if found else 0
