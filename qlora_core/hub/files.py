"""Which files of a folder go to the Hub, and whether what is there is what was sent."""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.errors import HubError
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.releases import FORCE
from qlora_core.storage import file_sha256

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

RepoType = Literal["model", "dataset"]
Content = bytes | Path

PATHS_A_REQUEST = 500


def chosen(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Files of the folder by their path in it, in order. Raises HubError for links that lead out of it."""
    root = folder.resolve()
    found = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in sorted(folder.glob(pattern))}
    problems = [
        f"{name} of {str(folder)!r}: is a link to a place outside the folder; put the file itself there"
        for name, path in found.items()
        if not path.resolve().is_relative_to(root)
    ]
    if problems:
        raise HubError(*problems)
    return {name: path for name, path in found.items() if path.is_file()}


def compare(
    api: "HfApi", repo_id: str, adds: "Sequence[CommitOperationAdd]", commit: str, *, repo_type: RepoType, token: str
) -> None:
    """Raises HubError naming every file that the commit holds with other bytes than were sent."""
    what, remote = f"{repo_type} {repo_id!r}", {}
    names = [add.path_in_repo for add in adds]
    with hub_errors(f"{what}: was pushed, but could not be checked", token):
        for start in range(0, len(names), PATHS_A_REQUEST):
            asked = names[start : start + PATHS_A_REQUEST]
            found = api.get_paths_info(repo_id, asked, repo_type=repo_type, revision=commit)
            remote |= {info.path: info for info in found}
        wrong = [add.path_in_repo for add in adds if not same(add, remote.get(add.path_in_repo))]
    if wrong:
        raise HubError(
            f"{what}: commit {commit[:8]} holds other bytes than were sent in {', '.join(wrong)}; push again, forced ({FORCE})"
        )


def same(add: "CommitOperationAdd", remote: Any) -> bool:
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == add.upload_info.sha256.hex()
    with add.as_file() as file:
        content = file.read()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else _hash_of(file_sha256, content)


def git_oid(content: Content) -> str:
    """git's blob hash, by which the Hub names what is not in LFS."""
    if isinstance(content, bytes):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return _hash_of(_git_oid_of_file, content)


def _git_oid_of_file(path: Path) -> str:
    found = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _hash_of(hashed: Callable[[Path], str], path: Path) -> str:
    """Read once for all the looks of a push: a merged model has many gigabytes."""
    found = path.stat()
    return _kept(hashed, path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _kept(hashed: Callable[[Path], str], path: Path, size: int, mtime_ns: int) -> str:
    return hashed(path)
