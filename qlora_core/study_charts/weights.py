"""What the adapters learnt, and what 4 bits did to the base: maps of layer by module, singular values. Compares nothing itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from qlora_core.charts import METHOD_HUES, NEUTRAL
from qlora_core.study_charts.frame import add_dot, by_row, esc, framed, hues, marks, wrapped
from qlora_core.study_numbers import FLOORS, NEARLY_EQUAL, Arm, Likeness, likenesses, mean_error
from qlora_core.study_results import Analysis, StudyResults

# Told apart with any colour vision, and in grey (Nuñez, Anderton and Renslow 2018).
SCALE = "Cividis"
CELL_PIXELS, MAP_GAP_PIXELS = 17, 46
KINDS = {
    "lora-qlora": "LoRA against QLoRA",
    "other seed": "noise floor: another seed",
    "other row order": "noise floor: another row order",
}
FLOW = (
    "q_proj",
    "k_proj",
    "v_proj",
    "c_attn",
    "qkv_proj",
    "query_key_value",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def maps(
    title: str,
    panels: Mapping[str, Iterable[Mapping[str, Any]]],
    field: str,
    *,
    subtitle: str,
    unit: str,
    limits: tuple[float | None, float | None],
    digits: str,
    notes: Sequence[str],
    own_scales: bool = False,
) -> go.Figure:
    """Layer by module, a map for each panel, one below the other on one scale of colours, or each on its own.

    `panels`: title -> entries {"layer", "module", field}; an entry without a layer (a head) stands left of layer 0. `limits` of the
    scale; None is taken from the values.
    """
    tables = {name: list(entries) for name, entries in panels.items()}
    modules = _in_order({entry["module"]: None for entries in tables.values() for entry in entries})
    layers = sorted({-1 if e["layer"] is None else e["layer"] for entries in tables.values() for e in entries})
    ends = {name: _ends(entries, field, limits) for name, entries in tables.items()}
    if not own_scales:
        ends = dict.fromkeys(tables, _ends([e for entries in tables.values() for e in entries], field, limits))
    panel = max(CELL_PIXELS * len(modules), 60)
    plot = len(tables) * (panel + MAP_GAP_PIXELS) - MAP_GAP_PIXELS + 24
    longest = max(map(len, modules))
    figure = framed(
        title,
        plot_pixels=plot,
        subtitle=subtitle,
        notes=notes,
        x_title="layer",
        left=min(130, 16 + round(6.6 * longest)),
    )
    figure.update_layout(margin_r=82)
    for number, (name, entries) in enumerate(tables.items()):
        top = 1 - (24 + number * (panel + MAP_GAP_PIXELS)) / plot
        grid = np.full((len(modules), len(layers)), np.nan)
        for entry in entries:
            if entry[field] is not None:
                layer = -1 if entry["layer"] is None else entry["layer"]
                grid[modules.index(entry["module"]), layers.index(layer)] = entry[field]
        axis, (low, high) = "" if not number else str(number + 1), ends[name]
        figure.add_heatmap(
            z=grid.tolist(), x=[str(layer) if layer >= 0 else "–" for layer in layers], y=[esc(module) for module in modules],
            xaxis=f"x{axis}", yaxis=f"y{axis}", colorscale=SCALE, zmin=low, zmax=high, name=esc(name),
            showscale=own_scales or not number, xgap=1, ygap=1, hoverongaps=False, colorbar={
                "title": {"text": esc(unit), "side": "right", "font": {"size": 11}}, "thickness": 10, "x": 1.02,
                "xpad": 4, "len": panel, "lenmode": "pixels", "y": top, "yanchor": "top", "tickfont": {"size": 10},
                "outlinewidth": 0, "nticks": 5,
            },
            hovertemplate=f"layer %{{x}}, %{{y}}: %{{z:{digits}}}<extra>{esc(name)}</extra>",
        )  # fmt: skip
        last = number == len(tables) - 1
        figure.update_layout({
            f"xaxis{axis}": {
                "anchor": f"y{axis}", "title": {"text": "layer" if last else "", "standoff": 4}, "showgrid": False,
                "type": "category", "nticks": 12, "zeroline": False, "ticks": "", "tickfont": {"size": 10.5}, "tickangle": 0,
            },
            f"yaxis{axis}": {
                "anchor": f"x{axis}", "domain": [max(0.0, top - panel / plot), top], "autorange": "reversed", "type": "category",
                "showgrid": False, "zeroline": False, "tickfont": {"size": 10.5}, "ticksuffix": " ", "dtick": 1, "ticks": "",
                "title": {"text": ""},
            },
        })  # fmt: skip
        figure.add_annotation(
            text=wrapped(name)[0], x=0, xref="paper", xanchor="left", y=top, yref="paper", yanchor="bottom", yshift=2,
            showarrow=False, font={"size": 12},
        )  # fmt: skip
    return figure


def _in_order(modules: Iterable[str]) -> list[str]:
    """As data flow through a layer, where the names are known; others follow in their own order."""
    place = {name: number for number, name in enumerate(FLOW)}
    return sorted(modules, key=lambda name: place.get(name.rpartition(".")[2], len(FLOW)))


def _ends(
    entries: Iterable[Mapping[str, Any]], field: str, limits: tuple[float | None, float | None]
) -> tuple[float, float]:
    values = [entry[field] for entry in entries if entry[field] is not None] or [0.0]
    low, high = limits
    return low if low is not None else min(values), high if high is not None else max(values)


def similarity_figures(results: StudyResults, found: Sequence[Arm], notes: Sequence[str]) -> dict[str, go.Figure]:
    """All comparisons in one figure, then cosine and relative difference of each pair beside what chance alone changes."""
    assert results.analysis is not None
    alike = likenesses(results)
    figures = {"Likeness of the adapters": overview(results, alike, notes)} if results.analysis.similarity else {}
    for title, field, digits, limits, words in (
        ("Cosine similarity", "cosine", ".3f", (None, 1.0), "1: the same direction. Compare with the noise floor."),
        (
            "Relative difference",
            "relative",
            ".2f",
            (0.0, None),
            "Norm of the difference, in norms of the first. 0: equal.",
        ),
    ):
        for one in alike:
            panels = {_panel(KINDS["lora-qlora"], one.pairs[0], field, digits): one.pairs[0]["modules"]}
            panels |= {
                _panel(KINDS[kind], floor, field, digits): floor["modules"] for kind, floor in one.floors.items()
            }
            lowest = min((entry[field] for entries in panels.values() for entry in entries), default=0.0)
            seed = f" First of {len(one.pairs)} seeds." if len(one.pairs) > 1 else ""
            figures[f"{title}: {one.label}"] = maps(
                title,
                panels,
                field,
                subtitle=f"{one.label}, learnt updates. {words}{seed}",
                unit="cosine" if field == "cosine" else "difference / size",
                limits=(min(0.0, lowest) if limits[0] is None else limits[0], limits[1]),
                digits=".3f",
                notes=notes,
            )
    return figures


def _panel(name: str, comparison: Mapping[str, Any], field: str, digits: str) -> str:
    return f"{name} (overall {comparison['overall'][field]:{digits}})"


def overview(results: StudyResults, alike: Sequence[Likeness], notes: Sequence[str]) -> go.Figure:
    """The cosine of all matrices together, a row for each comparison: LoRA with QLoRA, with itself, neighbours in the grid."""
    assert results.analysis is not None
    rows = {one.label: (one.cosines, METHOD_HUES["qlora"]) for one in alike}
    for one in results.analysis.similarity:
        if one["kind"] != "lora-qlora":
            beside = f", {one['kind']}" if one["kind"] in FLOORS and one["kind"] not in one["label"] else ""
            hue = METHOD_HUES["lora"] if one["kind"] in FLOORS else NEUTRAL
            rows.setdefault(f"{one['label']}{beside}", ([], hue))[0].append(one["overall"]["cosine"])
    figure = by_row(
        "Likeness of the adapters",
        list(rows),
        unit="cosine of all updates together",
        subtitle="Orange: LoRA with QLoRA. Blue: LoRA with itself, what chance leaves. Grey: neighbours in the grid.",
        notes=notes,
    )
    for row, (label, (cosines, hue)) in enumerate(rows.items()):
        mean = float(np.mean(cosines))
        add_dot(
            figure, row, label, mean, None, colour=hue, text=f"{mean:.3f}", hover=f"cosine {mean:.4f}", values=cosines
        )
    figure.add_vline(x=NEARLY_EQUAL, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    lowest = min(min(cosines) for cosines, _ in rows.values())
    figure.update_xaxes(range=[min(0.0, lowest) - 0.03, 1.22], tickvals=[0, 0.25, 0.5, 0.75, NEARLY_EQUAL])
    return figure


def spectrum_figures(results: StudyResults, found: Sequence[Arm], notes: Sequence[str]) -> dict[str, go.Figure]:
    """Effective rank by layer and module, arms that differ in the method alone in one figure; singular values of all arms."""
    assert results.analysis is not None
    updates = results.analysis.updates
    known = {arm.label: updates[run.run_id] for arm in found for run in arm.runs if updates.get(run.run_id)}
    if not known:
        return {}
    figures, groups = {}, {}
    for arm in found:
        if arm.label in known:
            rest = ", ".join(part for part in arm.label.split(", ") if part not in ("LoRA", "QLoRA"))
            groups.setdefault(rest, {})[arm.label] = known[arm.label]
    for rest, panels in groups.items():
        title = f"Effective rank: {rest}" if rest else "Effective rank"
        means = {
            f"{name} (mean {np.mean([entry['effective_rank'] for entry in entries]):.1f})": entries
            for name, entries in panels.items()
        }
        figures[title] = maps(
            "Effective rank", means, "effective_rank", notes=notes,
            unit="directions", digits=".2f", limits=(1.0, None),
            subtitle=f"{rest + '. ' if rest else ''}Directions that a learnt update uses: the exponential of the entropy of its "
            "singular values.",
        )  # fmt: skip
    return figures | {"Singular values": singular_values(found, known, notes)}


def singular_values(
    found: Sequence[Arm], known: Mapping[str, Sequence[Mapping[str, Any]]], notes: Sequence[str]
) -> go.Figure:
    """The median over all modules of the first, second, … singular value of an update, with the middle half of the modules."""
    shown = [arm for arm in found if arm.label in known]
    figure = framed(
        "Singular values of the learnt updates",
        plot_pixels=260,
        subtitle="Median over all modules; thin lines: the middle half of them. A steep fall: few directions were needed.",
        legend=[arm.label for arm in shown],
        notes=notes,
        x_title="number of the singular value",
        y_title="singular value",
    )
    colours, styles = hues(shown), marks(shown)
    for arm in shown:
        most = max(len(entry["singular_values"]) for entry in known[arm.label])
        table = np.full((len(known[arm.label]), most), np.nan)
        for row, entry in enumerate(known[arm.label]):
            table[row, : len(entry["singular_values"])] = entry["singular_values"]
        low, middle, high = np.nanquantile(table, (0.25, 0.5, 0.75), axis=0)
        dash, symbol = styles[arm.label]
        figure.add_scatter(
            x=list(range(1, most + 1)), y=middle.tolist(), mode="lines+markers", name=esc(arm.label), cliponaxis=False,
            line={"color": colours[arm.label], "width": 2, "dash": dash},
            marker={"color": colours[arm.label], "size": 6, "symbol": symbol},
            error_y={
                "type": "data", "symmetric": False, "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(),
                "thickness": 1, "width": 2,
            },
            hovertemplate=f"{esc(arm.label)}, number %{{x}}: %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    positive = [value for trace in figure.data for value in trace.y if value > 0]
    # Of some directions nothing may be left: a logarithm then shows the rest.
    if positive and max(positive) > 20 * min(positive):
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def quantisation_figures(analysis: Analysis, notes: Sequence[str]) -> dict[str, go.Figure]:
    """Rounding error of the base weights by layer and module, a map for each number type."""
    if not analysis.quantisation:
        return {}
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for entry in analysis.quantisation:
        panels.setdefault(entry["type"], []).append(entry)
    named = {f"{kind} (mean {mean_error(entries):.2%})": entries for kind, entries in panels.items()}
    return {
        "Quantisation error of the base weights": maps(
            "Quantisation error of the base weights",
            named,
            "relative_error",
            notes=notes,
            unit="error / size",
            digits=".4f",
            subtitle="Norm of what rounding changed, in norms of the matrix; each type on its own scale. Says nothing of the loss.",
            limits=(None, None),
            own_scales=True,
        )  # fmt: skip
    }


def weight_figures(results: StudyResults, found: Sequence[Arm], notes: Sequence[str]) -> dict[str, go.Figure]:
    """Title -> figure, of those that have data."""
    if results.analysis is None:
        return {}
    return (
        similarity_figures(results, found, notes)
        | spectrum_figures(results, found, notes)
        | quantisation_figures(results.analysis, notes)
    )
