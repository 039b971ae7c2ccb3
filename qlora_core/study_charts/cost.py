"""What each arm of a study costs: memory, time, speed, size of the adapter, and what of it buys a lower loss."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go

from qlora_core import events
from qlora_core.charts import NEUTRAL
from qlora_core.devices import GIB
from qlora_core.study_charts.frame import by_row, esc, framed, hues, marks, room_for_values
from qlora_core.study_numbers import (
    WHOLE,
    Arm,
    Pair,
    estimated_parts,
    losses,
    measured,
    memory_kind,
    memory_kinds,
    step_ratios,
    undominated,
)
from qlora_core.study_results import StudyRun
from qlora_core.wording import MEMORY_PARTS, seconds, size

MIB = 1024**2
# As the page's memory bar has them, told from light and dark: estimate's part -> shown name and colour.
PART_HUES = {
    "libraries": "#9aa6b6",
    "weights": "#64748b",
    "quantisation constants": "#a58d6f",
    "adapters": "#009e73",
    "optimizer": "#56b4e9",
    "gradients": "#cc79a7",
    "activations": "#e69f00",
    "working": "#d8bd6a",
    "logits": "#7b61b5",
}
HATCHED = {"shape": "/", "fillmode": "overlay", "fgcolor": "rgba(255,255,255,.6)", "size": 6, "solidity": 0.25}
# Bins of the step-time ratio, and the least of steps that one must hold.
BINS, IN_A_BIN = 6, 5


def memory(found: Sequence[Arm], kind: str, notes: Sequence[str]) -> go.Figure:
    """The measured peak of each arm above the parts of its estimate. One kind of memory, "GPU" or "host", in one figure."""
    shown = [arm for arm in found if memory_kind(arm) in (kind, None)]
    estimates = {arm.label: estimated_parts(arm) for arm in shown}
    known = [name for name in (*PART_HUES, WHOLE) if any(name in parts for parts in estimates.values())]
    figure = by_row(
        f"Peak memory, {kind}",
        [arm.label for arm in shown],
        row_pixels=62,
        unit="GiB",
        subtitle="Solid: measured at the steps. Hatched: the estimate before the run, by part.",
        legend=[_part(name)[0] for name in known],
        notes=notes,
        gaps={arm.label: arm.gap for arm in shown if arm.gap},
    )
    colours, peaks = hues(shown), {}
    for row, arm in enumerate(shown):
        values = [value / GIB for value in arm.values(lambda run: run.peak_bytes).values()]
        estimate = sum(estimates[arm.label].values()) / GIB
        peaks[arm.label] = max([*values, estimate, 0])
        if values:
            mean = statistics.fmean(values)
            figure.add_bar(
                x=[mean], y=[row - 0.03], width=0.27, orientation="h", name="measured", showlegend=False, text=[f" {mean:.2f}"],
                textposition="outside", cliponaxis=False, marker={"color": colours[arm.label]}, error_x=_ends(values),
                hovertemplate=f"{esc(arm.label)}: {mean:.3f} GiB measured{_over(values)}<extra></extra>",
            )  # fmt: skip
        if estimate:
            figure.add_scatter(
                x=[estimate], y=[row + 0.3], mode="text", text=[f" {estimate:.2f} estimated"], textposition="middle right",
                cliponaxis=False, hoverinfo="skip", showlegend=False, name="estimated in all", textfont={"size": 11},
            )  # fmt: skip
    for name in known:
        rows = [row for row, arm in enumerate(shown) if name in estimates[arm.label]]
        sizes = [estimates[shown[row].label][name] / GIB for row in rows]
        shown_name, colour = _part(name)
        figure.add_bar(
            x=sizes, y=[row + 0.3 for row in rows], width=0.27, orientation="h", name=shown_name,
            marker={"color": colour, "pattern": HATCHED},
            text=[shown[row].label for row in rows], textposition="none",
            hovertemplate=f"{shown_name}: %{{x:.3f}} GiB estimated<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0, legend={"traceorder": "normal"})
    room_for_values(figure, max(peaks.values(), default=0), share=0.38)
    return figure


def _part(name: str) -> tuple[str, str]:
    return MEMORY_PARTS.get(name, (name,))[0], PART_HUES.get(name, NEUTRAL)


def _ends(values: Sequence[float]) -> dict[str, object] | None:
    """Error bars from the lowest to the highest seed."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    return {
        "type": "data", "symmetric": False, "array": [max(values) - mean], "arrayminus": [mean - min(values)],
        "color": NEUTRAL, "thickness": 1.5, "width": 4,
    }  # fmt: skip


