"""The buttons of a push and what it says: its job, what must be agreed to first, cancel, the outcome. Knows not what is pushed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from qlora_core import jobs
from qlora_core.errors import ConfigError, LabError
from qlora_core.hub import Also, RepoType, probe
from qlora_core.settings import Settings
from qlora_core.ui.identity import Identity, elsewhere, scope_of, secret_of
from qlora_core.ui.job_view import JobView
from qlora_core.ui.words import esc, problems_panel

PROVEN = "Downloaded again and loaded: the logits are equal."
NO_TOKEN = "nobody is known to the Hub; open “Hugging Face account” at the top, and sign in or type a token"
NO_TOKEN_FOR_CLIENT = "token is missing; pass one with write permission, or set HF_TOKEN where the app is started"
NO_REPOSITORY = "no repository is named; write name or owner/name"
CHANGED = "It is no longer what was shown before; look again."
ASKING = '<p class="lab-hint" role="status">Asking the Hub whether this can be pushed …</p>'


@dataclass(frozen=True)
class Wish:
    """A push as it was asked for: the command line, and into which repositories, by name -> "model" or "dataset"."""

    arguments: list[str]
    repositories: Mapping[str, RepoType]
    private: bool
    also: tuple[Also, ...] = ()


class Pushing:
    """`wish(*values)` says what the values of `connect`'s inputs ask for; LabError tells all that is missing."""

    def __init__(self, settings: Settings, name: str, wish: Callable[..., Wish]) -> None:
        self.settings, self.wish = settings, wish
        self.who = gr.HTML("", min_height=28, elem_id=f"{name}-who")
        with gr.Row(equal_height=True):
            self.look = gr.Button("What would change", elem_id=f"{name}-plan")
            self.push = gr.Button("Push", variant="primary", elem_id=f"{name}-go")
        # The last push of this browser, by its job, whose name nobody can guess: a reload finds it again, and nobody else does.
        # The page renders it outside of the tabs: what is in one that was not opened yet has no value.
        self.remembered = gr.BrowserState("", storage_key=f"qlora-lab-{name}", secret="qlora-lab-push", render=False)
        self.view = JobView(settings, name, ended=ended_html, failed="Not pushed as asked")
        self.agree = gr.Button("Push just this", visible=False, variant="primary", elem_id=f"{name}-agree")

    @property
    def outputs(self) -> list[Any]:
        return [*self.view.outputs, self.agree]

    def connect(self, inputs: list[Any], identity: Identity, hidden: dict[str, Any]) -> None:
        asked, job, started = [identity.token, *inputs], self.view.job, [*self.outputs, self.remembered]
        self.look.click(self.plan, asked, started, **hidden)
        self.push.click(self.begin, asked, started, **hidden)
        self.agree.click(self.go_on, [job, *asked], started, **hidden)
        self.view.connect(hidden)
        # Only what has ended can be agreed to; while it goes on, the button is hidden by what began it.
        self.view.told.change(self.can_agree, job, self.agree, **hidden)
        # Not of the first, the run or study: another one brings a view of its own. And by a person's hand only: as the page
        # loads, fields change before it is known what they are of.
        gr.on(
            [component.input for component in inputs[1:]],
            self.forget, [job, *inputs], self.outputs, trigger_mode="always_last", **hidden,
        )  # fmt: skip
        identity.line.change(elsewhere, identity.line, self.who, **hidden)

    def plan(self, signed_in: gr.OAuthToken | None, typed: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from self._start(typed, signed_in, values, ["--plan"])

    def begin(self, signed_in: gr.OAuthToken | None, typed: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from self._start(typed, signed_in, values, [])

    def go_on(
        self, signed_in: gr.OAuthToken | None, job_id: str, typed: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """What was shown is agreed to; where something else is asked for by now, that is shown instead."""
        progress = self.view.progress(job_id)
        if progress is None:  # a second click, while the first one still asks the Hub
            return
        if progress.state == jobs.RUNNING:  # or while its push goes on, in whose place no other must come
            yield *self.watch(jobs.find(job_id, self.settings)), job_id
            return
        shown = progress.result.get("agree") if self._is_asked_for(job_id, values) else None
        yield from self._start(typed, signed_in, values, [f"--agreed={shown}" if shown else "--plan"])

    def can_agree(self, job_id: str) -> gr.Button:
        progress = self.view.progress(job_id)
        return gr.Button(visible=bool(progress and progress.result.get("needed")))

    def forget(self, job_id: str, *_: Any) -> tuple[Any, ...]:
        """A plan or a refusal is of what was asked then; what is under way or done stays."""
        progress = self.view.progress(job_id)
        if progress and (progress.state == jobs.RUNNING or "pushed" in progress.result):
            return tuple(gr.skip() for _ in self.outputs)
        return self.watch(None)

    def _is_asked_for(self, job_id: str, values: tuple[Any, ...]) -> bool:
        """Whether the fields ask for just what the job was begun with."""
        job = jobs.find(job_id, self.settings)
        try:
            wished = self.wish(*values).arguments
        except LabError:
            return False
        begun = job.arguments if job else []
        return wished == [one for one in begun if one not in ("--plan", "--json") and not one.startswith("--agreed=")]

    def watch(self, job: jobs.Job | None, otherwise: str = "") -> tuple[Any, ...]:
        return *self.view.watch(job, otherwise), gr.Button(visible=False)

    def _start(
        self, typed: str, signed_in: gr.OAuthToken | None, values: tuple[Any, ...], more: list[str]
    ) -> Iterator[tuple[Any, ...]]:
        """All that is missing or in the way at once, or the job."""
        secret, wish, problems = secret_of(typed, signed_in), None, []
        try:
            wish = self.wish(*values)
        except LabError as error:
            problems += error.problems
        if not secret:
            problems.append(NO_TOKEN)
        if wish and secret:
            yield *self.watch(None, ASKING), gr.skip()
            for name, kind in wish.repositories.items():
                scope = scope_of(typed, signed_in)
                found = probe(secret, name, kind=kind, private=wish.private, also=wish.also, scope=scope)
                told = (problem.removeprefix("account: ") for problem in found.problems)
                problems += [problem for problem in told if problem not in problems]
        if problems:
            yield *self.watch(None, problems_panel(problems, title="This cannot be pushed yet")), gr.skip()
            return
        assert wish is not None, "without one there is a problem"
        job = jobs.start([*wish.arguments, *more, "--json"], self.settings, secret=secret, again=True)
        yield *self.watch(job), job.job_id

    def again(self, remembered: str, source: str) -> tuple[Any, ...]:
        """Outputs that follow this browser's last push of the source, or show how it ended."""
        job = jobs.find(str(remembered), self.settings)
        return self.watch(job if job and job.arguments[:2] == ["push", source] else None)


def target(name: str, info: str = "Made if it is not there.") -> tuple[gr.Textbox, gr.Checkbox]:
    """The fields for where a push goes and who may see it, in the row that is open; `name` begins their element ids."""
    repo = gr.Textbox(
        label="Repository",
        placeholder="name, or owner/name",
        info=info,
        max_lines=1,
        scale=4,
        min_width=220,
        elem_id=f"{name}-repo",
    )
    with gr.Column(scale=2, min_width=160):  # a checkbox by itself would be squeezed beside the field
        public = gr.Checkbox(label="Public", info="Else only you see it.", value=False, elem_id=f"{name}-public")
    return repo, public


def further(name: str) -> tuple[gr.Textbox, gr.Textbox, gr.Checkbox, gr.Checkbox]:
    """The fields that few pushes need, in the row that is open; `name` begins their element ids. See `further_asked`."""
    branch = gr.Textbox(label="Branch", placeholder="main", max_lines=1, min_width=220, elem_id=f"{name}-branch")
    collection = gr.Textbox(
        label="Collection",
        placeholder="none",
        info="Its title. Made if it is not there.",
        max_lines=1,
        min_width=220,
        elem_id=f"{name}-collection",
    )
    with gr.Column(min_width=220):
        pull_request = gr.Checkbox(label="As a pull request", value=False, elem_id=f"{name}-pull-request")
        force = gr.Checkbox(
            label="Over a better version",
            info="Or over what others have changed there.",
            value=False,
            elem_id=f"{name}-force",
        )
    return branch, collection, pull_request, force


def further_asked(
    branch: str | None, collection: str | None, pull_request: bool, force: bool
) -> tuple[list[str], tuple[Also, ...]]:
    """(what the values of `further` add to the command line, what a token must be allowed besides the push). Raises ConfigError."""
    named = {"revision": (branch or "").strip(), "collection": (collection or "").strip()}
    if named["revision"] and pull_request:
        raise ConfigError("a branch is named and a pull request asked for, which goes to the main branch; not both")
    switches = {"pull-request": pull_request, "force": force}
    given = [f"--{option}={value}" for option, value in named.items() if value]
    given += [f"--{option}" for option, on in switches.items() if on]
    wanted: dict[Also, bool] = {"pull request": pull_request, "collection": bool(named["collection"])}
    return given, tuple(one for one, is_wanted in wanted.items() if is_wanted)


def ended_html(result: dict[str, Any]) -> str:
    return planned_html(result) if "plan" in result else pushed_html(result)


def repository(text: str | None) -> str:
    """Raises ConfigError where nothing is named."""
    if not (text or "").strip():
        raise ConfigError(NO_REPOSITORY)
    return str(text).strip()


def planned_html(result: dict[str, Any]) -> str:
    items = "".join(f"<li>{esc(sentence.strip())}</li>" for sentence in result["plan"])
    warned = "".join(f'<p class="lab-warn">{esc(warning)}</p>' for warning in result["warnings"])
    again = f'<p class="lab-hint">{CHANGED}</p>' if result.get("changed") else ""
    return f'<div class="lab-card"><h3>What a push would change</h3>{again}<ul>{items}</ul>{warned}</div>'


def pushed_html(result: dict[str, Any]) -> str:
    """Of each thing the link, the version, and whether what arrived is what is here."""
    collection = link_html(url) if (url := result.get("collection")) else ""
    return "".join(map(_pushed, result["pushed"])) + collection


def link_html(url: str) -> str:
    return f'<a class="lab-link" href="{esc(url)}" target="_blank" rel="noopener">{esc(url)}</a>'


def _pushed(entry: dict[str, Any]) -> str:
    url, proof = entry.get("pull_request") or entry["url"], entry.get("proof")
    changed = "Pushed" if entry["changed"] else "Nothing has changed since the last push"
    version = f", version {esc(entry['version'])}" if entry.get("version") else ""
    shown = ""
    if proof and proof.get("state") == "proven":
        shown = f'<p class="lab-hint">✓ {PROVEN}</p>'
    elif proof:
        why = proof.get("reason") or "its logits differ from those of the model here"
        shown = f'<p class="lab-warn">Not proven: {esc(why)}</p>'
    return f'<p class="lab-hint">{changed}: commit {esc(entry["commit"][:10])}{version}</p>{link_html(url)}{shown}'
