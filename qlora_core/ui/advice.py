"""What the Train tab knows of dataset, model and device -> findings and recommendation as HTML. Slow looks are remembered."""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass

from qlora_core import architecture, devices, models
from qlora_core.config import TrainConfig
from qlora_core.data.sample import RowFacts
from qlora_core.errors import LabError
from qlora_core.planner.device import device_for
from qlora_core.planner.facts import Facts, held_out_rows
from qlora_core.planner.findings import NOTE, STOP, WARN, Finding
from qlora_core.planner.recommendation import Recommendation
from qlora_core.settings import Settings
from qlora_core.targets import Architecture
from qlora_core.ui import form, preview
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.preview import How
from qlora_core.ui.words import esc

REMEMBERED = 32
SEVERITIES = {STOP: ("✕", "Stop"), WARN: ("!", "Warning"), NOTE: ("i", "Note")}
# The page sends a remedy back as it stands on its button; the form checks it as it checks what a person types.
REMEDY = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-remedy]');
  if (button) trigger('select', { remedy: button.dataset.remedy });
});
"""
# The height is fixed, so that nothing below moves while a person types.
FINDINGS_CSS = """
.findings { height: 196px; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--block-background-fill); }
.none { display: grid; place-items: center; color: var(--muted); font-size: .9rem; }
.finding { padding: 10px 14px; border-bottom: 1px solid var(--border-color-primary); border-left: 4px solid var(--tone); }
.finding:last-child { border-bottom: 0; }
.finding h4 { margin: 0; font-size: .95rem; line-height: 1.35; overflow-wrap: anywhere; }
.finding .word, .finding .word span { color: var(--tone) !important; }
.finding .word { margin-right: 6px; white-space: nowrap; }
.finding p { margin: 3px 0 0; font-size: .87rem; color: var(--muted); overflow-wrap: anywhere; }
.finding button { margin-top: 7px; padding: 4px 12px; border: 1px solid var(--border-color-primary); border-radius: 7px;
  font-size: .85rem; font-weight: 600; cursor: pointer; color: var(--body-text-color); background: transparent; }
.finding button:hover { border-color: var(--tone); }
.stop { --tone: var(--failed); } .warn { --tone: var(--stopped); } .note { --tone: var(--queued); }
"""
REASONS_CSS = """
.reasons { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px; max-height: 330px;
  overflow: auto; background: var(--block-background-fill); }
.reasons h4 { margin: 0 0 4px; font-size: .95rem; }
.reasons dl { margin: 0; font-size: .87rem; }
.reasons dt { font-weight: 600; margin-top: 6px; }
.reasons dt.same { font-weight: 400; }
.reasons dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
.reasons .remark { margin: 8px 0 0; color: var(--stopped); font-size: .87rem; font-weight: 600; }
"""


@dataclass(frozen=True)
class Looked:
    """What rows and model say, apart from the settings; None where it could not be found out."""

    rows: RowFacts | None = None
    architecture: Architecture | None = None
    positions: int | None = None
    eval_rows: int = 0
    eval_rows_also_trained: int = 0
    problem: str = ""


class Advice:
    """Remembers what it has looked at: a check on every key must not read files again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seen: OrderedDict[tuple[Chosen, How], Looked] = OrderedDict()
        self.lock = threading.Lock()

    def known(self, chosen: Chosen, how: How) -> Looked | None:
        return self.seen.get((chosen, how))

    def look(self, chosen: Chosen, how: How) -> Looked:
        """Rows of the dataset through the model's tokenizer, and the model's layers: seconds for a new one."""
        rows, shape, positions, evaluation, problems = None, None, None, (0, 0), []
        with self.lock:
            try:
                if chosen.path:
                    rows = preview.lengths(chosen, how, self.settings)
                    if chosen.eval_file:
                        evaluation = preview.shared_rows(chosen, chosen.eval_file, self.settings)
            except LabError as error:
                problems += error.problems
            except OSError as error:  # deleted since it was chosen
                problems.append(f"{chosen.name}: cannot be read: {error.strerror}")
            try:
                shape = architecture.read(how.base_model, self.settings)
                folder = architecture.files_of(how.base_model, ["config.json"], self.settings, what="config.json")
                positions = models.BaseModel("", folder, None, "").positions()
            except LabError as error:
                problems += [problem for problem in error.problems if problem not in problems]
            looked = Looked(rows, shape, positions, *evaluation, problems[0] if problems else "")
            self.seen[chosen, how] = looked
            while len(self.seen) > REMEMBERED:
                self.seen.popitem(last=False)
        return looked

    def facts(self, config: TrainConfig, chosen: Chosen, looked: Looked) -> Facts:
        held_out = 0 if chosen.eval_file else held_out_rows(chosen.rows, config)
        return Facts(
            config=config,
            device=device_for(config),
            train_rows=chosen.rows - held_out,
            eval_rows=looked.eval_rows if chosen.eval_file else held_out,
            free_disk_bytes=devices.free_disk_bytes(self.settings.home),
            eval_rows_also_trained=looked.eval_rows_also_trained,
            rows=looked.rows,
            architecture=looked.architecture,
            positions=looked.positions,
        )


def findings_html(found: list[Finding]) -> str:
    if not found:
        return '<div class="findings none">✓ Nothing to warn of</div>'
    items = "".join(_finding_html(finding) for finding in found)
    return f'<div class="findings" tabindex="0" role="group" aria-label="Findings">{items}</div>'


def waiting_html(text: str) -> str:
    return f'<div class="findings none" role="status">{esc(text)}</div>'


def _finding_html(finding: Finding) -> str:
    sign, word = SEVERITIES[finding.severity]
    button = ""
    if finding.remedy:
        remedy = esc(json.dumps(finding.remedy))
        button = f'<button type="button" data-remedy="{remedy}">{esc(finding.remedy_label)}</button>'
    return (
        f'<div class="finding {finding.severity}"><h4><span class="word"><span aria-hidden="true">{sign}</span> {word}</span>'
        f"{esc(finding.title)}</h4><p>{esc(finding.why)}</p>{button}</div>"
    )


def reasons_html(found: Recommendation, before: TrainConfig) -> str:
    """Each recommended setting with its reason; those that changed in bold, with what they were."""
    items = []
    for change in sorted(found.changes, key=lambda change: getattr(before, change.field) == change.value):
        old = getattr(before, change.field)
        label = form.LABELS.get(change.field, change.field.replace("_", " ").capitalize())
        same = old == change.value
        was = "" if same else f" (was {_shown(old)})"
        items.append(
            f"<dt{' class=same' if same else ''}>{esc(label)}: {esc(_shown(change.value) + was)}</dt><dd>{esc(change.reason)}</dd>"
        )
    remarks = "".join(f'<p class="remark">{esc(remark)}</p>' for remark in found.remarks)
    title = "Filled in, and why" if found.method else "No method fits this device"
    return f'<div class="reasons" tabindex="0"><h4>{title}</h4>{remarks}<dl>{"".join(items)}</dl></div>'


def _shown(value: object) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
