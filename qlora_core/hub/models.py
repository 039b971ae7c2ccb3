"""A model folder to a model repository: planned, in one commit, tagged as a version, compared with what arrived."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.errors import HubError
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import Content, chosen, compare, git_oid, sha256
from qlora_core.hub.plans import PushPlan, Remote, plan
from qlora_core.hub.releases import RECORD, Release, check_version, gate

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# What of a folder may leave the machine, by what is pushed; the rest stays, optimizer and random state above all.
ALLOWED = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES),
    "merged": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
    ),
}
NEEDED = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "merged": ("config.json", "*.safetensors")}
STALE = 412


@dataclass(frozen=True)
class PushedModel:
    """Where the model is now. `changed` is False where the repository held exactly these files before; `pull_request` is the
    URL of the one that was opened, which has no tag until it is merged."""

    url: str
    repo_id: str
    commit: str
    version: str
    changed: bool
    files: dict[str, str]
    pull_request: str | None = None


@dataclass(frozen=True)
class ModelPush:
    """One push, as it was asked for; `plan` tells what it would change, `run` does it."""

    folder: Path
    repo_id: str
    token: str = field(repr=False)
    release: Release
    files: Mapping[str, Content]
    private: bool = True
    revision: str | None = None
    pull_request: bool = False
    allow: Sequence[str] | None = None
    message: str = ""
    force: bool = False
    endpoint: str | None = None
    report: Callable[[str], None] = lambda _: None

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def contents(self) -> dict[str, Content]:
        """What is sent besides the record. Raises HubError where something of it is missing or leads elsewhere."""
        what = self.release.what
        found = {**chosen(self.folder, self.allow or ALLOWED[what]), **self.files}
        missing = [pattern for pattern in NEEDED[what] if not any(Path(name).match(pattern) for name in found)]
        if missing:
            raise HubError(
                f"{str(self.folder)!r}: has no {', '.join(missing)}, so it is no {what} that could be pushed"
            )
        assert RECORD not in found and all(map(_is_plain, found)), (
            "the record is written here, and all below the folder"
        )
        return found

    def plan(self) -> PushPlan:
        return self._planned(self.contents())[0]

    def run(self, agreed: str | None = None) -> PushedModel:
        """Raises HubError, and then no commit was made or it says which. An existing repository is changed only as `agreed`,
        the digest of the plan that somebody was shown."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        contents = self.contents()
        planned, remote = self._planned(contents)
        if not planned.changes_anything:
            return self._unchanged(planned, contents, remote)
        self._may(planned, remote, agreed)
        info, planned, adds = self._committed(planned, contents, agreed)
        compare(self.api, planned.repo_id, adds, info.oid, repo_type="model", token=self.token)
        self.report(f"Checked: commit {info.oid[:8]}")
        if not self.pull_request:
            self._tag(planned, info.oid)
        hashes = {add.path_in_repo: add.upload_info.sha256.hex() for add in adds}
        url = f"{self.api.endpoint}/{planned.repo_id}"
        return PushedModel(url, planned.repo_id, info.oid, planned.version, True, hashes, info.pr_url)

    def _planned(self, contents: Mapping[str, Content]) -> tuple[PushPlan, Remote]:
        check_version(self.release.version)
        if self.pull_request and self.revision not in (None, "main"):
            raise HubError("a pull request goes to the main branch; leave the revision out, or push to that branch")
        return plan(
            self.api,
            self.repo_id,
            contents,
            self.release,
            token=self.token,
            private=self.private,
            revision=self.revision or "main",
            pull_request=self.pull_request,
        )

    def _may(self, planned: PushPlan, remote: Remote, agreed: str | None) -> None:
        what, problems = f"model {planned.repo_id!r}", []
        if not planned.creates and agreed != planned.digest:
            why = "has changed since its changes were shown" if agreed else "is there already"
            problems.append(f"{what}: {why}; look at what this push would change, then push again:")
            raise HubError("\n".join([*problems, *planned.sentences()]))
        if self.force:
            return
        if planned.foreign:
            problems.append(
                f"{what}: holds {', '.join(planned.foreign)} as no push from here made them, and this one would replace them; "
                "push it with --force to do so, or choose another name"
            )
        if worse := gate(planned.repo_id, remote.release, self.release):
            problems.append(worse)
        if problems:
            raise HubError(*problems)

    def _committed(
        self, planned: PushPlan, contents: Mapping[str, Content], agreed: str | None
    ) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        """A commit that came in between is looked at once; where it changes nothing of what was agreed, this goes on top."""
        from huggingface_hub.errors import HfHubHTTPError

        what = f"model {planned.repo_id!r}"
        with hub_errors(what, self.token):
            if planned.creates:
                self.report(f"Creating the {'private' if self.private else 'public'} model {planned.repo_id}")
                self.api.create_repo(planned.repo_id, private=self.private)
        with hub_errors(f"{what}, which is new and still empty" if planned.creates else what, self.token):
            try:
                return self._commit(planned, contents)
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code != STALE or planned.creates:
                    raise
            again, remote = self._planned(contents)
            self._may(again, remote, agreed)
            return self._commit(again, contents)

    def _commit(
        self, planned: PushPlan, contents: Mapping[str, Content]
    ) -> "tuple[CommitInfo, PushPlan, list[CommitOperationAdd]]":
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = self.api
        branch = planned.revision != "main"
        if branch and planned.revision not in {ref.name for ref in api.list_repo_refs(planned.repo_id).branches}:
            api.create_branch(planned.repo_id, branch=planned.revision, revision=planned.parent)
        hashes = {name: (sha256(content), git_oid(content)) for name, content in contents.items()}
        record = replace(self.release, version=planned.version, files=hashes)
        adds = [CommitOperationAdd(name, content) for name, content in {**contents, RECORD: record.to_bytes()}.items()]
        size = sum(add.upload_info.size for add in adds)
        self.report(f"Sending {len(adds)} files, {size / 1e6:,.1f} MB")
        info = api.create_commit(
            planned.repo_id,
            [*adds, *(CommitOperationDelete(name) for name in planned.removes)],
            commit_message=self.message or f"{planned.version}: {self.release.what}",
            revision=planned.revision if branch else None,
            create_pr=self.pull_request,
            parent_commit=planned.parent,
        )
        return info, planned, adds

    def _unchanged(self, planned: PushPlan, contents: Mapping[str, Content], remote: Remote) -> PushedModel:
        """Also ends what an earlier push was cut off from: the tag of its commit."""
        assert planned.parent is not None, "a repository that is made changes"
        if planned.version not in remote.tags and not self.pull_request:
            self._tag(planned, planned.parent)
        self.report(f"Checked: commit {planned.parent[:8]} held exactly these files before")
        hashes = {name: sha256(content) for name, content in contents.items()}
        return PushedModel(
            f"{self.api.endpoint}/{planned.repo_id}", planned.repo_id, planned.parent, planned.version, False, hashes
        )

    def _tag(self, planned: PushPlan, commit: str) -> None:
        what = f"model {planned.repo_id!r}: was pushed as commit {commit[:8]}, but not tagged as {planned.version!r}"
        with hub_errors(f"{what}; push again to tag it", self.token):
            self.api.create_tag(planned.repo_id, tag=planned.version, revision=commit, tag_message=self.message or None)


def push_model(folder: Path, repo_id: str, *, token: str, release: Release, **asked: Any) -> PushedModel:
    """`ModelPush(...).run(agreed)`: see there for what may be `asked`, and `agreed`, the digest of what `plan_push` gave."""
    agreed = asked.pop("agreed", None)
    return ModelPush(Path(folder), repo_id, token, release, **{"files": {}} | asked).run(agreed)


def plan_push(folder: Path, repo_id: str, *, token: str, release: Release, **asked: Any) -> PushPlan:
    return ModelPush(Path(folder), repo_id, token, release, **{"files": {}} | asked).plan()


def _is_plain(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