def _over(values: Sequence[float]) -> str:
    return f", mean of {len(values)} seeds" if len(values) > 1 else ""


def step_time(found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    """A box an arm: all timed steps of its finished runs."""
    shown = {arm.label: _seconds(arm) for arm in found}
    figure = by_row(
        "Step time",
        [arm.label for arm in found],
        unit="seconds a step",
        subtitle="Line: median. Box: the middle half of the steps. Whiskers: all but the 5 % at each end. Without warm-up.",
        notes=notes,
        gaps={arm.label: arm.gap for arm in found if arm.gap},
    )
    colours, largest = hues(found), 0.0
    for row, arm in enumerate(found):
        if not shown[arm.label]:
            continue
        least, lower, middle, upper, most = np.quantile(shown[arm.label], (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        largest = max(largest, most)
        figure.add_box(
            y=[row + 0.14], q1=[lower], median=[middle], q3=[upper], lowerfence=[least], upperfence=[most], orientation="h",
            name=esc(arm.label), width=0.36, line={"color": colours[arm.label], "width": 1.8}, hoverinfo="skip",
            fillcolor=_faint(colours[arm.label]), showlegend=False,
        )  # fmt: skip
        # A box made of its quartiles has no text of its own.
        figure.add_scatter(
            x=[most], y=[row + 0.14], mode="text", text=[f"  {seconds(middle)}"], textposition="middle right", cliponaxis=False,
            showlegend=False, name=esc(arm.label),
            hovertemplate=f"{esc(arm.label)}: median {seconds(middle)}, middle half {seconds(lower)} to {seconds(upper)}"
            f"<br>of {len(shown[arm.label])} steps<extra></extra>",
        )  # fmt: skip
    room_for_values(figure, largest)
    return figure


def _seconds(arm: Arm) -> list[float]:
    return [step.step_seconds for run in arm.finished for step in events.timed_steps(list(run.steps))]


def _faint(colour: str) -> str:
    return "rgba({},{},{},0.25)".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


def speed(found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    return bars("Speed", found, measured("tokens_per_second"), unit="tokens a second", digits=",.0f", notes=notes)


def adapter_size(found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    def mebibytes(run: StudyRun) -> float | None:
        found = measured("adapter_bytes")(run)
        return found and found / MIB

    return bars("Adapter on disk", found, mebibytes, unit="MiB", digits=",.1f", notes=notes)


def bars(
    title: str,
    found: Sequence[Arm],
    of: Callable[[StudyRun], float | None],
    *,
    unit: str,
    digits: str,
    notes: Sequence[str],
) -> go.Figure:
    """A bar an arm: the mean over its seeds, with the lowest and the highest."""
    values = {arm.label: list(arm.values(of).values()) for arm in found}
    several = any(len(of_arm) > 1 for of_arm in values.values())
    figure = by_row(
        title,
        [arm.label for arm in found],
        unit=unit,
        subtitle="Mean over seeds; the thin line reaches from the lowest to the highest." if several else "",
        notes=notes,
        gaps={arm.label: arm.gap or "not measured" for arm in found if not values[arm.label]},
    )
    colours = hues(found)
    for row, arm in enumerate(found):
        if not values[arm.label]:
            continue
        mean = statistics.fmean(values[arm.label])
        figure.add_bar(
            x=[mean], y=[row + 0.14], width=0.36, orientation="h", name=esc(arm.label), showlegend=False,
            text=[f" {mean:{digits}}"], textposition="outside", cliponaxis=False, marker={"color": colours[arm.label]},
            error_x=_ends(values[arm.label]),
            hovertemplate=f"{esc(arm.label)}: {mean:{digits}} {unit}{_over(values[arm.label])}<extra></extra>",
        )  # fmt: skip
    room_for_values(figure, max((max(of_arm) for of_arm in values.values() if of_arm), default=0))
    return figure


def time_ratio(found: Sequence[Pair], notes: Sequence[str]) -> go.Figure | None:
    """Each step of a pair: the time QLoRA took for it over LoRA's, against its tokens; None without such steps."""
    points = {pair.label or "QLoRA / LoRA": step_ratios(pair) for pair in found}
    points = {label: ratios for label, ratios in points.items() if ratios}
    if not points:
        return None
    figure = framed(
        "Time of a QLoRA step against LoRA's",
        plot_pixels=230,
        subtitle="Dots: steps in which both saw the same rows. Line: median of steps of similar size. Above 1, QLoRA is slower.",
        legend=list(points) if len(points) > 1 else (),
        notes=notes,
        x_title="tokens in the step",
        y_title="QLoRA / LoRA",
    )
    colours, styles = hues([pair.qlora for pair in found]), marks([pair.qlora for pair in found])
    by_label = {pair.label or "QLoRA / LoRA": pair.qlora.label for pair in found}
    for label, ratios in points.items():
        colour, (dash, symbol) = colours[by_label[label]], styles[by_label[label]]
        tokens, values = np.array(ratios).T
        figure.add_scatter(
            x=tokens.tolist(), y=values.tolist(), mode="markers", name=esc(label), legendgroup=label, showlegend=False,
            opacity=0.35, marker={"color": colour, "size": 5, "symbol": symbol},
            hovertemplate=f"{esc(label)}: %{{x:,}} tokens, ratio %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        middle = _binned(tokens, values)
        figure.add_scatter(
            x=[x for x, _ in middle], y=[y for _, y in middle], mode="lines+markers", name=esc(label), legendgroup=label,
            line={"color": colour, "width": 2.5, "dash": dash}, marker={"color": colour, "size": 8, "symbol": symbol},
            hovertemplate=f"{esc(label)}: about %{{x:,.0f}} tokens, median ratio %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    every = np.array([ratio for ratios in points.values() for _, ratio in ratios])
    low, high = np.quantile(every, (0.01, 0.99)).tolist()
    room = 0.15 * max(high - low, 0.1)
    figure.add_hline(y=1, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    # A step that waited for something else may be ten times as long; the axis shows what is usual.
    figure.update_yaxes(range=[min(low, 0.98) - room, max(high, 1.02) + room])
    return figure


def _binned(tokens: np.ndarray, ratios: np.ndarray) -> list[tuple[float, float]]:
    """(mean tokens, median ratio) of steps in order of their tokens, as many in each bin."""
    count = max(1, min(BINS, len(tokens) // IN_A_BIN))
    return [
        (float(tokens[places].mean()), float(np.median(ratios[places])))
        for places in np.array_split(np.argsort(tokens, kind="stable"), count)
    ]


def trade(found: Sequence[Arm], kind: str, notes: Sequence[str]) -> go.Figure | None:
    """Memory against loss, with time as the size of the dot; None with fewer than two arms of this kind of memory."""
    shown = [arm for arm in found if memory_kind(arm) == kind and losses(arm) and arm.mean(lambda r: r.peak_bytes)]
    if len(shown) < 2:
        return None
    best, colours, styles = undominated(shown), hues(shown), marks(shown)
    figure = framed(
        f"Memory, time and loss ({kind} memory)",
        plot_pixels=260,
        subtitle="Lower left is better, a smaller dot is faster. Filled: no other arm is better in all three.",
        legend=[arm.label for arm in shown],
        notes=notes,
        x_title="peak memory, GiB",
        y_title="evaluation loss, nats a token",
    )
    times = {arm.label: arm.mean(lambda run: run.step_seconds) for arm in shown}
    slowest = max((time for time in times.values() if time), default=None)
    for arm in shown:
        memory_bytes, loss, time = arm.mean(lambda r: r.peak_bytes), arm.mean(lambda r: r.eval_loss), times[arm.label]
        symbol = styles[arm.label][1]
        figure.add_scatter(
            x=[memory_bytes / GIB], y=[loss], mode="markers", name=esc(arm.label), cliponaxis=False,
            marker={
                "color": colours[arm.label], "symbol": symbol if arm.label in best else f"{symbol}-open",
                # The area tells the time, as an eye reads it.
                "size": 8 + 18 * ((time / slowest) ** 0.5 if time and slowest else 0),
                "line": {"width": 2, "color": colours[arm.label]},
            },
            hovertemplate=f"{esc(arm.label)}<br>{size(memory_bytes)}, {seconds(time)} a step, loss {loss:.4f}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(legend={"itemsizing": "constant"})
    return figure


def cost_figures(found: Sequence[Arm], found_pairs: Sequence[Pair], notes: Sequence[str]) -> dict[str, go.Figure]:
    """Title -> figure, of those that have data."""
    if not any(arm.finished for arm in found):
        return {}
    kinds = memory_kinds(found)
    figures = {f"Peak memory, {kind}": memory(found, kind, notes) for kind in kinds}
    if any(_seconds(arm) for arm in found):
        figures |= {"Step time": step_time(found, notes), "Speed": speed(found, notes)}
    figures |= {"Adapter on disk": adapter_size(found, notes)}
    ratio = time_ratio(found_pairs, notes)
    figures |= {"Time of a QLoRA step against LoRA's": ratio} if ratio else {}
    for kind in kinds:
        traded = trade(found, kind, notes)
        figures |= {f"Memory, time and loss, {kind}": traded} if traded else {}
    return figures
