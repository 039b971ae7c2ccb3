"""Events -> plotly figures: loss, learning rate, step time, memory; token lengths. Knows no page and no run directory."""

from collections.abc import Sequence

import plotly.graph_objects as go

from qlora_core.devices import GIB
from qlora_core.events import Evaluation, Event, Started, Step

# One hue per method everywhere; distinguishable with any colour vision (Okabe and Ito 2008).
METHOD_HUES = {"lora": "#0072B2", "qlora": "#D55E00"}
NEUTRAL, CUT = "#7A8699", "#CC3355"
HEIGHT, LENGTHS_HEIGHT = 270, 210
# More points than pixels only make the page slow; the title of the axis says what is shown.
MOST_POINTS = 1000


def run_charts(history: Sequence[Event], *, method: str, revision: str) -> tuple[go.Figure, ...]:
    """Loss, learning rate, step time and memory of one run. The same `revision` keeps the zoom of a redraw."""
    total = next((event.total_steps for event in reversed(history) if isinstance(event, Started)), 10)
    steps = [event for event in history if isinstance(event, Step)]
    evaluations = [event for event in history if isinstance(event, Evaluation)]
    every = max(1, -(-len(steps) // MOST_POINTS))
    shown, hue = steps[::every], METHOD_HUES[method]
    figures = (
        _loss(shown, evaluations, hue),
        _learning_rate(shown, hue),
        _step_time(shown, hue),
        _memory(shown, hue),
    )
    axis = "step" if every == 1 else f"step (one of {every} shown)"
    for figure in figures:
        figure.update_layout(uirevision=revision)
        # The whole run from the beginning: curves grow into the frame, and the frame does not move.
        figure.update_xaxes(
            title_text=axis, range=[-0.02 * total, 1.02 * total], tickformat=",d", dtick=1 if total < 10 else None
        )
        # A lone point is no line, and short runs show what is between the lines.
        if total <= 40 or len(shown) == 1:
            figure.update_traces(mode="lines+markers")
        say_when_empty(figure, "begins with the first step")
    return figures


def _loss(steps: Sequence[Step], evaluations: Sequence[Evaluation], hue: str) -> go.Figure:
    figure = new_figure("Loss", "loss per token, nats")
    _add_line(figure, "training", [e.step for e in steps], [e.loss for e in steps], hue, opacity=0.55, digits=".4f")
    figure.add_scatter(
        x=[e.step for e in evaluations],
        y=[e.loss for e in evaluations],
        name="evaluation",
        mode="lines+markers",
        cliponaxis=False,
        line={"color": hue, "width": 2.5, "dash": "dot"},
        marker={"color": hue, "size": 9, "symbol": "diamond"},
        hovertemplate="step %{x}: %{y:.4f}<extra>evaluation</extra>",
    )
    figure.update_layout(showlegend=True)
    return figure


def _learning_rate(steps: Sequence[Step], hue: str) -> go.Figure:
    figure = new_figure("Learning rate", "")
    _add_line(figure, "rate", [e.step for e in steps], [e.learning_rate for e in steps], hue, digits=".3g")
    figure.update_yaxes(rangemode="tozero", tickformat=".1e")
    return figure


def _step_time(steps: Sequence[Step], hue: str) -> go.Figure:
    figure = new_figure("Step time", "seconds")
    _add_line(figure, "time", [e.step for e in steps], [e.step_seconds for e in steps], hue, digits=".3f", unit=" s")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _memory(steps: Sequence[Step], hue: str) -> go.Figure:
    """The kind that was measured: GPU memory of this process, or on a CPU its host memory; never both as one."""
    on_gpu = any(event.peak_allocated_bytes is not None for event in steps)
    figure = new_figure("Peak memory, GPU" if on_gpu else "Peak memory, host", "GiB")
    kinds = (
        (("allocated", "peak_allocated_bytes"), ("reserved", "peak_reserved_bytes"))
        if on_gpu
        else (("host", "peak_host_bytes"),)
    )
    for number, (name, field) in enumerate(kinds):
        points = [(event.step, value / GIB) for event in steps if (value := getattr(event, field)) is not None]
        x, y = [step for step, _ in points], [value for _, value in points]
        _add_line(figure, name, x, y, hue, opacity=1 - 0.5 * number, digits=".2f", unit=" GiB")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=on_gpu)
    return figure


def length_histogram(lengths: Sequence[int], *, cut_at: int) -> go.Figure:
    """How many rows have how many tokens, and where the cut lies when it lies in sight."""
    figure = new_figure("", "rows")
    figure.add_histogram(
        x=list(lengths), nbinsx=40, marker={"color": NEUTRAL}, hovertemplate="%{x} tokens: %{y} rows<extra></extra>"
    )
    figure.update_xaxes(title_text="tokens a row", rangemode="tozero")
    if lengths and cut_at <= 1.5 * max(lengths):
        figure.add_vline(
            x=cut_at,
            line={"color": CUT, "width": 2, "dash": "dash"},
            annotation={"text": f"cut at {cut_at:,}", "font": {"size": 12}},
        )
    say_when_empty(figure, "no rows yet")
    figure.update_layout(height=LENGTHS_HEIGHT, bargap=0.06, margin={"t": 26}, uirevision="lengths")
    return figure


def new_figure(title: str, unit: str) -> go.Figure:
    """An empty figure of the house: title on the left, `unit` on the y axis, legend above, no colour of its own."""
    figure = go.Figure()
    # Colours of text and grid come from the page's style sheet, so that light and dark both fit.
    figure.update_layout(
        template="none",
        height=HEIGHT,
        title={
            "text": title,
            "x": 0,
            "xref": "container",
            "pad": {"l": 12},
            "y": 0.95,
            "font": {"size": 14, "weight": 600},
        },
        margin={"l": 62, "r": 14, "t": 56, "b": 54},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
        font={"family": "system-ui, sans-serif", "size": 12, "color": NEUTRAL},
        hovermode="closest",
        modebar={"remove": ["lasso2d", "select2d", "toImage", "zoomIn2d", "zoomOut2d"], "bgcolor": "rgba(0,0,0,0)"},
    )
    figure.update_xaxes(gridcolor="rgba(128,140,160,0.18)", zeroline=False, title={"standoff": 6})
    figure.update_yaxes(gridcolor="rgba(128,140,160,0.18)", zeroline=False, title={"text": unit, "standoff": 8})
    return figure


def _add_line(
    figure: go.Figure,
    name: str,
    x: list[int],
    y: list[float],
    hue: str,
    *,
    digits: str,
    opacity: float = 1,
    unit: str = "",
) -> None:
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines",
        cliponaxis=False,
        opacity=opacity,
        line={"color": hue, "width": 2},
        marker={"color": hue, "size": 5},
        hovertemplate=f"step %{{x}}: %{{y:{digits}}}{unit}<extra>{name}</extra>",
    )


def say_when_empty(figure: go.Figure, text: str) -> None:
    """Write `text` where the points will be, as long as there is none."""
    if not any(len(trace.x or ()) for trace in figure.data):
        figure.update_layout(showlegend=False)
        figure.update_xaxes(showticklabels=False)
        # No range of its own: plotly would keep it, under one uirevision, when the first data come.
        figure.update_yaxes(showticklabels=False)
        figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
