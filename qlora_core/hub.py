"""The Hub: whose a token is, what may be written, one commit of named files, and a check of what arrived. Imports no torch.

A Hub error becomes a sentence here (`reason`), whoever meets it. A token is passed on to the Hub and goes nowhere else.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.errors import HubError, LabError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

RepoType = Literal["model", "dataset"]

# What of a prepared dataset's folder may leave the machine; the rest stays.
DATASET_FILES = ("README.md", "lineage.json", "changes.csv", "data/*.parquet")
# A repository that holds it was pushed from here, so that what is no longer part of the dataset can go.
DATASET_MARK = "lineage.json"
SIGN_IN = "sign in, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
NAME_CHARACTERS = 96  # of owner and name together, as huggingface_hub checks
PATHS_A_REQUEST = 500


@dataclass(frozen=True)
class PushedDataset:
    """Where the dataset is now. `changed` is False where the repository held exactly these files before."""

    url: str
    commit: str
    files: int
    changed: bool


@dataclass(frozen=True)
class Account:
    """Whose the token is; `organizations` are those in which that person may write."""

    name: str
    organizations: tuple[str, ...]
    may_write: bool

    def writes_to(self, owner: str) -> bool:
        return owner.casefold() in {name.casefold() for name in (self.name, *self.organizations)}


def push_dataset(
    folder: Path,
    repo_id: str,
    *,
    token: str,
    private: bool = True,
    endpoint: str | None = None,
    commit_message: str,
    report: Callable[[str], None] | None = None,
) -> PushedDataset:
    """Put a prepared dataset into a dataset repository in one commit, and check what arrived.

    The repository is created where it is not there; of one that is there, other files stay as they are, except parquet files
    of an earlier push that the dataset no longer has. Raises HubError, and then no commit was made or it names what differs.
    """
    files = _chosen(folder, DATASET_FILES)
    if not any(path.startswith("data/") for path in files):
        raise HubError(f"{str(folder)!r}: has no data/*.parquet; prepare the dataset first")
    push = _Push("dataset", token, endpoint, report or (lambda _: None))
    return push.run(repo_id, files, private=private, message=commit_message, mark=DATASET_MARK)


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


@contextmanager
def hub_errors(what: str, token: str | None, *, error: type[LabError] = HubError) -> Iterator[None]:
    """Whatever the Hub's clients raise inside becomes one problem of `what`."""
    from httpx2 import HTTPError

    try:
        yield
    except LabError:
        raise
    # Refused connections are httpx2's, failed uploads RuntimeError (LFS) or ConnectionError (Xet), bad cards ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as found:
        raise error(f"{what}: {reason(found, token)}") from None


def reason(error: BaseException, token: str | None) -> str:
    """What a failed request to the Hub means and what to do, without the token."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__, token)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    text = _short(error, token)
    if isinstance(error, GatedRepoError):
        signed_in = "with the account of this token" if token else f"and {SIGN_IN}"
        return f"is gated; ask for access on its page {signed_in}"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision; name a branch, a tag or a commit of it, or none for the newest"
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not token):
        if token:
            return "is not on the Hub, or is private and this token may not read it; check the spelling"
        return f"is not on the Hub, or is private; check the spelling, and for a private one {SIGN_IN}"
    if status == 401:
        return f"the Hub does not accept the token: it is invalid or has expired; {SIGN_IN}"
    if status == 403:
        return f"the Hub does not allow it to this token ({text}); use a token that may write there"
    if status in (409, 412):
        return "was changed by someone else at the same time, and nothing was written; try again"
    if status == 429:
        return "the Hub asks to wait, too many requests were made; try again in some minutes"
    if status is not None and status >= 500:
        return f"the Hub has a fault of its own (status {status}); try again later"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here (HF_HUB_OFFLINE); unset it"
    if status is None and isinstance(error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return f"the Hub cannot be reached, or the connection broke ({text}); check the connection and try again"
    return text


def _short(error: BaseException, token: str | None) -> str:
    """The error's own words in one line: what the server said of it, where it said something."""
    told = getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = " ".join(told.split())
    return (line.replace(token, "…") if token else line)[:200]


