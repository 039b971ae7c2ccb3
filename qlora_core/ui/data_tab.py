"""The Data tab: choose a dataset, see its problems, see what the model will see and what would be cut, prepare it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core import jobs
from qlora_core.data import hub_source
from qlora_core.data.detection import Detection, columns_text, mapping_for
from qlora_core.data.formats import detection_of
from qlora_core.data.inspected import REPORT, Inspected, folder_of
from qlora_core.data.locate import LINEAGE
from qlora_core.data.near_duplicates import LOWEST
from qlora_core.data.rows import counted
from qlora_core.errors import DatasetError, LabError
from qlora_core.settings import Settings
from qlora_core.ui import form, preview
from qlora_core.ui.chosen import Chosen, recalled, rows_of, to_remember
from qlora_core.ui.dataset_report import near_html, problems_html, report_html
from qlora_core.ui.identity import Identity, secret_of
from qlora_core.ui.preparing import PreparePanel, merge_job
from qlora_core.ui.progress import progress_html
from qlora_core.ui.rows_view import RowsView
from qlora_core.ui.uploads import keep_upload
from qlora_core.ui.words import esc, hint, problems_panel, waiting

# Larger files are looked at by a process of their own, with progress; smaller ones are done before it would have started.
LARGE_BYTES = 30_000_000
TICK_SECONDS = 0.7
# Roles of columns that a person can choose, as the Data tab names them.
ROLES = {
    "prompt": "Prompt",
    "response": "Response",
    "input": "Input (optional)",
    "system": "System prompt (optional)",
    "messages": "or: conversation",
    "text": "or: plain text",
}
LEAVE_OUT = "tick “Leave the listed rows out”"
NOTHING = Chosen(path="")
NOT_SEVERAL: tuple[tuple[Path, ...], str] = ((), "")


def example() -> Chosen:
    config = form.example_config()
    return Chosen(path=config.data, eval_path=config.eval_data, is_example=True)


class DataTab:
    """Builds the tab's components; `connect` wires them once the Train form exists, whose model the preview uses."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Nothing until the page has loaded: after a restart of the app an open page must not train on the example unasked.
        self.chosen = gr.State(NOTHING)
        # What was looked at last, whether or not it can be used: its columns may yet be told.
        self.looked = gr.State(NOTHING)
        # Another value each time that a dataset has been looked at.
        self.picked = gr.State(0.0)
        # Several files that are to be one dataset, and the columns of those in no known form.
        self.several = gr.State(NOT_SEVERAL)
        self.job = gr.State("")
        # What this browser chose last: an upload, a prepared set, or a job under way; a reload takes it up again. The fixed
        # secret only keeps it readable after a restart of the app: it hides nothing, and what comes back is checked.
        self.remembered = gr.BrowserState("", storage_key="qlora-lab-dataset", secret="qlora-lab-upload")
        self.timer = gr.Timer(TICK_SECONDS, active=False)
        gr.HTML('<div class="lab-step"><i>1</i>Choose a dataset</div>')
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._build_sources()
            with gr.Column(scale=3, min_width=280):
                self.report = gr.HTML(waiting("Reading the example…"), min_height=150, elem_id="report")
                self.progress = gr.HTML("", elem_id="data-progress")
                self.cancel = gr.Button("Cancel", size="sm", visible=False, elem_id="cancel-data")
                self.problems = gr.HTML("", elem_id="problems")
                self.skip = gr.Checkbox(
                    label="Leave the listed rows out", info="They are listed with the run too.", visible=False
                )
                self.use = gr.Button("Use this dataset", variant="primary", size="md", elem_id="use-dataset")
        self._build_columns()
        with gr.Row(elem_classes="lab-pager lab-beside"):
            self.eval_file = gr.UploadButton(
                "Evaluate on another file",
                size="sm",
                min_width=190,
                scale=0,
                elem_id="eval-file",
            )
            self.near = gr.Button("Find near duplicates at", size="sm", min_width=180, scale=0, elem_id="find-near")
            self.similarity = gr.Number(
                0.8, step=0.05, show_label=False, label="similarity of near duplicates",
                container=False, min_width=90, scale=0, elem_id="near-similarity",
            )  # fmt: skip
            self.overlap = gr.HTML('<p class="lab-hint">&nbsp;</p>', elem_id="overlap", min_width=60)
        self.near_found = gr.HTML("", elem_id="near-found")
        self.rows = RowsView(settings)
        self.prepare = PreparePanel(settings)

    def _build_sources(self) -> None:
        self.file = gr.File(
            label="Drop dataset files",
            file_count="multiple",
            height=150,
            elem_id="upload",
        )
        gr.HTML(hint("JSONL, JSON, CSV, TSV or Parquet, each also .gz; several at once"))
        self.example = gr.Button("Take the example: support tickets", size="md", elem_id="take-example")
        with gr.Accordion("From the Hugging Face Hub", open=False, elem_id="hub-source"):
            self.hub_id = gr.Textbox(
                label="Dataset", placeholder="owner/name, or its address", max_lines=1, elem_id="hub-id"
            )
            with gr.Row():
                self.hub_config = gr.Textbox(label="Configuration", placeholder="automatic", max_lines=1, min_width=90)
                self.hub_split = gr.Textbox(label="Split", placeholder="train", max_lines=1, min_width=90)
            with gr.Row():
                self.hub_revision = gr.Textbox(label="Revision", placeholder="newest", max_lines=1, min_width=90)
                self.hub_limit = gr.Textbox(label="Rows at most", placeholder="all", max_lines=1, min_width=90)
            self.fetch = gr.Button("Fetch", size="md", elem_id="hub-fetch")

    def _build_columns(self) -> None:
        with gr.Accordion("Columns", open=False, visible=False, elem_id="columns") as self.columns_box:
            self.columns_why = gr.HTML("")
            with gr.Row():
                self.columns = {
                    role: gr.Dropdown([""], value="", label=label, min_width=150, elem_id=f"column-{role}")
                    for role, label in ROLES.items()
                }
            self.read_columns = gr.Button("Read the rows so", size="md", elem_id="read-columns")

    @property
    def outputs(self) -> list[Any]:
        """All that a look at a dataset may change."""
        states = [self.remembered, self.chosen, self.looked, self.several, self.picked, self.rows.row, self.job]
        shown = [self.report, self.problems, self.skip, self.use, self.progress, self.cancel, self.timer]
        columns = [self.columns_box, self.columns_why, *self.columns.values()]
        return [*states, *shown, self.file, self.overlap, self.near_found, *columns, *self.prepare.outputs]

    def connect(
        self, base_model: gr.Dropdown, train_fields: dict[str, Any], identity: Identity, hidden: dict[str, Any]
    ) -> Any:
        """Wire the tab; returns the trigger after which another dataset is chosen."""
        self._connect_sources(identity, hidden)
        self.prepare.connect(self, base_model, identity, hidden)
        self.skip.input(self.set_skip, [self.chosen, self.several, self.skip], self.outputs, **hidden)
        self.cancel.click(self.cancel_job, self.job, self.outputs, **hidden)
        self.rows.connect(self.chosen, base_model, train_fields, hidden)
        return self.picked.change

    def _connect_sources(self, identity: Identity, hidden: dict[str, Any]) -> None:
        self.file.upload(self.take_upload, self.file, self.outputs, **hidden)
        self.file.clear(lambda: self._nothing("Drop a file, or take the example."), None, self.outputs, **hidden)
        self.example.click(lambda: None, None, self.file, **hidden).then(
            self.take_example, None, self.outputs, **hidden
        )
        hub = [identity.token, self.hub_id, self.hub_config, self.hub_split, self.hub_revision, self.hub_limit]
        self.fetch.click(self.take_hub, hub, self.outputs, **hidden)
        columns = [self.looked, self.several, *self.columns.values()]
        self.read_columns.click(self.take_columns, columns, self.outputs, **hidden)
        self.eval_file.upload(self.take_eval, [self.eval_file, self.chosen], self.outputs, **hidden)
        # What is inside a closed accordion does not hear of new choices.
        self.columns_box.expand(self.columns_now, self.looked, list(self.columns.values()), **hidden)
        self.near.click(self.find_near, [self.chosen, self.similarity], self.outputs, **hidden)
        self.timer.tick(self.tick, [self.job, self.chosen, self.looked], self.outputs, **hidden)

    def on_load(self, demo: gr.Blocks, hidden: dict[str, Any]) -> None:
        """What the page opens with, looked at: what this browser chose last, or the example."""
        demo.load(self.first_look, self.remembered, self.outputs, **hidden)

    # --- where a dataset comes from

    def first_look(self, remembered: str = "") -> dict[Any, Any]:
        job_id, _, before = str(remembered).removeprefix("job:").partition("|")
        if str(remembered).startswith("job:") and (job := jobs.find(job_id, self.settings)) is not None:
            # Until it ends, and where it ends in nothing, there is what was chosen before, or the example.
            chosen = recalled(before, self.settings)
            return self.look(chosen or example()) | self._watch(job, chosen or NOTHING)
        return self.look(recalled(str(remembered), self.settings) or example())

    def take_example(self) -> dict[Any, Any]:
        return self.look(example())

    def take_upload(self, files: list[str]) -> dict[Any, Any]:
        kept = tuple(keep_upload(Path(file), self.settings) for file in files)
        return self.look(Chosen(path=str(kept[0]))) if len(kept) == 1 else self._merge(kept, "")

    def _merge(self, paths: tuple[Path, ...], columns: str, *, skip_bad_rows: bool = False) -> dict[Any, Any]:
        """Several files as one dataset; where one is in no known form, its columns are asked for first."""
        several, problems, unread = (paths, columns), [], []
        for path in paths:
            try:
                detection = detection_of(path, self.settings.limits)
                if detection.form is None and not (detection.seen and mapping_for(detection, columns)):
                    unread.append((path, detection))
            except LabError as error:
                problems += error.problems
        problems += [f"{path.name}: {detection.reason}" for path, detection in unread if not detection.seen]
        if problems:
            return self._unusable("These files cannot be used together", tuple(problems))
        if unread:
            path, detection = unread[0]
            asked = self._columns_of(replace(detection, reason=f"In {path.name}, {detection.reason}"), NOTHING)
            return {**self._nothing(f"Say under Columns how {path.name} is read."), **asked, self.several: several}
        try:
            job = merge_job(paths, self.settings, columns=columns, skip_bad_rows=skip_bad_rows)
        except LabError as error:
            return self._unusable("These files cannot be used together", error.problems)
        # The dataset that was there before is not what these files are for.
        nothing = self._nothing("Reading the files …")
        return {
            **nothing,
            **self._watch(job),
            self.several: several,
            self.skip: gr.Checkbox(value=skip_bad_rows, visible=False),
        }

    def take_hub(
        self, signed_in: gr.OAuthToken | None, typed: str, name: str, config: str, split: str, revision: str, limit: str
    ) -> dict[Any, Any]:
        try:
            source = hub_source.HubDataset.parse(name or "")
            given = {"config": config, "split": split, "revision": revision}
            source = replace(source, **{key: value.strip() for key, value in given.items() if (value or "").strip()})
            # Read back from its text: what is typed into the other fields must not become part of another.
            source = hub_source.HubDataset.parse(str(source))
            arguments = ["inspect", str(source), "--keep", "--json"]
            if limit.strip():
                if not limit.strip().isdecimal() or int(limit) < 2:
                    raise LabError(f"rows at most: {limit.strip()!r} is no whole number above 1")
                arguments += ["--limit", limit.strip()]
        except LabError as error:
            return self._unusable("This dataset cannot be fetched", error.problems)
        secret = secret_of(typed, signed_in)
        return self._watch(jobs.start(arguments, self.settings, secret=secret, again=True))

    def take_columns(self, looked: Chosen, several: tuple[tuple[Path, ...], str], *names: str) -> dict[Any, Any]:
        columns = columns_text({role: name for role, name in zip(ROLES, names, strict=True) if name})
        if several[0]:  # each file in no known form has its own
            return self._merge(several[0], "; ".join(filter(None, (several[1], columns))))
        return self.look(replace(looked, columns=columns), choosing=True)

    # --- looking at it

    def look(self, chosen: Chosen, *, choosing: bool = False) -> dict[Any, Any]:
        """Inspect it here and now, or have a large one inspected by a job."""
        if not chosen.path:
            return self._unusable("No dataset is chosen", ("drop a file, or take the example",))
        try:
            size = chosen.file.stat().st_size
            folder = folder_of(chosen.file, self.settings, columns=chosen.columns)
            packed = chosen.file.suffix.lower() in (".gz", ".parquet")
            if size > LARGE_BYTES / (10 if packed else 1) and not (folder / REPORT).exists():
                columns = ["--columns", chosen.columns] if chosen.columns else []
                arguments = ["inspect", str(chosen.file), "--keep", "--json", *columns]
                return {**self._watch(jobs.start(arguments, self.settings, again=True)), self.looked: chosen}
            return self._looked(chosen, rows_of(chosen, self.settings))
        except LabError as error:
            problems = error.problems
        except OSError as error:  # deleted since it was chosen
            problems = (f"{chosen.name}: cannot be read: {error.strerror}",)
        if choosing:  # another choice of columns may do
            return {self.problems: problems_panel(problems, title="These columns cannot be read")}
        return self._unusable(f"{chosen.name} cannot be used", problems)

    def _looked(self, chosen: Chosen, rows: Inspected) -> dict[Any, Any]:
        report = rows.report
        kept = replace(
            chosen,
            path=chosen.path if report.rows else "",
            rows=report.rows,
            bad_rows=report.bad_rows,
            stamp=rows.folder.name,
        )
        return {
            self.remembered: to_remember(chosen, self.settings),
            self.chosen: kept,
            self.looked: chosen,
            self.picked: time.time(),
            self.several: NOT_SEVERAL,
            self.overlap: self._overlap_of(kept),
            self.near_found: "",
            self.rows.row: 1,
            self.report: report_html(report, chosen),
            self.problems: problems_html(report, rows, self.settings),
            self.skip: gr.Checkbox(value=False, visible=bool(report.bad_rows and report.rows)),
            self.use: _use(kept, bool(report.bad_rows)),
            **self._quiet(),
            **self._columns_of(report.detection, chosen),
            **self.prepare.of(chosen, report),
        }

    def _overlap_of(self, chosen: Chosen) -> str:
        """How many of the rows to evaluate on are also trained on."""
        if not chosen.path or not chosen.eval_file:
            return hint("")
        try:
            rows, shared = preview.shared_rows(chosen, chosen.eval_file, self.settings)
        except (LabError, OSError):
            return hint("")
        told = f"{shared:,} of the {counted(rows, 'row')} of {chosen.eval_file.name} are also trained on"
        return f'<p class="lab-warn">{esc(told)}</p>' if shared else hint(told.replace("0 of", "None of", 1))

    def take_eval(self, file: str, chosen: Chosen) -> dict[Any, Any]:
        """Evaluate on that file instead of on rows that are held out."""
        kept = keep_upload(Path(file), self.settings)
        try:
            if not chosen.path:
                raise DatasetError("choose the rows to train on first")
            report = rows_of(Chosen(str(kept), columns=chosen.columns), self.settings).report
            if not report.rows or (report.bad_rows and not chosen.skip_bad_rows):
                raise DatasetError(
                    f"{kept.name}: {counted(report.bad_rows, 'row')} cannot be used: {report.detection.reason}",
                    *(f"{kept.name} {problem}" for problem in report.problems[:20]),
                )
        except LabError as error:
            return {self.problems: problems_panel(error.problems, title="Not evaluated on this file")}
        return self.look(replace(chosen, eval_path=str(kept), is_example=False))

    def find_near(self, chosen: Chosen, similarity: float) -> dict[Any, Any]:
        if not chosen.path:
            return {self.near_found: hint("Choose a dataset first.")}
        if not LOWEST <= float(similarity or 0) <= 1:
            wrong = f"similarity is {similarity or 0:g}; it must lie between {LOWEST} and 1, such as 0.8"
            return {self.near_found: problems_panel((wrong,), title="Not compared")}
        columns = ["--columns", chosen.columns] if chosen.columns else []
        near = ["--near-duplicates", f"{float(similarity):g}"]
        job = jobs.start(["inspect", str(chosen.file), "--keep", "--json", *columns, *near], self.settings, again=True)
        return {**self._watch(job, chosen), self.near_found: "", self.problems: gr.skip()}

    def columns_now(self, looked: Chosen) -> list[Any]:
        """The choices of columns, for drop-downs that have just come into sight."""
        if not looked.path:
            return [gr.skip() for _ in self.columns]
        try:
            found = self._columns_of(rows_of(looked, self.settings).report.detection, looked)
        except (LabError, OSError):
            return [gr.skip() for _ in self.columns]
        return [found[box] for box in self.columns.values()]

    def _columns_of(self, detection: Detection, chosen: Chosen) -> dict[Any, Any]:
        unsure = detection.form is None
        proposed = detection.proposal or {role: names[0] for role, names in detection.columns.items() if chosen.columns}
        choices = ["", *detection.seen]
        remedy = "; say which column is what" + (", or take the proposal." if detection.proposal else ".")
        why = detection.reason + (remedy if unsure else ".")
        return {
            self.columns_box: gr.Accordion(visible=bool(detection.seen), open=unsure),
            self.columns_why: hint(why[:1].upper() + why[1:]),
            **{
                box: gr.Dropdown(choices=choices, value=proposed.get(role, "") if proposed.get(role) in choices else "")
                for role, box in self.columns.items()
            },
        }

    def _nothing(self, told: str) -> dict[Any, Any]:
        """No dataset is chosen."""
        return {
            self.chosen: NOTHING,
            self.looked: NOTHING,
            self.several: NOT_SEVERAL,
            self.rows.row: 1,
            self.report: waiting(told),
            self.problems: "",
            self.overlap: hint(""),
            self.near_found: "",
            self.skip: gr.Checkbox(visible=False),
            self.use: gr.Button(interactive=False),
            self.columns_box: gr.Accordion(visible=False),
            **self._quiet(),
        }

    def _unusable(self, title: str, problems: tuple[str, ...]) -> dict[Any, Any]:
        nothing = self._nothing("Drop another file, or take the example.")
        # An empty box, so that the next file comes in place of this one.
        return {**nothing, self.problems: problems_panel(problems, title=title), self.file: None}

    def set_skip(self, chosen: Chosen, several: tuple[tuple[Path, ...], str], skip: bool) -> dict[Any, Any]:
        if several[0] and skip:  # they wait to become one dataset
            return self._merge(*several, skip_bad_rows=True)
        return {self.chosen: replace(chosen, skip_bad_rows=skip), self.use: _use(chosen, not skip)}

    # --- work of a process of its own

    def _watch(self, job: jobs.Job, chosen: Chosen = NOTHING) -> dict[Any, Any]:
        """Show the job until it ends; the chosen dataset stays what it is."""
        shown = progress_html(job.progress())
        beside = {}
        if job.arguments[0] == "prepare":  # where the button is that began it
            beside = {self.prepare.result: shown, self.prepare.begin: gr.Button(interactive=False),
                      self.prepare.cancel: gr.Button(visible=True)}  # fmt: skip
        return {
            **beside,
            self.remembered: f"job:{job.job_id}|{to_remember(chosen, self.settings)}",
            self.job: job.job_id,
            self.timer: gr.Timer(active=True),
            self.progress: shown,
            self.cancel: gr.Button(visible=True),
            self.problems: "",
            # What was chosen before is not what this person is waiting for.
            self.use: gr.Button(interactive=False),
        }

    def _quiet(self) -> dict[Any, Any]:
        return {
            self.job: "",
            self.timer: gr.Timer(active=False),
            self.progress: "",
            self.cancel: gr.Button(visible=False),
            self.prepare.begin: gr.Button(interactive=True),
            self.prepare.cancel: gr.Button(visible=False),
        }

    def tick(self, job_id: str, chosen: Chosen, looked: Chosen) -> dict[Any, Any]:
        job = jobs.find(job_id, self.settings)
        progress = job.progress() if job else None
        if job is None or progress is None:
            return self._quiet()
        if progress.state == jobs.RUNNING:
            shown = progress_html(progress)
            return {self.progress: shown} | ({self.prepare.result: shown} if job.arguments[0] == "prepare" else {})
        if progress.state == jobs.DONE:
            if job.arguments[0] == "prepare":
                return self.look(Chosen(path=progress.result["folder"]))
            (path,) = progress.result["paths"]
            if "--near-duplicates" in job.arguments and chosen.path and str(chosen.file) == path:
                similarity = float(job.arguments[job.arguments.index("--near-duplicates") + 1])
                found = near_html(rows_of(chosen, self.settings), similarity, self.settings)
                blocked = bool(chosen.problem(self.settings))
                return {**self._quiet(), self.near_found: found, self.use: _use(chosen, blocked),
                        self.remembered: to_remember(chosen, self.settings)}  # fmt: skip
            if looked.path and str(looked.file) == path:  # with its file to evaluate on
                return self.look(looked)
            columns = job.arguments[job.arguments.index("--columns") + 1] if "--columns" in job.arguments else ""
            is_set = (Path(path).parent / LINEAGE).is_file()
            return self.look(Chosen(path=str(Path(path).parent) if is_set else path, columns=columns))
        preparing = job.arguments[0] == "prepare"
        problems = tuple(p.replace("leave them out with skip_bad_rows", LEAVE_OUT) for p in progress.problems)
        if progress.state == jobs.FAILED and not preparing and "--near-duplicates" not in job.arguments:
            return self._unusable("Not usable", problems)
        use = _use(chosen, bool(chosen.problem(self.settings)))
        quiet = {**self._quiet(), self.remembered: to_remember(chosen, self.settings), self.use: use}
        if progress.state == jobs.CANCELLED:
            told = hint("Cancelled." + (" The dataset above stays." if chosen.path else ""))
            return {**quiet, self.progress: told} | ({self.prepare.result: told} if preparing else {})
        panel = problems_panel(problems, title="Not prepared" if preparing else "Not compared")
        undecided = any(LEAVE_OUT in problem for problem in problems)
        skip = gr.Checkbox(value=False, visible=True) if undecided else gr.skip()
        if preparing and chosen.path:  # what is wrong stands where the button is
            return {**quiet, self.prepare.result: panel, self.skip: skip}
        return {**quiet, self.problems: panel, self.skip: skip} | ({self.prepare.result: ""} if preparing else {})

    def cancel_job(self, job_id: str) -> dict[Any, Any]:
        if (job := jobs.find(job_id, self.settings)) is not None:
            job.cancel()
        return {self.progress: hint("Cancelling …")}


def _use(chosen: Chosen, blocked: bool) -> gr.Button:
    return gr.Button(interactive=bool(chosen.path) and not blocked)
