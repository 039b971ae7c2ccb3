"""What the tuned models answer: how alike two of them are, and how well each foretells the held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from qlora_core.charts import METHOD_HUES, NEUTRAL
from qlora_core.study_charts.frame import add_dot, by_row, esc, hues, room_for_values
from qlora_core.study_numbers import Arm
from qlora_core.study_results import Analysis

SHARES = (0, 0.25, 0.5, 0.75, 1)


def behaviour_figures(analysis: Analysis | None, found: Sequence[Arm], notes: Sequence[str]) -> dict[str, go.Figure]:
    """Title -> figure, of those that have data."""
    behaviour = analysis.behaviour if analysis else None
    if not behaviour:
        return {}
    figures = {}
    if behaviour["pairs"]:
        figures["Answers equal, token by token"] = agreement(
            behaviour, "token_match", "Answers equal, token by token", "share of tokens that are equal", notes
        )
        figures["Answers alike in meaning"] = agreement(
            behaviour, "embedding_cosine", "Answers alike in meaning", "cosine of the answers' embeddings", notes
        )
    if any(source.get("perplexity") is not None for source in behaviour["sources"].values()):
        figures["Perplexity on held-out rows"] = perplexity(behaviour, found, notes)
    if any(source.get("score") for source in behaviour["sources"].values()):
        figures["Right answers on held-out rows"] = scores(behaviour, found, notes)
    return figures


def ordered(behaviour: Mapping[str, Any], found: Sequence[Arm]) -> dict[str, Any]:
    """Sources in the order of the arms, then the bases, the one in 16 bits first."""
    place = {run.run_id: number for number, arm in enumerate(found) for run in arm.runs}
    return dict(sorted(behaviour["sources"].items(), key=lambda item: (place.get(item[0], len(place)), item[0])))


def label_of(behaviour: Mapping[str, Any], source: str) -> str:
    return behaviour["sources"].get(source, {}).get("label") or source


def agreement(behaviour: Mapping[str, Any], field: str, title: str, unit: str, notes: Sequence[str]) -> go.Figure:
    """A row for each pair of models: the mean over the answered rows with its 95 % interval."""
    known = [pair for pair in behaviour["pairs"] if pair.get(field) is not None]
    labels = [f"{label_of(behaviour, pair['first'])} – {label_of(behaviour, pair['second'])}" for pair in known]
    rows = {pair["rows"] for pair in known}
    figure = by_row(
        title,
        labels,
        unit=unit,
        subtitle=f"Greedy answers to {' or '.join(map(str, sorted(rows)))} held-out rows; line: 95 % interval.",
        notes=notes,
    )
    for row, (label, pair) in enumerate(zip(labels, known, strict=True)):
        low, high = pair[f"{field}_95"]
        add_dot(
            figure, row, label, pair[field], (low, high), colour=NEUTRAL, text=f"{pair[field]:.3f}",
            hover=f"{pair[field]:.3f}, 95 % interval {low:.3f} to {high:.3f}",
        )  # fmt: skip
    lowest = min((pair[f"{field}_95"][0] for pair in known), default=0)
    figure.update_xaxes(range=[min(0, lowest) - 0.03, 1.22], tickvals=SHARES)
    return figure


def _colours(behaviour: Mapping[str, Any], found: Sequence[Arm]) -> dict[str, str]:
    """source -> colour: that of the run's arm; grey for the base, QLoRA's hue for the base in 4 bits."""
    of_arm = hues(found)
    of_run = {run.run_id: of_arm[arm.label] for arm in found for run in arm.runs}
    return {
        source: of_run.get(source, METHOD_HUES["qlora"] if source.startswith("base ") else NEUTRAL)
        for source in behaviour["sources"]
    }


def perplexity(behaviour: Mapping[str, Any], found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    """A bar for each model, the untuned base among them."""
    known = {source: one for source, one in ordered(behaviour, found).items() if one.get("perplexity") is not None}
    figure = by_row(
        "Perplexity on held-out rows",
        [label_of(behaviour, source) for source in known],
        unit="perplexity (lower is better)",
        notes=notes,
    )
    colours = _colours(behaviour, found)
    for row, (source, one) in enumerate(known.items()):
        label, value = label_of(behaviour, source), one["perplexity"]
        figure.add_bar(
            x=[value], y=[row + 0.14], width=0.36, orientation="h", name=esc(label), showlegend=False, text=[f" {value:.2f}"],
            textposition="outside", cliponaxis=False, marker={"color": colours[source]},
            hovertemplate=f"{esc(label)}: perplexity {value:.3f}<extra></extra>",
        )  # fmt: skip
    room_for_values(figure, max(one["perplexity"] for one in known.values()))
    return figure


def scores(behaviour: Mapping[str, Any], found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    """Share of right answers of each model, with Wilson's interval."""
    known = {source: one["score"] for source, one in ordered(behaviour, found).items() if one.get("score")}
    labels = [label_of(behaviour, source) for source in known]
    figure = by_row("Right answers on held-out rows", labels, unit="share of answers that are right", notes=notes)
    colours = _colours(behaviour, found)
    for row, (source, score) in enumerate(known.items()):
        share = score["correct"] / score["total"]
        low, high = score["interval_95"]
        add_dot(
            figure, row, labels[row], share, (low, high), colour=colours[source], text=f"{score['correct']} of {score['total']}",
            hover=f"{score['correct']} of {score['total']}, 95 % interval {low:.0%} to {high:.0%}",
        )  # fmt: skip
    figure.update_xaxes(range=[-0.03, 1.25], tickvals=SHARES, tickformat=".0%")
    return figure
