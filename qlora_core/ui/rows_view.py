"""What the model will see, on the Data tab: template and loss, rows as tokens, paging and search, lengths."""

import re
import time
from bisect import bisect_left
from typing import Any

import gradio as gr

from qlora_core.charts import LENGTHS_HEIGHT, length_histogram
from qlora_core.config import TEMPLATES, TrainConfig
from qlora_core.data.inspected import Inspected
from qlora_core.data.rows import counted
from qlora_core.data.sample import SAMPLED_ROWS, UNCUT
from qlora_core.errors import LabError
from qlora_core.settings import Settings
from qlora_core.ui import form, preview
from qlora_core.ui.chosen import Chosen, rows_of
from qlora_core.ui.plots import plot
from qlora_core.ui.preview import How
from qlora_core.ui.words import esc, hint, problems_panel, waiting

SEARCH_SECONDS = 20
OWN = "own"
TEMPLATE_CHOICES = [
    ("the model’s own", "model"),
    ("Alpaca", "alpaca"),
    ("ChatML", "chatml"),
    ("Llama-3", "llama3"),
    ("Mistral", "mistral"),
    ("Zephyr", "zephyr"),
    ("your own (Jinja)", OWN),
]


class RowsView:
    """Its components; `fields` are settings of the run that stand here, `row` the number of the row that is shown."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.row = gr.State(1)
        self.told = gr.State("")
        gr.HTML('<div class="lab-step"><i>2</i>What the model will see</div>')
        config = TrainConfig()
        with gr.Row(equal_height=True, elem_classes="lab-choices"):
            self.template_choice = gr.Radio(
                TEMPLATE_CHOICES, value="model", label="Template", info="How rows are written.", elem_id="template"
            )
            self.fields = {"loss_on": form.component("loss_on", config.loss_on)}
        with gr.Column(visible=False) as self.own_template:
            self.fields["template"] = form.component("template", config.template)
        with gr.Row(elem_classes="lab-pager"):
            self.back = gr.Button("◀ Previous", size="sm", min_width=92, scale=0, elem_id="previous-row")
            self.forward = gr.Button("Next ▶", size="sm", min_width=92, scale=0, elem_id="next-row")
            self.longest = gr.Button("Longest", size="sm", min_width=80, scale=0, elem_id="longest-row")
            self.shortest = gr.Button("Shortest", size="sm", min_width=80, scale=0, elem_id="shortest-row")
            self.find = gr.Textbox(
                show_label=False, label="Find in rows, or go to a row number", placeholder="text, a row number, or line 12",
                max_lines=1, min_width=190, scale=1, container=False, elem_id="find-row",
            )  # fmt: skip
            self.place = gr.HTML('<p class="lab-hint">&nbsp;</p>', elem_id="row-place", min_width=60)
        self.tokens = gr.HTML(waiting("Loading the tokenizer…"), min_height=286, elem_id="tokens")
        gr.HTML('<div class="lab-step"><i>3</i>Lengths</div>')
        self.sentence = gr.HTML('<p class="lab-hint">&nbsp;</p>', elem_id="lengths-sentence")
        self.histogram = plot(
            length_histogram((), cut_at=0),
            height=LENGTHS_HEIGHT,
            elem_id="chart-lengths",
            label="token lengths of the rows",
        )

    def connect(
        self, chosen: gr.State, base_model: gr.Dropdown, train_fields: dict[str, Any], hidden: dict[str, Any]
    ) -> None:
        """`chosen` is the dataset whose rows are shown."""
        how, cut = [base_model, self.fields["template"], self.fields["loss_on"]], train_fields["max_seq_length"]
        row_inputs, row_outputs = [chosen, self.row, *how, cut], [self.tokens, self.place]
        for button, move in (
            (self.back, lambda chosen, row, *_: turn(chosen, row, -1)),
            (self.forward, lambda chosen, row, *_: turn(chosen, row, 1)),
            (self.longest, lambda chosen, row, *how: self.extreme(chosen, row, *how, longest=True)),
            (self.shortest, lambda chosen, row, *how: self.extreme(chosen, row, *how, longest=False)),
        ):
            button.click(move, [chosen, self.row, *how], self.row, **hidden).then(
                self.show_row, row_inputs, row_outputs, **hidden
            )
        self.find.submit(self.find_row, [chosen, self.row, self.find], [self.row, self.told], **hidden).success(
            self.show_found, [self.told, *row_inputs], row_outputs, **hidden
        )
        looked_at = [chosen, *how, cut]
        gr.on(
            [component.change for component in looked_at],
            self.show_row, row_inputs, row_outputs, trigger_mode="always_last", **hidden,
        )  # fmt: skip
        steps = train_fields["rows_per_step"]
        gr.on(
            [component.change for component in (*looked_at, steps)],
            self.show_lengths, [*looked_at, steps], [self.sentence, self.histogram], trigger_mode="always_last", **hidden,
        )  # fmt: skip
        self._connect_template(base_model, hidden)

    def _connect_template(self, base_model: gr.Dropdown, hidden: dict[str, Any]) -> None:
        template = self.fields["template"]

        def choose(choice: str, base_model: str) -> tuple[Any, Any]:
            if choice != OWN:
                return choice, gr.Column(visible=False)
            return preview.template_to_edit(base_model, self.settings), gr.Column(visible=True)

        def follow(text: str) -> tuple[Any, Any]:
            """Where a template came from settings or from a run."""
            own = text not in TEMPLATES
            return gr.Radio(value=OWN if own else text), gr.Column(visible=own)

        self.template_choice.input(choose, [self.template_choice, base_model], [template, self.own_template], **hidden)
        template.change(follow, template, [self.template_choice, self.own_template], **hidden)

    def extreme(self, chosen: Chosen, row: int, *how: Any, longest: bool) -> int:
        """The row with the most, or the fewest, tokens; characters where there are more rows than lengths are known of."""
        try:
            rows = rows_of(chosen, self.settings)
            if len(rows) > SAMPLED_ROWS:
                return (rows.longest() if longest else rows.shortest()) or row
            found = preview.lengths(chosen, How(*how), self.settings)
        except (LabError, OSError):
            return row
        if not found.tokens:
            return row
        place = (max if longest else min)(range(len(found.tokens)), key=found.tokens.__getitem__)
        return _row_at(rows, found.lines[place])

    def find_row(self, chosen: Chosen, row: int, wanted: str) -> tuple[Any, str]:
        """(row, what is told): the row with that number, or the next one that holds the text; else the same row."""
        wanted = (wanted or "").strip()
        if not wanted or not chosen.path:
            return gr.skip(), ""
        if wanted.isdecimal():
            there = 1 <= int(wanted) <= chosen.rows
            return (int(wanted), "") if there else (row, f"There are {counted(chosen.rows, 'row')}")
        deadline = time.monotonic() + SEARCH_SECONDS
        try:
            rows = rows_of(chosen, self.settings)
            if line := re.fullmatch(
                r"(?:line|row)\s+(\d+)", wanted, re.IGNORECASE
            ):  # as problems and duplicates name it
                number = _row_at(rows, int(line[1]))
                is_it = rows.row(number).line == int(line[1])
                return number, "" if is_it else f"{wanted.capitalize()} is no usable row; this is the next one"
            found = rows.search(wanted, row, keep_on=lambda: time.monotonic() < deadline)
        except (LabError, OSError):
            return row, "The file is no longer there"
        if found is None:
            late = time.monotonic() >= deadline
            told = f"“{wanted[:60]}” was not found in {SEARCH_SECONDS} s" if late else f"No row has “{wanted[:60]}”"
            return row, told
        return found, ""

    def show_found(self, told: str, *shown_with: Any) -> tuple[str, str]:
        """The row, and beside it what the search has to tell."""
        shown, place = self.show_row(*shown_with)
        return shown, f'<p class="lab-warn">{esc(told)}</p>' if told else place

    def show_row(
        self, chosen: Chosen, row: int, base_model: str, template: str, loss_on: str, max_seq_length: float
    ) -> tuple[str, str]:
        if not chosen.path:
            return waiting("Choose a dataset, and its rows appear here as the model will read them."), hint("")
        place = f"Row {row:,} of {chosen.rows:,}"
        try:
            shown = preview.row_html(
                chosen,
                row,
                How(base_model, template, loss_on),
                max_seq_length=_cut(max_seq_length),
                settings=self.settings,
            )
        except LabError as error:
            shown = problems_panel(error.problems, title="This row cannot be shown")
        except (IndexError, OSError):  # another dataset has been chosen meanwhile
            return gr.skip(), gr.skip()
        return shown, hint(place)

    def show_lengths(
        self,
        chosen: Chosen,
        base_model: str,
        template: str,
        loss_on: str,
        max_seq_length: float,
        rows_per_step: float = 8,
    ) -> tuple[str, str]:
        cut = _cut(max_seq_length)
        empty = length_histogram((), cut_at=cut).to_json()
        if not chosen.path:
            return hint("Choose a dataset to see how long its rows are."), empty
        try:
            found = preview.lengths(chosen, How(base_model, template, loss_on), self.settings)
        except LabError as error:
            return problems_panel(error.problems, title="Lengths are unknown"), empty
        except OSError:
            return gr.skip(), gr.skip()
        told = preview.lengths_sentence(
            found, rows=chosen.rows, max_seq_length=cut, rows_per_step=max(1, int(rows_per_step or 1))
        )
        sentence = hint(told)
        if found.refused:
            sentence += problems_panel(
                found.refused[:20], title=f"{counted(len(found.refused), 'row')} refused by the template"
            )
        return sentence, length_histogram(found.tokens, cut_at=cut).to_json()


def _row_at(rows: Inspected, line: int) -> int:
    """Number of the usable row at that line of the file, or of the next one; of the last where none follows."""
    numbers = range(1, len(rows) + 1)
    return numbers[min(bisect_left(numbers, line, key=lambda number: rows.row(number).line), len(rows) - 1)]


def turn(chosen: Chosen, row: int, by: int) -> int:
    """The next or previous row, going round at the ends."""
    return (row - 1 + by) % max(1, chosen.rows) + 1


def _cut(value: float | None) -> int:
    """The form's row length while a person may still be typing it."""
    return max(1, int(value)) if value else UNCUT
