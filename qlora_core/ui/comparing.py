"""What differs between the run that is shown and another, as a table of both. Computes nothing itself."""

from pathlib import Path

from qlora_core.differences import RAN, Difference, run_differences
from qlora_core.errors import LabError
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings
from qlora_core.ui.form import GROUPS, LABELS
from qlora_core.ui.words import METHOD_NAMES, esc, problems_panel, short

FILES = ("data", "eval_data")
TITLES = GROUPS | {RAN: "What it ran on"}
NO_DIFFERENCE = '<p class="lab-hint">No setting differs, and both ran on the same rows, base and versions.</p>'


def differences_html(run_id: str, other_id: str | None, settings: Settings) -> str:
    """Empty without another run."""
    if not other_id:
        return ""
    try:
        run, other = (RunStore(settings).get(name) for name in (run_id, other_id))
        found = run_differences(run, other)
    except LabError as error:
        return problems_panel(error.problems, title="These cannot be compared")
    waited_for = " and ".join(short(one.run_id) for one in (run, other) if one.result() is None)
    if not found and not waited_for:
        return NO_DIFFERENCE
    note = f"Device and versions are compared when {waited_for} has a result." if waited_for else ""
    table = _table(run, other, found) if found else '<p class="lab-hint">No setting differs.</p>'
    return table + (f'<p class="lab-hint">{esc(note)}</p>' if note else "")


def _table(run: Run, other: Run, found: list[Difference]) -> str:
    rows, group = "", None
    for entry in found:
        if entry.group != group:
            group = entry.group
            rows += f'<tr class="group"><th colspan="3" scope="rowgroup">{esc(TITLES[group])}</th></tr>'
        first, second = _shown(entry)
        rows += f"<tr><th scope='row'>{esc(_label(entry))}</th><td>{esc(first)}</td><td>{esc(second)}</td></tr>"
    heads = "".join(
        f"<th>{esc(one.config().run_name())} <span class='lab-id'>{esc(short(one.run_id))}</span></th>"
        for one in (run, other)
    )
    return (
        f'<div class="lab-scroll"><table class="lab-table lab-differences"><thead><tr><th>setting</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _label(entry: Difference) -> str:
    if entry.group == RAN:
        return entry.field
    return {"data": "Dataset", "eval_data": "Evaluation dataset"}.get(
        entry.field, LABELS.get(entry.field, entry.field.replace("_", " ").capitalize())
    )


def _shown(entry: Difference) -> tuple[str, str]:
    """Both values in words: files by name where that tells them apart, hashes by their beginning."""
    words = entry.words()
    if entry.field == "method":
        return METHOD_NAMES[words[0]], METHOD_NAMES[words[1]]
    if entry.field in FILES:
        names = tuple(Path(word).name for word in words)
        parents = tuple(f"{Path(word).parent.name}/{Path(word).name}" for word in words)
        return next(pair for pair in (names, parents, words) if pair[0] != pair[1])
    if entry.field.endswith("SHA-256") or entry.field in ("base revision", "git commit"):
        beginnings = words[0][:12], words[1][:12]
        return beginnings if beginnings[0] != beginnings[1] else words
    return words
