"""The Data tab: choose a dataset, see its problems, see what the model will see, see what would be cut."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_core.charts import LENGTHS_HEIGHT, length_histogram
from qlora_core.data.inspection import DatasetReport, inspect
from qlora_core.data.sample import SAMPLED_ROWS, UNCUT
from qlora_core.errors import LabError
from qlora_core.settings import Settings
from qlora_core.ui import preview
from qlora_core.ui.form import example_config
from qlora_core.ui.plots import plot
from qlora_core.ui.words import counted, esc, facts, problems_panel, size

LISTED = 200


@dataclass(frozen=True)
class Chosen:
    """The dataset that Start will use; `path` is empty while none can be used."""

    path: str
    eval_path: str | None = None
    rows: int = 0
    is_example: bool = False
    skip_bad_rows: bool = False
    bad_rows: int = 0

    def problem(self) -> str | None:
        """Why Start cannot use it, with the remedy; None when it can."""
        name = Path(self.path).name
        if not self.path:
            return "no dataset is chosen; choose one on the Data tab"
        if self.bad_rows and not self.skip_bad_rows:
            bad = counted(self.bad_rows, "row")
            return (
                f"{name} has {bad} that cannot be trained on; mend the file, or tick “Leave the listed rows out” on the "
                "Data tab"
            )
        if self.rows == 1 and not self.eval_path:
            return f"{name} has one usable row, and evaluation needs one of its own; add rows"
        return None

    def config_fields(self) -> dict[str, Any]:
        return {"data": self.path, "eval_data": self.eval_path, "skip_bad_rows": self.skip_bad_rows}


def example() -> Chosen:
    config = example_config()
    return Chosen(path=config.data, eval_path=config.eval_data, is_example=True)


class DataTab:
    """Builds the tab's components; `connect` wires them once the Train form exists, whose model the preview uses."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Nothing until the page has loaded: after a restart of the app an open page must not train on the example unasked.
        self.chosen = gr.State(Chosen(path=""))
        self.row = gr.State(1)
        # The upload that this browser chose last, below <home>/uploads; a reload takes it up again. The fixed secret only
        # keeps it readable after a restart of the app: it hides nothing, and what comes back is checked.
        self.remembered = gr.BrowserState("", storage_key="qlora-lab-upload", secret="qlora-lab-upload")
        gr.HTML('<div class="lab-step"><i>1</i>Choose a dataset</div>')
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.file = gr.File(label="Drop a JSONL file", height=150, elem_id="upload")
                self.example = gr.Button("Take the example: support tickets", size="md", elem_id="take-example")
            with gr.Column(scale=3, min_width=280):
                self.report = gr.HTML(_waiting("Reading the example…"), min_height=150, elem_id="report")
                self.skip = gr.Checkbox(
                    label="Leave the listed rows out", info="They are listed with the run too.", visible=False
                )
                self.use = gr.Button("Use this dataset", variant="primary", size="md", elem_id="use-dataset")
        self.problems = gr.HTML("", elem_id="problems")
        gr.HTML('<div class="lab-step"><i>2</i>What the model will see</div>')
        with gr.Row(elem_classes="lab-pager"):
            self.back = gr.Button("◀ Previous", size="sm", min_width=92, scale=0, elem_id="previous-row")
            self.forward = gr.Button("Next ▶", size="sm", min_width=92, scale=0, elem_id="next-row")
            self.place = gr.HTML('<p class="lab-hint">&nbsp;</p>', elem_id="row-place", min_width=60)
        self.tokens = gr.HTML(_waiting("Loading the tokenizer…"), min_height=286, elem_id="tokens")
        gr.HTML('<div class="lab-step"><i>3</i>Lengths</div>')
        self.sentence = gr.HTML('<p class="lab-hint">&nbsp;</p>', elem_id="lengths-sentence")
        self.histogram = plot(
            length_histogram((), cut_at=0),
            height=LENGTHS_HEIGHT,
            elem_id="chart-lengths",
            label="token lengths of the rows",
        )

    def connect(
        self, base_model: gr.Dropdown, max_seq_length: gr.Number, hidden: dict[str, Any]
    ) -> list[gr.events.Dependency]:
        """Wire the tab; returns the events after which another dataset is chosen."""
        looks = [self.report, self.problems, self.skip, self.use]
        preview_inputs = [self.chosen, self.row, base_model, max_seq_length]
        row_outputs, length_outputs = [self.tokens, self.place], [self.sentence, self.histogram]
        chosen = [
            self.file.upload(self.take_upload, self.file, [self.remembered, self.chosen, self.row, *looks], **hidden),
            self.file.clear(self.take_example, None, [self.remembered, self.chosen, self.row, *looks], **hidden),
            self.example.click(
                lambda: (None, *self.take_example()),
                None,
                [self.file, self.remembered, self.chosen, self.row, *looks],
                **hidden,
            ),
        ]
        self.skip.input(self.set_skip, [self.chosen, self.skip], [self.chosen, self.use], **hidden)
        for event in chosen:
            event.then(self.show_row, preview_inputs, row_outputs, **hidden).then(
                self.show_lengths, [self.chosen, base_model, max_seq_length], length_outputs, **hidden
            )
        for button, by in ((self.back, -1), (self.forward, 1)):
            button.click(
                lambda chosen, row, by=by: turn(chosen, row, by), [self.chosen, self.row], self.row, **hidden
            ).then(self.show_row, preview_inputs, row_outputs, **hidden)
        for field in (base_model, max_seq_length):
            field.change(self.show_row, preview_inputs, row_outputs, **hidden).then(
                self.show_lengths, [self.chosen, base_model, max_seq_length], length_outputs, **hidden
            )
        return chosen

    def on_load(
        self, demo: gr.Blocks, base_model: gr.Dropdown, max_seq_length: gr.Number, hidden: dict[str, Any]
    ) -> gr.events.Dependency:
        """What the page opens with, looked at: this browser's last upload, or the example. Returns the event after which it
        is chosen."""
        looked = demo.load(
            self.first_look,
            self.remembered,
            [self.chosen, self.row, self.report, self.problems, self.skip, self.use],
            **hidden,
        )
        looked.then(
            self.show_row, [self.chosen, self.row, base_model, max_seq_length], [self.tokens, self.place], **hidden
        ).then(self.show_lengths, [self.chosen, base_model, max_seq_length], [self.sentence, self.histogram], **hidden)
        return looked

    def first_look(self, remembered: str = "") -> tuple[Any, ...]:
        kept = preview.kept_upload(remembered, self.settings)
        return self._look(Chosen(path=str(kept)) if kept else example())

    def take_example(self) -> tuple[Any, ...]:
        return ("", *self._look(example()))

    def take_upload(self, file: str) -> tuple[Any, ...]:
        kept = preview.keep_upload(Path(file), self.settings)
        return (f"{kept.parent.name}/{kept.name}", *self._look(Chosen(path=str(kept))))

    def _look(self, chosen: Chosen) -> tuple[Any, ...]:
        """(chosen, row, report, problems, skip, use) of a dataset."""
        path = Path(chosen.path)
        try:
            report = inspect(path, max_row_bytes=self.settings.max_row_bytes)
        except LabError as error:
            panel = problems_panel(error.problems, title=f"{path.name} cannot be used")
            hint = _waiting("Drop another file, or take the example.")
            return Chosen(path=""), 1, hint, panel, gr.Checkbox(visible=False), gr.Button(interactive=False)
        kept = replace(chosen, path=chosen.path if report.rows else "", rows=report.rows, bad_rows=len(report.problems))
        skip = gr.Checkbox(value=False, visible=bool(report.problems and report.rows))
        return kept, 1, report_html(report, chosen), problems_html(report), skip, _use(kept, bool(report.problems))

    def set_skip(self, chosen: Chosen, skip: bool) -> tuple[Any, ...]:
        return replace(chosen, skip_bad_rows=skip), _use(chosen, not skip)

    def show_row(self, chosen: Chosen, row: int, base_model: str, max_seq_length: float) -> tuple[str, str]:
        if not chosen.path:
            return _waiting("Choose a dataset, and its rows appear here as the model will read them."), _hint("")
        rows = min(chosen.rows, SAMPLED_ROWS)
        place = f"Row {row:,} of {chosen.rows:,}"
        if chosen.rows > rows:
            place += f"; the first {rows:,} can be seen here"
        try:
            shown = preview.row_html(
                Path(chosen.path),
                row,
                base_model=base_model,
                max_seq_length=_cut(max_seq_length),
                settings=self.settings,
            )
        except LabError as error:
            shown = problems_panel(error.problems, title="This row cannot be shown")
        return shown, _hint(place)

    def show_lengths(self, chosen: Chosen, base_model: str, max_seq_length: float) -> tuple[str, str]:
        cut = _cut(max_seq_length)
        if not chosen.path:
            return _hint("Choose a dataset to see how long its rows are."), length_histogram((), cut_at=cut).to_json()
        try:
            found = preview.lengths(Path(chosen.path), base_model, self.settings)
        except LabError as error:
            return problems_panel(error.problems, title="Lengths are unknown"), length_histogram(
                (), cut_at=cut
            ).to_json()
        sentence = _hint(preview.lengths_sentence(found, rows=chosen.rows, max_seq_length=cut))
        if found.refused:
            sentence += problems_panel(
                found.refused[:20], title=f"{counted(len(found.refused), 'row')} refused by the model's template"
            )
        return sentence, length_histogram(found.tokens, cut_at=cut).to_json()


