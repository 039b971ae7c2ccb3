"""What 4 bits cost in time: seconds a QLoRA step takes for each of a LoRA step's, against the tokens of a step."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workloads import RATIO_WORKLOADS

# Okabe and Ito (2008): distinguishable with any colour vision.
HUES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def ratios(cases: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """{arm and shape: [(tokens a step, seconds of QLoRA / seconds of LoRA)]}, of what both were measured of."""
    measured = {
        (f"{c['arm']}, {c['shape']}", c["workload"], c["method"]): c
        for c in cases
        if c["workload"] in RATIO_WORKLOADS and not c["failed"]
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for (arm, workload, method), lora in measured.items():
        qlora = measured.get((arm, workload, "qlora"))
        if method == "lora" and qlora:
            ratio = qlora["step_seconds_median"] / lora["step_seconds_median"]
            found.setdefault(arm, []).append((lora["tokens_per_step"], ratio))
    return {arm: sorted(points) for arm, points in found.items()}


def write_ratio_figure(cases: Iterable[dict[str, Any]], path: Path) -> str:
    """Write it as a page that needs no network; returns a sentence on what was done."""
    cases = list(cases)
    lines = ratios(cases)
    if not lines:
        return (
            "No figure of the ratio: it needs LoRA and QLoRA of one arm at the same tokens a step (--workloads ratio)."
        )
    if importlib.util.find_spec("plotly") is None:
        return "No figure of the ratio: plotly is not installed here. Draw it elsewhere with --plot and the JSON."
    import plotly.graph_objects as go

    from qlora_core.charts import NEUTRAL

    figure = go.Figure()
    for (arm, points), hue in zip(lines.items(), HUES * len(lines), strict=False):
        figure.add_scatter(
            x=[tokens for tokens, _ in points],
            y=[ratio for _, ratio in points],
            name=arm,
            mode="lines+markers",
            line={"color": hue, "width": 2},
            marker={"size": 7},
            hovertemplate="%{x:,} tokens: %{y:.2f}<extra>" + arm + "</extra>",
        )
    figure.add_hline(y=1, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    devices = ", ".join(sorted({case["device"] for case in cases if not case["failed"]}))
    grid = {"gridcolor": "rgba(128,140,160,0.18)", "zeroline": False}
    figure.update_layout(
        template="none",
        title={
            "text": f"Time of a QLoRA step / time of a LoRA step<br><sub>{devices}</sub>",
            "x": 0.02,
            "font": {"size": 15},
        },
        font={"family": "system-ui, sans-serif", "size": 12, "color": NEUTRAL},
        width=760,
        height=420,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2},
        xaxis=grid
        | {"type": "log", "title": "tokens a step", "tickvals": ticks, "ticktext": [f"{t:,.0f}" for t in ticks]},
        yaxis=grid | {"title": "ratio", "rangemode": "tozero"},
    )
    figure.write_html(path, include_plotlyjs=True)
    return f"Figure of the ratio: {path}"