def _chosen(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
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


@dataclass(frozen=True)
class _Push:
    """One push to a repository of a type, from its checks to the comparison of what arrived."""

    repo_type: RepoType
    token: str
    endpoint: str | None
    report: Callable[[str], None]

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def run(
        self, repo_id: str, files: dict[str, Path], *, private: bool, message: str, mark: str | None = None
    ) -> PushedDataset:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # `report` says what happens; bars would fill the log of a page or of a script
        who = account(self.token, endpoint=self.endpoint)
        repo_id = full_name(repo_id, who)
        what = f"{self.repo_type} {repo_id!r}"
        if not who.may_write:
            raise HubError(f"{what}: the token of {who.name} may only read; make one that may write, then {SIGN_IN}")
        with hub_errors(what, self.token):
            there = self._existing(repo_id)
            if there is None:
                self._create(repo_id, private=private)
            elif private and there.private is False:
                raise HubError(
                    f"{what}: is there already and is public, so what is pushed would be too; choose another name, make it "
                    "private on its settings page, or push it as public"
                )
        with hub_errors(what if there else f"{what}, which is new and still empty", self.token):
            adds = [CommitOperationAdd(name, path) for name, path in files.items()]
            gone = _left_over(there, files, mark)
            size = sum(add.upload_info.size for add in adds)
            self.report(f"Sending {len(adds)} files, {size / 1e6:,.1f} MB")
            commit = self.api.create_commit(
                repo_id,
                [*adds, *(CommitOperationDelete(path) for path in gone)],
                commit_message=message,
                repo_type=self.repo_type,
                parent_commit=there.sha if there else None,
            )
        self._compare(repo_id, adds, commit.oid)
        changed = there is None or commit.oid != there.sha
        self.report(f"Checked: commit {commit.oid[:8]}" + ("" if changed else " held exactly these files before"))
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return PushedDataset(f"{self.api.endpoint}/{prefix}{repo_id}", commit.oid, len(adds), changed)

    def _existing(self, repo_id: str) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self.api.repo_info(repo_id, repo_type=self.repo_type)
        except RepositoryNotFoundError:
            return None

    def _create(self, repo_id: str, *, private: bool) -> None:
        # Not `exist_ok`: with another endpoint than the environment's, huggingface_hub 2.4.0 then fails on its own answer.
        self.report(f"Creating the {'private' if private else 'public'} {self.repo_type} {repo_id}")
        self.api.create_repo(repo_id, repo_type=self.repo_type, private=private)

    def _compare(self, repo_id: str, adds: "list[CommitOperationAdd]", commit: str) -> None:
        """Raises HubError naming every file that the commit holds with other bytes than were sent."""
        what, remote = f"{self.repo_type} {repo_id!r}", {}
        names = [add.path_in_repo for add in adds]
        with hub_errors(f"{what}: was pushed, but could not be checked", self.token):
            for start in range(0, len(names), PATHS_A_REQUEST):
                asked = names[start : start + PATHS_A_REQUEST]
                found = self.api.get_paths_info(repo_id, asked, repo_type=self.repo_type, revision=commit)
                remote |= {info.path: info for info in found}
            wrong = [add.path_in_repo for add in adds if not _same(add, remote.get(add.path_in_repo))]
        if wrong:
            raise HubError(
                f"{what}: commit {commit[:8]} holds other bytes than were sent in {', '.join(wrong)}; push again"
            )


def _left_over(there: Any, files: dict[str, Path], mark: str | None) -> list[str]:
    """Data files of an earlier push that the dataset no longer has: the loader would read them as its rows."""
    held = {sibling.rfilename for sibling in there.siblings or ()} if there else set()
    if mark is None or mark not in held:
        return []
    return sorted(path for path in held - files.keys() if re.fullmatch(r"data/[^/]+\.parquet", path))


def _same(add: "CommitOperationAdd", remote: Any) -> bool:
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == add.upload_info.sha256.hex()
    with add.as_file() as file:
        content = file.read()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