def turn(chosen: Chosen, row: int, by: int) -> int:
    """The next or previous row, going round at the ends."""
    rows = max(1, min(chosen.rows, SAMPLED_ROWS))
    return (row - 1 + by) % rows + 1


def report_html(report: DatasetReport, chosen: Chosen) -> str:
    held_out = (
        f"Evaluated on {Path(chosen.eval_path).name}."
        if chosen.eval_path
        else "A tenth of the rows is held out for evaluation; the share is in the Train form."
    )
    notes = [f"{size(report.size_bytes)}"]
    if report.blank_lines:
        notes.append(counted(report.blank_lines, "blank line"))
    if report.byte_order_mark:
        notes.append("byte-order mark skipped")
    if report.ignored_columns:
        named = ", ".join(f"{name} ({rows:,})" for name, rows in list(report.ignored_columns.items())[:8])
        notes.append(f"columns that are not used: {named}")
    if report.duplicates:
        listed = ", ".join(f"{line} = {first}" for line, first in report.duplicates[:12])
        more = " …" if len(report.duplicates) > 12 else ""
        notes.append(f"duplicates are trained on: lines {listed}{more}")
    return (
        f'<div class="lab-card"><h3>{esc(report.file_name)}</h3><p class="lab-hint">{esc(" · ".join(notes))}</p>'
        f'{facts(preview.report_facts(report))}<p class="lab-hint" style="margin-top:10px">{esc(held_out)}</p></div>'
    )


