"""The versions of a model on the Hub, compared with each other, and the way back to one of them. Keeps nothing."""

from itertools import zip_longest
from typing import Any

import gradio as gr

from qlora_core import hub
from qlora_core.errors import LabError
from qlora_core.hub import RepoType, RolledBack, Version
from qlora_core.ui.identity import Identity, secret_of
from qlora_core.ui.pushing import NO_TOKEN, repository
from qlora_core.ui.words import empty, esc, problems_panel

KINDS = [("model", "model"), ("dataset or report", "dataset")]
HEADER = ("version", "what", "measured", "against the one before", "rows", "commit")


class VersionsPart:
    def __init__(self) -> None:
        with gr.Accordion("Versions on the Hub", open=False, elem_id="versions"):
            self.kind = gr.Radio(KINDS, value="model", label="Of a", elem_id="versions-kind")
            self.show = gr.Button("Show versions of the repository above", elem_id="versions-show")
            self.table = gr.HTML("", elem_id="versions-table")
            with gr.Row(visible=False, elem_classes="lab-ask", elem_id="versions-back") as self.back:
                self.version = gr.Dropdown([], label="Version", min_width=180, elem_id="versions-version")
                self.force = gr.Checkbox(
                    label="Also over what others changed there", value=False, min_width=220, elem_id="versions-force"
                )
                self.look = gr.Button("What would change", elem_id="versions-look")
            self.told = gr.HTML("", elem_id="versions-told")
            self.go = gr.Button("Go back to it", variant="stop", visible=False, elem_id="versions-go")
            self.seen = gr.State("")

    def connect(self, repo: gr.Textbox, identity: Identity, hidden: dict[str, Any]) -> None:
        listed = [self.table, self.back, self.version, self.told, self.go, self.seen]
        asked = [repo, self.kind, identity.token, self.version, self.force]
        self.show.click(self.list, asked[:3], listed, **hidden)
        # Another repository has other versions; going back to one of these would ask that one for them.
        gr.on([repo.change, self.kind.input], self.nothing, None, listed, **hidden)
        shown = [self.told, self.go, self.seen]
        self.look.click(self.plan, asked, shown, **hidden)
        gr.on([self.version.input, self.force.input], nothing_shown, None, shown, **hidden)
        self.go.click(self.roll_back, [*asked, self.seen], shown, **hidden).then(
            self.list_again, asked[:3], listed[:3], **hidden
        )

    def list(self, signed_in: gr.OAuthToken | None, repo: str, kind: RepoType, typed: str) -> tuple[Any, ...]:
        return *self.list_again(signed_in, repo, kind, typed), *nothing_shown()

    def nothing(self) -> tuple[Any, ...]:
        return "", gr.Row(visible=False), gr.Dropdown(choices=[], value=None), *nothing_shown()

    def list_again(self, signed_in: gr.OAuthToken | None, repo: str, kind: RepoType, typed: str) -> tuple[Any, ...]:
        """What was told of the way back stays."""
        try:
            found = hub.versions(repository(repo), secret_of(typed, signed_in), kind=kind)
        except LabError as error:
            return problems_panel(error.problems, title="No versions"), gr.Row(visible=False), gr.skip()
        names = [version.version for version in found if not version.current]
        versions = gr.Dropdown(choices=names, value=next(iter(names), None))
        return versions_html(found), gr.Row(visible=bool(names)), versions

    def plan(
        self, signed_in: gr.OAuthToken | None, repo: str, kind: RepoType, typed: str, version: str | None, force: bool
    ) -> tuple[Any, ...]:
        """What going back would change, and the button for just that."""
        told = self._back(secret_of(typed, signed_in), repo, kind, version, plan=True, force=force)
        if not isinstance(told, RolledBack):
            return told, *nothing_shown()[1:]
        changes = bool(told.restores or told.removes)
        return told_html(told, plan=True), gr.Button(f"Go back to {told.version}", visible=changes), told.commit

    def roll_back(
        self, signed_in: gr.OAuthToken | None, repo: str, kind: RepoType, typed: str, version: str | None, force: bool,
        seen: str,
    ) -> tuple[Any, ...]:  # fmt: skip
        told = self._back(secret_of(typed, signed_in), repo, kind, version, force=force, seen=seen)
        return told_html(told, plan=False) if isinstance(told, RolledBack) else told, *nothing_shown()[1:]

    def _back(self, secret: str | None, repo: str, kind: RepoType, version: str | None, **how: Any) -> RolledBack | str:
        """What hub.rollback says, or a panel of all that is in the way."""
        problems = [
            text for text, missing in ((NO_TOKEN, not secret), ("no version is chosen", not version)) if missing
        ]
        try:
            if not problems:
                return hub.rollback(repository(repo), str(version), str(secret), kind=kind, **how)
        except LabError as error:
            problems += error.problems
        return problems_panel(problems, title="Nothing has changed")


def nothing_shown() -> tuple[Any, ...]:
    """What is told of a way back, its button, and the commit that it was told of."""
    return "", gr.Button(visible=False), ""


def versions_html(found: list[Version]) -> str:
    """Newest first; each compared with the next older one that has the same measure."""
    if not found:
        return empty("No versions yet", "Each push makes one, tagged v1, v2 and so on.")
    rows = "".join(_row(version, before) for version, before in zip_longest(found, found[1:]))
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    return f'<div class="lab-scroll"><table class="lab-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(version: Version, before: Version | None) -> str:
    release, now = version.release, " · now" if version.current else ""
    if release is None:
        told = ("not made here", "–", "–", "–")
    else:
        change = hub.change(version, before) or "–"
        told = (release.what, hub.measured(release) or "nothing", change, release.dataset_fingerprint[:8])
    return "".join(
        ["<tr>", *(f"<td>{esc(text)}</td>" for text in (version.version + now, *told, version.commit[:8])), "</tr>"]
    )


def told_html(back: RolledBack, *, plan: bool) -> str:
    if not (back.restores or back.removes):
        return f'<p class="lab-hint">The main branch holds {esc(back.version)} already.</p>'
    items = "".join(
        f"<li>{doing} {esc(', '.join(names))}</li>"
        for doing, names in (("restores", back.restores), ("removes", back.removes))
        if names
    )
    title = (
        f"Going back to {back.version} is one new commit that"
        if plan
        else f"Back at {back.version}, commit {back.commit[:8]}"
    )
    return f'<div class="lab-card"><h3>{esc(title)}</h3><ul>{items}</ul></div>'
