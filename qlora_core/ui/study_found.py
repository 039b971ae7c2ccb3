"""What a study has found, for the page: verdicts and answers as HTML, figures by part. Judges and draws nothing itself."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import plotly.graph_objects as go

from qlora_core.report.page import flat
from qlora_core.report.tables import to_csv
from qlora_core.run_status import ACTIVE
from qlora_core.study import Study
from qlora_core.study_charts import (
    BEHAVIOUR,
    COST,
    QUALITY,
    SMOOTHINGS,
    WEIGHTS,
    loss_curves,
    notes_of,
    sections,
    table_of,
    usual_smoothing,
)
from qlora_core.study_results import StudyResults
from qlora_core.ui.words import empty, esc, hint
from qlora_core.verdicts import Verdict, verdicts

# Beside each other on top: what a person came for.
FIRST = ("Peak memory", "Step time", "Evaluation loss")
# Drawn apart, along the axis that was chosen.
CURVES = {"Training loss": "training", "Evaluation loss while training": "evaluation"}
HOLDS = {"yes": "✓ yes", "no": "✕ no", "unclear": "? unclear"}
SHOWN_ROWS = 12
# Smoothing by the number of steps.
AUTOMATIC = "automatic"
# Whether a yes is good news depends on the question, so it has no colour.
VERDICTS_CSS = """
.verdicts { display: grid; gap: 10px; margin: 2px 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); }
.verdict { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--tone); border-radius: 10px;
  padding: 10px 14px; background: var(--block-background-fill); min-width: 0; }
.verdict.first { grid-column: 1 / -1; min-height: 150px; margin: 0; }
.verdict.yes { --tone: var(--body-text-color); } .verdict.no, .verdict.unclear { --tone: var(--muted); }
.verdict h4 { margin: 0 0 2px; font-size: .88rem; color: var(--muted); font-weight: 600; display: flex; flex-wrap: wrap;
  justify-content: space-between; gap: 0 12px; }
.verdict h4 span { color: var(--tone) !important; white-space: nowrap; }
.verdict p { margin: 0; overflow-wrap: anywhere; }
.verdict.first p.told { font-size: 1.22rem; line-height: 1.4; font-weight: 600; }
.verdict p.rests { margin-top: 5px; font-size: .82rem; color: var(--muted); }
.verdict summary { cursor: pointer; font-size: .82rem; color: var(--muted); margin-top: 4px; }
.verdict dl { margin: 4px 0 0; max-height: 220px; overflow: auto; font-size: .8rem; display: grid;
  grid-template-columns: minmax(0, 1fr) auto; gap: 1px 12px; }
.verdict dt, .verdict dd { margin: 0; font-weight: 400; overflow-wrap: anywhere; }
.verdict dd { text-align: right; font-variant-numeric: tabular-nums; max-width: 260px; }
"""
ANSWERS_CSS = """
.answers { display: grid; gap: 12px; }
.answers section { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px; min-width: 0; }
.answers h4 { margin: 0 0 3px; font-size: .82rem; color: var(--muted); font-weight: 600; }
.answers .each { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 10px 16px;
  margin-top: 8px; padding-top: 8px; border-top: 1px solid var(--border-color-primary); }
.answers pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; background: none; max-height: 190px;
  overflow: auto; }