def problems_html(report: DatasetReport) -> str:
    """Line and reason of every problem, the first LISTED of them; empty without any."""
    if not report.problems:
        return ""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in report.problem_counts.items())
    rows = "".join(
        f'<tr><td class="num">{problem.line:,}</td><td>{esc(problem.kind)}</td><td>{esc(problem.message)}</td></tr>'
        for problem in report.problems[:LISTED]
    )
    more = f'<p class="lab-hint">The first {LISTED} are listed.</p>' if len(report.problems) > LISTED else ""
    remedy = "Mend them, or leave them out." if report.rows else "No row is left to train on."
    return (
        f'<div class="lab-problems"><b>{counted(len(report.problems), "row")} cannot be trained on.</b> {remedy} '
        f'{esc(kinds)}.</div><div class="lab-scroll" style="margin-top:8px"><table class="lab-table"><thead><tr>'
        f'<th class="num">line</th><th>kind</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>{more}'
    )


def _use(chosen: Chosen, blocked: bool) -> gr.Button:
    return gr.Button(interactive=bool(chosen.path) and not blocked)


def _cut(value: float | None) -> int:
    """The form's row length while a person may still be typing it."""
    return max(1, int(value)) if value else UNCUT


def _hint(text: str) -> str:
    return f'<p class="lab-hint">{esc(text) or "&nbsp;"}</p>'


def _waiting(text: str) -> str:
    return f'<div class="lab-empty"><p>{esc(text)}</p></div>'
