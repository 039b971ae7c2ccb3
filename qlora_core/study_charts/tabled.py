"""A figure of a study -> the table of what it shows, so that every picture can be had as numbers. Knows no result."""

import html
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go


def table_of(figure: go.Figure) -> tuple[list[str], list[list[Any]]]:
    """(names of the columns, rows). Texts that are drawn beside bars and dots are left out, as are empty columns."""
    labels = list((figure.layout.meta or {}).get("rows", ()))
    axes = [html.unescape(axis.title.text or "") for axis in (figure.layout.xaxis, figure.layout.yaxis)]
    rows = [row for trace in figure.data for row in _rows(trace, labels, axes)]
    columns = dict.fromkeys(name for row in rows for name in row)
    used = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    return used, [[row.get(name) for name in used] for row in rows]


def _rows(trace: Any, labels: list[str], axes: list[str]) -> Iterator[dict[str, Any]]:
    series = html.unescape(trace.name or "")
    if trace.type == "heatmap":
        for module, values in zip(trace.y, trace.z, strict=True):
            for layer, value in zip(trace.x, values, strict=True):
                if value == value:  # a module that the layer does not have is no number
                    yield {"series": series, "layer": layer, "module": html.unescape(module), "value": value}
        return
    if trace.type == "box":
        for place, y in enumerate(trace.y):
            yield {"row": _label(labels, y), "series": series} | {
                name: getattr(trace, name)[place] for name in ("lowerfence", "q1", "median", "q3", "upperfence")
            }
        return
    if trace.type == "scatter" and trace.mode == "text":
        return
    places = trace.x if trace.customdata is None else trace.customdata
    ends = _ends(trace.error_x if labels else trace.error_y)
    for place, (x, y) in enumerate(zip(places, trace.y, strict=True)):
        if labels:
            yield {"row": _label(labels, y), "series": series, axes[0]: x} | _interval(ends, place, x)
        else:
            yield {"series": series, axes[0]: x, axes[1]: y} | _interval(ends, place, y)


def _label(labels: list[str], y: float) -> str:
    return labels[round(y)] if labels else ""


def _ends(error: Any) -> tuple[Any, Any] | None:
    """(below, above) of a trace's intervals, asked for once: plotly makes an object of every answer."""
    if not error or error.array is None or error.visible is False:
        return None
    return error.arrayminus, error.array


def _interval(ends: tuple[Any, Any] | None, place: int, value: float) -> dict[str, float]:
    if ends is None:
        return {}
    below, above = ends
    return {"low": value - below[place], "high": value + above[place]}
