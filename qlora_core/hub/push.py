"""Files to a repository: looked at first, in one commit, tagged as a version, compared with what arrived."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from qlora_core.errors import HubError
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import Content, RepoType, compare, git_oid, sha256
from qlora_core.hub.plans import PushPlan, plan
from qlora_core.hub.releases import RECORD, Release, check_revision, check_version
from qlora_core.hub.repos import Remote, read_release, url_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

STALE, TAKEN = 412, 409
MOST_PROPOSALS = 20  # open pull requests that are looked through for the same one
LARGE_BYTES = 50_000_000  # a file that is worth a word of its own on the way


@dataclass(frozen=True)
class Pushed:
    """Where it is now. `changed` is False where the repository held just these files before; `files` by path -> SHA-256, without
    the record; `pull_request` is the URL of the one that was opened, which has no tag until it is merged."""

    url: str
    repo_id: str
    commit: str
    version: str
    changed: bool
    files: dict[str, str]
    pull_request: str | None = None


@dataclass(frozen=True)
class Push:
    """One push, as it was asked for; `plan` tells what it would change, `run` does it.

    `release.what` is adapter, merged, dataset or report; its version is the tag that is wanted, "" for the next number. `force`
    goes over a much better version, and over what others have changed there. `files` are all but the record. `report` takes
    what is being done, and for large files how many of how many "bytes" are sent.
    """

    repo_id: str
    kind: RepoType
    token: str = field(repr=False)
    release: Release
    files: Mapping[str, Content]
    private: bool = True
    revision: str | None = None
    pull_request: bool = False
    force: bool = False
    message: str = ""
    endpoint: str | None = None
    report: Callable[..., None] = lambda *_: None

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def plan(self) -> PushPlan:
        """Raises HubError where this cannot be pushed, whatever a person agrees to."""
        return self._planned()[0]

    def run(self, agreed: str | None = None, *, committed: Callable[[Pushed], object] = lambda _: None) -> Pushed:
        """Raises HubError, and then no commit was made or it says which. A repository that holds something is changed only as
        `agreed`, the digest of the plan that somebody was shown. `committed` is called as soon as it is on the Hub, before what
        arrived is compared and tagged."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # `report` says what happens; bars would fill the log of a page or of a script
        planned, remote = self._planned()
        if not planned.changes_anything:
            return self._unchanged(planned, remote)
        self._may(planned, agreed)
        if self.pull_request and (proposed := self._proposed(planned)):
            self.report(f"Checked: {proposed.pull_request} proposes exactly these files already")
            return proposed
        info, planned, adds = self._committed(planned, agreed)
        pushed = self._pushed(planned, info.oid, changed=True, pull_request=info.pr_url)
        committed(pushed)
        compare(self.api, planned.repo_id, adds, info.oid, repo_type=self.kind, token=self.token)
        self.report(f"Checked: commit {info.oid[:8]}")
        if not self.pull_request:
            self._tag(planned, info.oid)
        return pushed

    def _proposed(self, planned: PushPlan) -> Pushed | None:
        """An open pull request with just these files, of an earlier push."""
        hashes = {name: (sha256(content), git_oid(content)) for name, content in self.files.items()}
        with hub_errors(f"{self.kind} {planned.repo_id!r}", self.token):
            asked = {"repo_type": self.kind, "discussion_type": "pull_request", "discussion_status": "open"}
            for one in islice(self.api.get_repo_discussions(planned.repo_id, **asked), MOST_PROPOSALS):
                commit = self.api.repo_info(planned.repo_id, repo_type=self.kind, revision=f"refs/pr/{one.num}").sha
                record = read_release(self.api, planned.repo_id, self.kind, commit)
                if record and record.files == hashes:
                    found = self._pushed(planned, commit or "", changed=False, pull_request=one.url)
                    return replace(found, version=record.version)
        return None

    def _pushed(self, planned: PushPlan, commit: str, *, changed: bool, pull_request: str | None = None) -> Pushed:
        hashes = {name: sha256(content) for name, content in self.files.items()}
        url = url_of(self.api, planned.repo_id, self.kind)
        return Pushed(url, planned.repo_id, commit, planned.version, changed, hashes, pull_request)

    def _planned(self) -> tuple[PushPlan, Remote]:
        check_version(self.release.version)
        check_revision(self.revision)
        if self.pull_request and self.revision not in (None, "main"):
            raise HubError("a pull request goes to the main branch; leave the revision out, or push to that branch")
        return plan(
            self.api,
            self.repo_id,
            self.kind,
            self.files,
            self.release,
            token=self.token,
            private=self.private,
            revision=self.revision or "main",
            pull_request=self.pull_request,
        )

    def _may(self, planned: PushPlan, agreed: str | None) -> None:
        if planned.refused and not self.force:
            raise HubError(*planned.refused)
        if planned.touches_others and agreed != planned.digest:
            why = "has changed since its changes were shown" if agreed else "is there already"
            head = f"{self.kind} {planned.repo_id!r}: {why}; look at what this push would change, then push again:"
            raise HubError("\n".join([head, *planned.sentences()]))

    def _committed(
        self, planned: PushPlan, agreed: str | None
    ) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        """A commit that came in between is looked at once; where it changes nothing of what was agreed, this goes on top."""
        from huggingface_hub.errors import HfHubHTTPError

        what = f"{self.kind} {planned.repo_id!r}"
        with hub_errors(what, self.token):
            if planned.creates:
                # Not `exist_ok`: with another endpoint than the environment's, huggingface_hub 2.4.0 fails on its own answer.
                self.report(f"Creating the {'private' if self.private else 'public'} {self.kind} {planned.repo_id}")
                self._create(planned.repo_id)
                # What comes in between now and the commit, minutes for a large model, is not built upon unseen.
                planned = replace(planned, parent=self.api.repo_info(planned.repo_id, repo_type=self.kind).sha)
        with hub_errors(f"{what}, which is new and still empty" if planned.creates else what, self.token):
            try:
                return self._commit(planned)
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code != STALE or planned.creates:
                    raise
            again, _ = self._planned()
            self._may(again, agreed)
            return self._commit(again)

    def _create(self, repo_id: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_repo(repo_id, repo_type=self.kind, private=self.private)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != TAKEN:
                raise
            raise HubError(
                f"{self.kind} {repo_id!r}: there is one of this name that this token cannot see, or it was made just now; choose "
                "another name, or use a token that may see it (of a sign-in: with the scope write-repos)"
            ) from None

    def _commit(self, planned: PushPlan) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api, kind = self.api, self.kind
        branch = planned.revision if planned.revision != "main" else None
        if branch and branch not in {ref.name for ref in api.list_repo_refs(planned.repo_id, repo_type=kind).branches}:
            api.create_branch(planned.repo_id, branch=branch, revision=planned.parent, repo_type=kind)
        hashes = {name: (sha256(content), git_oid(content)) for name, content in self.files.items()}
        record = replace(self.release, version=planned.version, files=hashes)
        adds = [
            CommitOperationAdd(name, content) for name, content in {**self.files, RECORD: record.to_bytes()}.items()
        ]
        size = sum(add.upload_info.size for add in adds)
        self.report(f"Sending {len(adds)} files, {size / 1e6:,.1f} MB")
        self._send(planned.repo_id, branch, adds)
        info = api.create_commit(
            planned.repo_id,
            [*adds, *(CommitOperationDelete(name) for name in planned.removes)],
            commit_message=self.message or f"{planned.version}: {self.release.what}",
            repo_type=kind,
            revision=branch,
            create_pr=self.pull_request,
            parent_commit=planned.parent,
        )
        return info, planned, adds

    def _send(self, repo_id: str, branch: str | None, adds: "list[CommitOperationAdd]") -> None:
        """One after the other, so that it can be told how far it is. Nobody sees them before the commit. Raises HubError where a
        .gitignore there keeps out some of the files: the client would leave them out without a word, and commit the others."""
        upload = partial(
            self.api.preupload_lfs_files,
            repo_id,
            repo_type=self.kind,
            revision=branch,
            create_pr=self.pull_request,
            free_memory=False,  # what arrived is compared with it
        )
        large = [add for add in adds if add.upload_info.size >= LARGE_BYTES]
        sent, total = 0, sum(add.upload_info.size for add in large)
        for add in large:
            self.report(f"Sending {add.path_in_repo}", sent, total, "bytes")
            upload(additions=[add])
            sent += add.upload_info.size
        upload(additions=[add for add in adds if add.upload_info.size < LARGE_BYTES])
        # The Hub's answer of each; the client has no public word for it.
        if ignored := [add.path_in_repo for add in adds if add._should_ignore]:
            raise HubError(
                f"{self.kind} {repo_id!r}: its .gitignore keeps out {', '.join(ignored)}, so nothing was pushed; change that file "
                "there, or choose another name"
            )

    def _unchanged(self, planned: PushPlan, remote: Remote) -> Pushed:
        """Also ends what an earlier push was cut off from: the tag of its commit."""
        assert planned.parent is not None, "a repository that is made changes"
        if planned.version not in remote.tags and not self.pull_request:
            self._tag(planned, planned.parent)
        self.report(f"Checked: commit {planned.parent[:8]} held exactly these files before")
        return self._pushed(planned, planned.parent, changed=False)

    def _tag(self, planned: PushPlan, commit: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        what = (
            f"{self.kind} {planned.repo_id!r}: was pushed as commit {commit[:8]}, but not tagged as {planned.version!r}"
        )
        with hub_errors(f"{what}; push again to tag it", self.token):
            try:
                self.api.create_tag(
                    planned.repo_id,
                    tag=planned.version,
                    revision=commit,
                    repo_type=self.kind,
                    tag_message=self.message or None,
                )
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code != TAKEN:
                    raise
                raise HubError(f"{what}: another push has taken it; push again, and it gets the next number") from None
