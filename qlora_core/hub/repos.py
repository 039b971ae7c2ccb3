"""A repository on the Hub as it is: its files with their hashes, its tags, the record of the last push. Changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_core.errors import HubError
from qlora_core.hub.access import KINDS, account, full_name
from qlora_core.hub.files import RepoType
from qlora_core.hub.releases import MOST_BYTES, RECORD, Release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STAYS_PRIVATE = "stays private; it is made public on its settings page"
# What the Hub itself puts into a new repository.
HUBS_OWN = (".gitattributes",)


@dataclass(frozen=True)
class Remote:
    """`files` by path -> SHA-256 of what is in LFS, git's blob hash of the rest. `head` is None where there is no repository."""

    head: str | None
    files: Mapping[str, str]
    tags: Mapping[str, str]
    release: Release | None
    private: bool | None = None


def look(api: "HfApi", repo_id: str, kind: RepoType, *, revision: str = "main", private: bool = False) -> Remote | None:
    """None where there is no such repository. A revision that is not there starts from the main branch. Raises HubError where the
    repository is public and `private` was asked for, and for a revision that is a tag."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return None
    what = f"{kind} {repo_id!r}"
    if private and info.private is False:
        raise HubError(public_already(what))
    known = tags(api, repo_id, kind)
    if revision in known:
        raise HubError(f"{what}: its revision {revision!r} is a tag, which stays as it is; name a branch")
    try:
        head = api.repo_info(repo_id, repo_type=kind, revision=revision).sha if revision != "main" else info.sha
    except RevisionNotFoundError:
        head = info.sha
    entries = api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=kind)
    files = {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}
    release = read_release(api, repo_id, kind, head) if RECORD in files else None
    return Remote(head, files, known, release, info.private)


def public_already(what: str) -> str:
    return (
        f"{what}: is there already and is public, so what is pushed would be too; choose another name, make it "
        "private on its settings page, or push it as public"
    )


def writable_name(api: "HfApi", repo_id: str, kind: RepoType, token: str) -> str:
    """`owner/name` where the token may write. Raises HubError."""
    who = account(token, endpoint=api.endpoint)
    for other in KINDS:
        if repo_id.strip().startswith(f"{other}s/"):
            raise HubError(
                f"repository name {repo_id!r}: is that of a {other}; write owner/name, of a repository for this {kind} alone"
            )
    found = full_name(repo_id, who)
    if not who.may_write:
        raise HubError(f"{kind} {found!r}: {who.read_only()}")
    return found


def tags(api: "HfApi", repo_id: str, kind: RepoType) -> dict[str, str]:
    """Name -> commit."""
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id, repo_type=kind).tags}


def read_release(api: "HfApi", repo_id: str, kind: RepoType, commit: str | None) -> Release | None:
    """The record of a commit, read past every cache; None where there is none, or what something else wrote."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session, hf_raise_for_status

    found = api.get_paths_info(repo_id, [RECORD], revision=commit, repo_type=kind)
    if not found or getattr(found[0], "size", 0) > MOST_BYTES:
        return None
    url = hf_hub_url(repo_id, RECORD, repo_type=kind, revision=commit, endpoint=api.endpoint)
    headers = {"Authorization": f"Bearer {api.token}"} if api.token else {}
    answer = get_session().get(url, headers=headers, follow_redirects=True)
    hf_raise_for_status(answer)
    return Release.from_bytes(answer.content)


def url_of(api: "HfApi", repo_id: str, kind: RepoType) -> str:
    return f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
