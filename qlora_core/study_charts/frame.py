"""What the figures of a study share: their frame, a row for each arm, colours of methods and ranks, notes. Knows no result."""

import html
import re
import textwrap
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from qlora_core.charts import METHOD_HUES, NEUTRAL, new_figure
from qlora_core.study_numbers import Arm

# A narrow screen (390 px) leaves so many pixels, and so many letters, for a line of text.
NARROW_PIXELS, NARROW_LETTERS, LETTER_PIXELS = 356, 56, 6.4
TITLE_PIXELS, LINE_PIXELS, AXIS_PIXELS, LEGEND_ROW_PIXELS = 18, 15, 48, 20
# Shades of a method from its lowest to its highest rank: mixed with white, as it is, mixed with black. All can be told from a
# light and from a dark page.
LIGHTEST, DARKEST = 0.42, 0.30
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "pentagon")


def esc(text: object) -> str:
    """plotly reads a little HTML in every text, so that names must not hold any."""
    return html.escape(str(text), quote=False)


def hues(found: Sequence[Arm]) -> dict[str, str]:
    """label -> colour: the hue of the method, as a shade of it where several arms share the method."""
    colours = {}
    for method in dict.fromkeys(arm.method for arm in found):
        same = [arm for arm in found if arm.method == method]
        hue = METHOD_HUES.get(method or "", NEUTRAL)
        for place, arm in enumerate(same):
            depth = 0.0 if len(same) == 1 else -LIGHTEST + (LIGHTEST + DARKEST) * place / (len(same) - 1)
            colours[arm.label] = _shade(hue, depth)
    return colours


def _shade(hue: str, depth: float) -> str:
    """Towards white for a negative depth, towards black for a positive one."""
    parts, end = [int(hue[i : i + 2], 16) for i in (1, 3, 5)], 255 if depth < 0 else 0
    return "#" + "".join(f"{round(part + (end - part) * abs(depth)):02X}" for part in parts)


def marks(found: Sequence[Arm]) -> dict[str, tuple[str, str]]:
    """label -> (dash, symbol), equal for arms that differ in the method alone: colour is never all that tells lines apart."""
    places: dict[str, int] = {}
    chosen = {}
    for arm in found:
        rest = repr({name: value for name, value in arm.varied.items() if name != "method"})
        place = places.setdefault(rest, len(places))
        chosen[arm.label] = DASHES[place % len(DASHES)], SYMBOLS[place % len(SYMBOLS)]
    return chosen


# -- frames


def framed(
    title: str,
    *,
    plot_pixels: int,
    subtitle: str = "",
    legend: Sequence[str] = (),
    notes: Sequence[str] = (),
    x_title: str = "",
    y_title: str = "",
    left: int = 62,
) -> go.Figure:
    """An empty figure whose plot is `plot_pixels` high, with room for the texts around it on a narrow screen too. A title has at
    most about 40 letters; names belong into the subtitle, which is wrapped.

    `legend`: its entries, for the room that they need below the plot. `notes`: sentences that a picture taken of the figure must
    carry too.
    """
    figure, small = new_figure(esc(title), esc(y_title)), wrapped(subtitle)
    top = TITLE_PIXELS + LINE_PIXELS * len(small) + 26
    legend_pixels = _legend_pixels(legend, NARROW_PIXELS - left)
    lines = [line for note in notes for line in wrapped(note)]
    axis = AXIS_PIXELS if x_title else 12
    bottom = axis + legend_pixels + (LINE_PIXELS * len(lines) + 10 if lines else 0)
    figure.update_layout(
        height=top + plot_pixels + bottom,
        margin={"l": left, "r": 16, "t": top, "b": bottom, "autoexpand": False},
        title={
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 12, "t": 10},
            "subtitle": {"text": "<br>".join(small), "font": {"size": 11.5}},
        },
        showlegend=bool(legend),
        legend={
            "x": 0,
            "xanchor": "left",
            "y": -axis / plot_pixels,
            "yanchor": "top",
            "font": {"size": 11.5},
            "tracegroupgap": 0,
        },
    )
    figure.update_xaxes(title_text=esc(x_title))
    if lines:
        figure.add_annotation(
            text="<br>".join(lines), x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", align="left",
            yshift=-(axis + legend_pixels + 4), xshift=12 - left, showarrow=False, font={"size": 11.5},
        )  # fmt: skip
    return figure


