"""The figures of a report as cards: drawn when they come into sight, saved as PNG, SVG or CSV, curves along another axis."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from qlora_core.report.tables import to_csv
from qlora_core.study_charts import AXES, QUALITY, SMOOTHINGS, loss_curves, table_of, usual_smoothing
from qlora_core.study_results import StudyResults

# Figures that a person may look at along another axis: title -> loss_curves' `what`.
CURVES = {"Training loss": "training", "Evaluation loss while training": "evaluation"}
# Cards of such a ratio of heights may stand beside each other.
ALIKE = 1.7


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "figure"


def figure_cards(results: StudyResults, part: str, some: Mapping[str, go.Figure], into: list[dict[str, Any]]) -> str:
    """Cards of a part; of figures that differ in what is compared alone, the last is shown and the others are folded."""
    groups: dict[str, list[str]] = {}
    for title in some:
        groups.setdefault(title.partition(": ")[0], []).append(title)
    wide = _wide({titles[-1]: some[titles[-1]].layout.height for titles in groups.values()})
    cards = folds = ""
    for titles in groups.values():
        *folded, last = [_card(results, title, some[title], into, part) for title in titles]
        cards += f'<div class="wide">{last}</div>' if titles[-1] in wide else last
        if folded:
            names = ", ".join(title.partition(": ")[2] for title in titles[:-1])
            summary = f"<summary>{esc(titles[0].partition(': ')[0])}: {esc(names)}</summary>"
            folds += f'<details class="card">{summary}<div class="grid">{"".join(folded)}</div></details>'
    return f'<div class="grid">{cards}</div>{folds}'


def _wide(heights: Mapping[str, int]) -> set[str]:
    """Which cards take a whole row, so that none stands beside a much higher one, and none alone beside nothing."""
    left, found = list(heights), set()
    while left:
        one, *others = left
        alike = bool(others) and max(heights[one], heights[others[0]]) <= ALIKE * min(heights[one], heights[others[0]])
        if not alike:
            found.add(one)
        left = left[2 if alike else 1 :]
    return found


def _card(results: StudyResults, title: str, figure: go.Figure, into: list[dict[str, Any]], part: str) -> str:
    entry = {
        "figure": json.loads(figure.to_json()),
        "csv": to_csv(table_of(figure)),
        "file": f"{slug(results.name)}-{slug(title)}",
    }
    choices = ""
    if part == QUALITY and title in CURVES:
        entry |= _curve_choices(results, CURVES[title])
        choices = _select("axis", "along", {name: name for name in AXES}, "step")
        if CURVES[title] == "training":
            choices += _select("smoothing", "smoothing", {name: name for name in SMOOTHINGS}, usual_smoothing(results))
    into.append(entry)
    buttons = "".join(
        f'<button type="button" data-save="{kind}" aria-label="{esc(title)} as {kind.upper()}">{kind.upper()}</button>'
        for kind in ("png", "svg", "csv")
    )
    plot = f'<div class="plot" role="img" aria-label="{esc(title)}" style="height:{figure.layout.height}px"></div>'
    tools = f'<div class="tools">{choices}<span class="right">{buttons}</span></div>'
    return f'<div class="card figure" data-figure="{len(into) - 1}">{plot}{tools}</div>'


def _select(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    shown = "".join(
        f'<option value="{value}"{" selected" * (value == chosen)}>{text}</option>' for value, text in options.items()
    )
    return f'<label>{label} <select name="{name}">{shown}</select></label>'


def _curve_choices(results: StudyResults, what: str) -> dict[str, Any]:
    """What to change of the drawn curves for another axis or smoothing: plotly's update of traces and of the layout."""
    along = {axis: loss_curves(results, axis, what=what) for axis in AXES}
    entry: dict[str, Any] = {
        "axis": {
            axis: {
                "update": {"x": [list(trace.x) for trace in figure.data]},
                "layout": {"xaxis.title.text": figure.layout.xaxis.title.text},
            }
            for axis, figure in along.items()
        }
    }
    if what == "training":
        smoothed = {name: loss_curves(results, smoothing=weight) for name, weight in SMOOTHINGS.items()}
        entry["smoothing"] = {
            name: {
                "update": {"y": [list(trace.y) for trace in figure.data]},
                "layout": {"title.subtitle.text": figure.layout.title.subtitle.text},
            }
            for name, figure in smoothed.items()
        }
    return entry
