"""Files to a dataset repository: looked at first, one commit, tagged as a version, compared with what arrived. Reads no rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.access import account, full_name
from qlora_core.hub.dataset_repos import KIND, in_words, known_tags, look, read_record
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import Content, compare, git_oid, sha256
from qlora_core.hub.plans import HUBS_OWN, PushPlan, Remote
from qlora_core.hub.releases import RECORD, Release, Version, check_version, next_version

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

STALE = 412


@dataclass(frozen=True)
class PushedDataset:
    """Where it is now. `changed` is False where the repository held exactly these files before; `files` is how many, besides
    the record of the push."""

    url: str
    repo_id: str
    commit: str
    version: str
    files: int
    changed: bool


@dataclass(frozen=True)
class DatasetPush:
    """One push, as it was asked for; `plan` tells what it would change, `run` does it.

    `release.what` is "dataset" or "report"; its version is the tag that is wanted, "" for the next number. `force` replaces
    what others have changed there.
    """

    repo_id: str
    token: str = field(repr=False)
    release: Release
    files: Mapping[str, Content]
    private: bool = True
    force: bool = False
    message: str = ""
    endpoint: str | None = None
    report: Callable[[str], None] = lambda _: None

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def plan(self) -> PushPlan:
        """Raises HubError where this cannot be pushed, whatever a person agrees to."""
        return self._planned()[0]

    def run(self, agreed: str | None = None) -> PushedDataset:
        """Raises HubError, and then no commit was made or it says which. A repository that holds something is changed only as
        `agreed`, the digest of the plan that somebody was shown."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # `report` says what happens; bars would fill the log of a page or of a script
        planned, remote = self._planned()
        commit, changed = planned.parent or "", planned.changes_anything
        if changed:
            self._may(planned, remote, agreed)
            info, planned, adds = self._committed(planned, agreed)
            commit = info.oid
            compare(self.api, planned.repo_id, adds, commit, repo_type=KIND, token=self.token)
        self.report(f"Checked: commit {commit[:8]}" + ("" if changed else " held exactly these files before"))
        if planned.version and planned.version not in remote.tags:  # also of an earlier push that was cut off before it
            self._tag(planned, commit)
        url = f"{self.api.endpoint}/datasets/{planned.repo_id}"
        return PushedDataset(url, planned.repo_id, commit, planned.version, len(self.files), changed)

    def _planned(self) -> tuple[PushPlan, Remote]:
        check_version(self.release.version)
        who = account(self.token, endpoint=self.endpoint)
        repo_id = full_name(self.repo_id, who)
        if not who.may_write:
            raise HubError(f"{KIND} {repo_id!r}: {who.read_only()}")
        with hub_errors(f"{KIND} {repo_id!r}", self.token):
            remote = look(self.api, repo_id, private=self.private)
            if remote is None:
                self._refuse_other_types(repo_id)
                version = self.release.version or "v1"
                names = (*sorted(self.files), RECORD)
                return PushPlan(repo_id, "main", True, self.private, None, version, None, names), Remote(
                    None, {}, {}, None
                )
        self._refuse_other_kind(repo_id, remote)
        return self._compared(repo_id, remote), remote

    def _compared(self, repo_id: str, remote: Remote) -> PushPlan:
        before = remote.release
        recorded = before.files if before else {}
        there = remote.files
        same = {name for name, content in self.files.items() if there.get(name) in (sha256(content), git_oid(content))}
        adds = sorted(name for name in self.files if name not in there)
        changes = sorted(name for name in self.files if name in there and name not in same)
        removes = sorted(name for name in recorded if name in there and name not in self.files)
        keeps = sorted(name for name in there if name not in {*changes, *removes, RECORD, *HUBS_OWN})
        # Recorded are both hashes, so that either way of storing tells what was changed there by hand.
        foreign = tuple(name for name in (*changes, *removes) if there[name] not in recorded.get(name, ()))
        version = before.version if before else ""
        if adds or changes or removes or before is None:
            version = _free(self.release.version, {*remote.tags, version})
            (changes if RECORD in there else adds).append(RECORD)
        return PushPlan(
            repo_id, "main", False, self.private, remote.head, version, before.version if before else None,
            tuple(adds), tuple(changes), tuple(removes), tuple(keeps), foreign,
        )  # fmt: skip

    def _may(self, planned: PushPlan, remote: Remote, agreed: str | None) -> None:
        """A repository with nothing in it, as a first push that failed leaves it, has nothing that could change."""
        what = f"{KIND} {planned.repo_id!r}"
        if set(remote.files) - {*HUBS_OWN} and agreed != planned.digest:
            why = "has changed since its changes were shown" if agreed else "is there already"
            head = f"{what}: {why}; look at what this push would change, then push again:"
            raise HubError("\n".join([head, *planned.sentences()]))
        if planned.foreign and not self.force:
            raise HubError(
                f"{what}: holds {', '.join(planned.foreign)} as no push from here made them, and this one would replace them; "
                "push it with --force to do so, or choose another name"
            )

    def _refuse_other_types(self, repo_id: str) -> None:
        """The Hub would allow it, and whoever looks for one would find the other first."""
        for kind in ("model", "space"):
            if self.api.repo_exists(repo_id, repo_type=kind):
                what = self.release.what
                raise HubError(
                    f"{KIND} {repo_id!r}: there is a {kind} of this name; choose another name for the {what}"
                )

    def _refuse_other_kind(self, repo_id: str, remote: Remote) -> None:
        """Tables of a report beside the rows of a dataset would be read as its rows, and its card would say nothing of them."""
        mine, others = self.release.what, set(remote.files) - {*HUBS_OWN, "README.md"}
        if remote.release is not None and remote.release.what != mine:
            raise HubError(
                f"{KIND} {repo_id!r}: holds {in_words(remote.release.what)}, so {in_words(mine)} cannot be put into it; choose "
                "another name"
            )
        if remote.release is None and others and mine == "report":
            raise HubError(
                f"{KIND} {repo_id!r}: is there already and holds something else than a report from here "
                f"({', '.join(sorted(others)[:3])}); choose another name"
            )

    def _committed(
        self, planned: PushPlan, agreed: str | None
    ) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        """A commit that came in between is looked at once; where it changes nothing of what was agreed, this goes on top."""
        from huggingface_hub.errors import HfHubHTTPError

        what = f"{KIND} {planned.repo_id!r}"
        with hub_errors(what, self.token):
            if planned.creates:
                # Not `exist_ok`: with another endpoint than the environment's, huggingface_hub 2.4.0 fails on its own answer.
                self.report(f"Creating the {'private' if self.private else 'public'} {KIND} {planned.repo_id}")
                self.api.create_repo(planned.repo_id, repo_type=KIND, private=self.private)
        with hub_errors(f"{what}, which is new and still empty" if planned.creates else what, self.token):
            try:
                return self._commit(planned)
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code != STALE or planned.creates:
                    raise
            again, remote = self._planned()
            self._may(again, remote, agreed)
            return self._commit(again)

    def _commit(self, planned: PushPlan) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        hashes = {name: (sha256(content), git_oid(content)) for name, content in self.files.items()}
        record = replace(self.release, version=planned.version, files=hashes)
        adds = [
            CommitOperationAdd(name, content) for name, content in {**self.files, RECORD: record.to_bytes()}.items()
        ]
        size = sum(add.upload_info.size for add in adds)
        self.report(f"Sending {len(adds)} files, {size / 1e6:,.1f} MB")
        info = self.api.create_commit(
            planned.repo_id,
            [*adds, *(CommitOperationDelete(name) for name in planned.removes)],
            commit_message=self.message or f"{planned.version}: {self.release.what}",
            repo_type=KIND,
            parent_commit=planned.parent,
        )
        return info, planned, adds

    def _tag(self, planned: PushPlan, commit: str) -> None:
        what = f"{KIND} {planned.repo_id!r}: was pushed as commit {commit[:8]}, but not tagged as {planned.version!r}"
        with hub_errors(f"{what}; push again to tag it", self.token):
            self.api.create_tag(
                planned.repo_id,
                tag=planned.version,
                revision=commit,
                repo_type=KIND,
                tag_message=self.message or None,
            )


def dataset_versions(repo_id: str, token: str | None, *, endpoint: str | None = None) -> list[Version]:
    """The tagged versions of a dataset or a report on the Hub, newest first; `hub:OWNER/NAME@VERSION` reads that one.

    Raises HubError.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token or False)
    with hub_errors(f"{KIND} {repo_id!r}", token):
        head = api.dataset_info(repo_id).sha
        made = [
            Version(name, commit, read_record(api, repo_id, commit), commit == head)
            for name, commit in known_tags(api, repo_id).items()
        ]
    return sorted(made, key=lambda version: _numbers(version.version), reverse=True)


def _free(wanted: str, known: Iterable[str]) -> str:
    """A version that is not taken: a dataset's own number, with a second one where other files have that already."""
    taken = set(known)
    if not wanted:
        return next_version(taken)
    again = (f"{wanted}.{number}" for number in range(1, len(taken) + 2))
    return wanted if wanted not in taken else next(name for name in again if name not in taken)


def _numbers(version: str) -> tuple[Any, ...]:
    parts = version.removeprefix("v").split(".")
    numbers = tuple(int(part) for part in parts) if all(part.isdecimal() and len(part) < 10 for part in parts) else ()
    return (numbers, version)
