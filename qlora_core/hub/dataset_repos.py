"""A dataset repository as it is: its files with their hashes, its tags, the record of the last push. Changes nothing."""

from typing import TYPE_CHECKING

from qlora_core.errors import HubError
from qlora_core.hub.files import RepoType
from qlora_core.hub.plans import Remote
from qlora_core.hub.releases import RECORD, Release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KIND: RepoType = "dataset"


def look(api: "HfApi", repo_id: str, *, private: bool) -> Remote | None:
    """None where there is no such repository. Raises HubError where it is public and `private` was asked for."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if private and info.private is False:
        raise HubError(
            f"{KIND} {repo_id!r}: is there already and is public, so what is pushed would be too; choose another name, make it "
            "private on its settings page, or push it as public"
        )
    entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=KIND)
    files = {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}
    record = read_record(api, repo_id, info.sha) if RECORD in files else None
    return Remote(info.sha, files, known_tags(api, repo_id), record)


def known_tags(api: "HfApi", repo_id: str) -> dict[str, str]:
    """Name -> commit."""
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id, repo_type=KIND).tags}


def read_record(api: "HfApi", repo_id: str, commit: str | None) -> Release | None:
    """The record of a commit, read past every cache; None where there is none."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if not api.get_paths_info(repo_id, [RECORD], revision=commit, repo_type=KIND):
        return None
    url = hf_hub_url(repo_id, RECORD, repo_type=KIND, revision=commit, endpoint=api.endpoint)
    headers = {"Authorization": f"Bearer {api.token}"} if api.token else {}
    answer = get_session().get(url, headers=headers, follow_redirects=True)
    hf_raise_for_status(answer)
    return Release.from_bytes(answer.content)


def in_words(what: str) -> str:
    return {"dataset": "a dataset", "report": "a report of a study"}.get(what, f"a {what}")