"""


@dataclass(frozen=True)
class Found:
    """HTML of the practical verdict, of the others and of answers; each part's figures as the value of `plots.gallery`, empty
    where there are none."""

    verdict: str
    others: str
    first: str
    more: str
    weights: str
    behaviour: str
    answers: str
    has_answers: bool


@lru_cache(maxsize=8)
def found(study: Study, _marker: str) -> Found:
    """Read again only when `_marker` changes. Raises RunError, OSError where the study is gone."""
    results = study.results()
    parts = sections(results)
    figures = {title: figure for name in (COST, QUALITY) for title, figure in parts.get(name, {}).items()}
    first = [title for start in FIRST for title in figures if _begins(title, start)]
    more = [title for title in figures if title not in (*first, *CURVES)]
    of = results.name
    practical, *others = verdicts(results)
    return Found(
        verdict=verdicts_html([practical], is_first=True),
        others=verdicts_html(others),
        first=gallery_json({title: figures[title] for title in first}, of),
        more=gallery_json({title: figures[title] for title in more}, of),
        weights=gallery_json(parts.get(WEIGHTS, {}), of),
        behaviour=gallery_json(parts.get(BEHAVIOUR, {}), of),
        answers=answers_html(results),
        has_answers=bool(results.analysis and results.analysis.behaviour),
    )


def _begins(title: str, start: str) -> bool:
    """ "Peak memory, host" is of "Peak memory"; "Evaluation loss while training" is a figure of its own."""
    return title == start or title.startswith(f"{start},")


@lru_cache(maxsize=8)
def curves(study: Study, _marker: str, axis: str, smoothing: str) -> str:
    """The loss curves of all runs, as the value of `plots.gallery`."""
    results = study.results()
    weight = SMOOTHINGS[usual_smoothing(results) if smoothing == AUTOMATIC else smoothing]
    figures = {}
    for title, what in CURVES.items():
        runs = [run for run in results.runs if (run.steps if what == "training" else run.evaluations)]
        if runs:
            figure = loss_curves(results, axis, weight, what=what, notes=notes_of(results))
            # Another axis begins with all of it in sight.
            figures[title] = figure.update_layout(uirevision=f"{results.study_id} {axis}")
    return gallery_json(figures, results.name)


def gallery_json(figures: Mapping[str, go.Figure], study_name: str) -> str:
    """Figures that show the same of other runs, "Cosine similarity: LoRA – QLoRA, rank 2" and so on, share a card."""
    cards: dict[str, list[dict[str, Any]]] = {}
    for title, figure in figures.items():
        card, _, name = title.partition(": ")
        cards.setdefault(card, []).append({
            "name": name,
            "figure": json.loads(figure.to_json()),
            "csv": to_csv(table_of(figure)),
            "file": _file_name(f"{study_name} {title}"),
        })  # fmt: skip
    return json.dumps([{"title": title, "entries": entries} for title, entries in cards.items()]) if cards else ""


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "figure"


def verdicts_html(given: Sequence[Verdict], *, is_first: bool = False) -> str:
    """Each with how sure it is and what it rests on; the first one, which a person came for, is bigger."""
    items = "".join(_verdict(verdict, is_first) for verdict in given)
    return f'<div class="verdicts">{items}</div>' if items else ""


def _verdict(verdict: Verdict, is_first: bool) -> str:
    numbers = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in flat(verdict.numbers))
    more = f'<details><summary>Its numbers</summary><dl tabindex="0">{numbers}</dl></details>' if numbers else ""
    return (
        f'<article class="verdict {esc(verdict.holds)}{" first" if is_first else ""}"><h4>{esc(verdict.title)} '
        f"<span>{HOLDS.get(verdict.holds, esc(verdict.holds))}</span></h4>"
        f'<p class="told">{esc(verdict.sentence)}</p>'
        f'<p class="rests">Sureness {esc(verdict.sureness)}. Rests on {esc(verdict.rests_on)}.</p>{more}</article>'
    )


def answers_html(results: StudyResults) -> str:
    """Held-out rows with the answer of each model beside the others, those first in which the models differ."""
    behaviour = results.analysis.behaviour if results.analysis else None
    if not behaviour or not behaviour["rows"]:
        under_way = results.analysis_state in ACTIVE
        return empty(
            "No answers yet", "The analysis answers held-out rows at the end." if under_way else "No row was answered."
        )
    sources = behaviour["sources"]
    rows = sorted(behaviour["rows"], key=lambda row: -len(set(row["answers"].values())))
    shown = "".join(_answered(row, sources) for row in rows[:SHOWN_ROWS])
    told = f"{min(SHOWN_ROWS, len(rows))} of {len(rows)} held-out rows, those first in which most answers differ."
    more = " All of them are in the report." if len(rows) > SHOWN_ROWS else ""
    return f'<div class="answers">{hint(told + more)}{shown}</div>'


def _answered(row: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    answers = "".join(
        _answer(sources.get(source, {}).get("label") or source, text) for source, text in row["answers"].items()
    )
    return (
        f'<section><h4>line {esc(row["line"])}</h4><pre tabindex="0">{esc(row["prompt"])}</pre>'
        f'<div class="each">{_answer("reference", row["reference"])}{answers}</div></section>'
    )


def _answer(label: str, text: str) -> str:
    return f"<div><h4>{esc(label)}</h4><pre>{esc(text) or '–'}</pre></div>"
