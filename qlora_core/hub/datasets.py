"""A prepared dataset to a dataset repository: one commit of named files, and a check of what arrived."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.faults import SIGN_IN, hub_errors
from qlora_core.hub.files import RepoType, chosen, compare

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What of a prepared dataset's folder may leave the machine; the rest stays.
DATASET_FILES = ("README.md", "lineage.json", "changes.csv", "data/*.parquet")
# A repository that holds it was pushed from here, so that what is no longer part of the dataset can go.
DATASET_MARK = "lineage.json"


@dataclass(frozen=True)
class PushedDataset:
    """Where the dataset is now. `changed` is False where the repository held exactly these files before."""

    url: str
    commit: str
    files: int
    changed: bool


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
    files = chosen(folder, DATASET_FILES)
    if not any(path.startswith("data/") for path in files):
        raise HubError(f"{str(folder)!r}: has no data/*.parquet; prepare the dataset first")
    push = _Push("dataset", token, endpoint, report or (lambda _: None))
    return push.run(repo_id, files, private=private, message=commit_message, mark=DATASET_MARK)


@dataclass(frozen=True)
class _Push:
    """One push to a repository of a type, from its checks to the comparison of what arrived."""

    repo_type: RepoType
    token: str = field(repr=False)
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
        compare(self.api, repo_id, adds, commit.oid, repo_type=self.repo_type, token=self.token)
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


def _left_over(there: Any, files: dict[str, Path], mark: str | None) -> list[str]:
    """Data files of an earlier push that the dataset no longer has: the loader would read them as its rows."""
    held = {sibling.rfilename for sibling in there.siblings or ()} if there else set()
    if mark is None or mark not in held:
        return []
    return sorted(path for path in held - files.keys() if re.fullmatch(r"data/[^/]+\.parquet", path))