def wrapped(text: str) -> list[str]:
    """Escaped lines that a narrow screen holds; a figure stays with its sign of percent."""
    return [esc(line) for line in textwrap.wrap(re.sub(r"(\d) %", "\\1\u00a0%", text), NARROW_LETTERS)]


def _legend_pixels(entries: Sequence[str], width: float) -> int:
    if not entries:
        return 0
    columns = max(1, int(width // (max(map(len, entries)) * LETTER_PIXELS + 46)))
    return LEGEND_ROW_PIXELS * -(-len(entries) // columns) + 6


def by_row(
    title: str,
    labels: Sequence[str],
    *,
    row_pixels: int = 46,
    unit: str,
    subtitle: str = "",
    legend: Sequence[str] = (),
    notes: Sequence[str] = (),
    gaps: Mapping[str, str] | None = None,
) -> go.Figure:
    """A frame with a row for each label, the first on top: row i is at y = i, its label stands above what is drawn there.

    `gaps`: label -> why nothing is drawn there, which then stands in its place. Long labels are read at any width.
    """
    figure = framed(
        title,
        plot_pixels=max(60, row_pixels * len(labels)),
        subtitle=subtitle,
        legend=legend,
        notes=notes,
        x_title=unit,
        left=14,
    )
    figure.update_layout(meta={"rows": list(labels)})
    figure.update_yaxes(range=[len(labels) - 0.5, -0.5], showticklabels=False, showgrid=False, fixedrange=True)
    for row, label in enumerate(labels):
        reason = (gaps or {}).get(label)
        gap = f" <i>– {esc(reason)}</i>" if reason else ""
        figure.add_annotation(
            text=esc(label) + gap, x=0, xref="paper", xanchor="left", y=row - 0.5, yanchor="top", yshift=-1, showarrow=False,
            font={"size": 12},
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    return figure


def room_for_values(figure: go.Figure, largest: float, *, share: float = 0.28) -> None:
    """Leave room right of the longest bar for the figure that stands there, a share of the bar."""
    figure.update_xaxes(range=[0, (largest or 1) * (1 + share)])


def add_dot(
    figure: go.Figure,
    row: int,
    label: str,
    mean: float,
    interval: tuple[float, float] | None,
    *,
    colour: str,
    text: str,
    hover: str,
    symbol: str = "circle",
    values: Sequence[float] = (),
) -> None:
    """A value with its interval in a row of `by_row`, `text` right of both; `values`: what it is the mean of, as small dots."""
    y, (low, high) = row + 0.16, interval or (mean, mean)
    if len(values) > 1:
        figure.add_scatter(
            x=list(values), y=[y] * len(values), mode="markers", marker={"color": colour, "size": 5, "symbol": symbol},
            opacity=0.55, hoverinfo="skip", showlegend=False, name=esc(label),
        )  # fmt: skip
    figure.add_scatter(
        x=[mean], y=[y], mode="markers", marker={"color": colour, "size": 10, "symbol": symbol}, showlegend=False,
        name=esc(label), cliponaxis=False, hovertemplate=f"{esc(label)}: {hover}<extra></extra>",
        error_x={
            "type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "thickness": 1.5, "width": 5,
            "visible": interval is not None,
        },
    )  # fmt: skip
    figure.add_scatter(
        x=[max(mean, high, *values)], y=[y], mode="text", text=[f"  {text}"], textposition="middle right", cliponaxis=False,
        hoverinfo="skip", showlegend=False, name=esc(label),
    )  # fmt: skip


def room_for_dots(figure: go.Figure) -> None:
    """A range that holds every dot, every interval, and right of them their texts."""
    ends = []
    for trace in figure.data:
        error = trace.error_x
        ends += [x for x in trace.x] + ([trace.x[0] - error.arrayminus[0]] if error.visible else [])
    if ends:
        low, high = min(ends), max(ends)
        span = high - low or abs(high) or 1
        figure.update_xaxes(range=[low - 0.06 * span, high + 0.3 * span])
