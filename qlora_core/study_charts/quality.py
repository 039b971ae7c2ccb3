"""How good each arm of a study became: loss curves, evaluation loss by rank and method, what each group costs in 4 bits."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from qlora_core.charts import METHOD_HUES, MOST_POINTS, NEUTRAL
from qlora_core.study_charts.frame import add_dot, by_row, esc, framed, hues, marks, room_for_dots
from qlora_core.study_hypotheses import Knee, Sensitivity, label_without_rank
from qlora_core.study_numbers import Arm, Spread, arms, losses, spread
from qlora_core.study_results import StudyResults, StudyRun

# What a loss curve may run along: name -> title of the axis.
AXES = {"step": "step", "token": "tokens learnt from", "epoch": "epoch", "time": "seconds of training steps"}
# Weight of what came before, as TensorBoard has it; by name.
SMOOTHINGS = {"none": 0.0, "some": 0.8, "strong": 0.95}
# Points of all lines of a figure together.
POINTS = 8 * MOST_POINTS
# So few steps are no noise to look through.
FEW_STEPS = 60


def loss_curves(
    results: StudyResults,
    axis: str = "step",
    smoothing: float = 0.0,
    *,
    what: str = "training",
    notes: Sequence[str] = (),
) -> go.Figure:
    """Losses of all arms, laid over each other; a further seed of an arm is a thinner line of the same colour.

    `axis`: a key of AXES. `smoothing`: 0 (each step as it was) to below 1, the weight of the moving average's past. `what`:
    "training" or "evaluation". Runs that are under way, failed or were stopped show as far as they came.
    """
    assert axis in AXES and 0 <= smoothing < 1 and what in ("training", "evaluation"), (axis, smoothing, what)
    found = [arm for arm in arms(results) if any(_points(run, axis, what)[0] for run in arm.runs)]
    title = "Training loss" if what == "training" else "Evaluation loss while training"
    figure = framed(
        title,
        plot_pixels=280,
        subtitle=_smoothed_in_words(smoothing) if what == "training" else "",
        legend=[_curve_label(arm) for arm in found],
        notes=notes,
        x_title=AXES[axis],
        y_title="loss, nats a token",
    )
    colours, styles = hues(found), marks(found)
    runs = [(arm, run) for arm in found for run in arm.runs]
    every = 1
    while sum(len(run.steps) for _, run in runs) > POINTS * every:
        every += 1
    for arm, run in runs:
        x, y = _points(run, axis, what)
        if not x:
            continue
        first, (dash, symbol) = run is next(r for r in arm.runs if _points(r, axis, what)[0]), styles[arm.label]
        if what == "training":
            x, y = x[::every], smooth(y, smoothing)[::every]
        figure.add_scatter(
            x=x, y=y, name=esc(_curve_label(arm)), legendgroup=arm.label, showlegend=first,
            mode="lines" if what == "training" and len(x) > FEW_STEPS else "lines+markers", cliponaxis=False,
            line={"color": colours[arm.label], "width": 2 if first else 1, "dash": dash},
            marker={"color": colours[arm.label], "size": 7, "symbol": symbol}, opacity=1 if first else 0.6,
            hovertemplate=f"{esc(arm.label)}, seed {run.seed}<br>{esc(AXES[axis])} %{{x:,.4~g}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    if axis == "step" and max((len(run.steps) for _, run in runs), default=0) < 10:
        figure.update_xaxes(dtick=1)
    if every > 1 and what == "training":
        figure.update_xaxes(title_text=f"{AXES[axis]} (one step of {every} shown)")
    return figure


def _curve_label(arm: Arm) -> str:
    states = dict.fromkeys(run.state for run in arm.runs if run.state != "finished")
    return arm.label + (f" ({', '.join(states)})" if states else "")


def _smoothed_in_words(smoothing: float) -> str:
    if not smoothing:
        return "Each step as it was."
    return f"Smoothed: the past of the moving average weighs {smoothing:g}, about {1 / (1 - smoothing):.0f} steps."


def usual_smoothing(results: StudyResults) -> str:
    """A key of SMOOTHINGS: few steps are seen best as they were."""
    return "some" if max((len(run.steps) for run in results.runs), default=0) > FEW_STEPS else "none"


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the pull towards 0 of its start (Kingma and Ba 2015, section 3)."""
    if not weight:
        return list(values)
    found, average = [], 0.0
    for number, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight**number))
    return found


def _points(run: StudyRun, axis: str, what: str) -> tuple[list[float], list[float]]:
    """Places on the axis and losses. Of an evaluation the place is that of the step after which it was made."""
    places = [0.0, *_places(run, axis)]
    if what == "training":
        return places[1:], [step.loss for step in run.steps]
    after = {0: 0.0} | {step.step: place for step, place in zip(run.steps, places[1:], strict=True)}
    shown = [evaluation for evaluation in run.evaluations if evaluation.step in after]
    return [after[evaluation.step] for evaluation in shown], [evaluation.loss for evaluation in shown]


def _places(run: StudyRun, axis: str) -> list[float]:
    match axis:
        case "token":
            return list(itertools.accumulate(step.tokens for step in run.steps))
        case "epoch":
            return [step.epoch for step in run.steps]
        case "time":
            return list(itertools.accumulate(step.step_seconds for step in run.steps))
    return [step.step for step in run.steps]


def final_loss(found: Sequence[Arm], knees: Sequence[Knee], notes: Sequence[str]) -> go.Figure:
    """Evaluation loss of the kept adapters: along the ranks where they vary, else an arm a row."""
    if len({arm.rank for arm in found if "rank" in arm.varied and losses(arm)}) > 1:
        return _loss_by_rank(found, knees, notes)
    return _loss_by_arm(found, notes)


SEEDS = "Large: mean over seeds. Small: each seed. Thin line: 95 % interval of the mean."


def _loss_by_rank(found: Sequence[Arm], knees: Sequence[Knee], notes: Sequence[str]) -> go.Figure:
    groups: dict[str, list[Arm]] = {}
    for arm in found:
        groups.setdefault(label_without_rank(arm), []).append(arm)
    several = any(len(losses(arm)) > 1 for arm in found)
    missing = [f"{arm.label}: {arm.gap or 'no evaluation loss'}" for arm in found if not losses(arm)]
    figure = framed(
        "Evaluation loss by rank",
        plot_pixels=280,
        subtitle=SEEDS if several else "One seed: no interval.",
        legend=list(groups),
        notes=[*(["Missing: " + "; ".join(missing) + "."] if missing else []), *notes],
        x_title="rank",
        y_title="evaluation loss, nats a token",
    )
    firsts = [group[-1] for group in groups.values()]
    colours, styles = hues(firsts), marks(firsts)
    for place, (label, group) in enumerate(groups.items()):
        arms_of, first = sorted((arm for arm in group if losses(arm)), key=lambda arm: arm.rank), group[-1].label
        colour, (dash, symbol) = colours[first], styles[first]
        # Methods stand a little beside each other, so that their intervals do not cover one another.
        x = [arm.rank * 1.035 ** (place - (len(groups) - 1) / 2) for arm in arms_of]
        for at, arm in zip(x, arms_of, strict=True):
            if len(losses(arm)) > 1:
                figure.add_scatter(
                    x=[at] * len(losses(arm)), y=list(losses(arm).values()), mode="markers", legendgroup=label, showlegend=False,
                    marker={"color": colour, "size": 4, "symbol": symbol}, opacity=0.6, hoverinfo="skip", name=esc(arm.label),
                    customdata=[arm.rank] * len(losses(arm)),
                )  # fmt: skip
        spreads = [spread(list(losses(arm).values())) for arm in arms_of]
        figure.add_scatter(
            x=x, y=[one.mean for one in spreads], mode="lines+markers", name=esc(label), legendgroup=label,
            line={"color": colour, "width": 2, "dash": dash}, marker={"color": colour, "size": 9, "symbol": symbol},
            error_y=_interval(spreads), customdata=[arm.rank for arm in arms_of],
            hovertemplate=f"{esc(label)}, rank %{{customdata}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    for number, knee in enumerate(knees):
        if knee.is_lowest:
            continue
        colour = next((colours[g[-1].label] for label, g in groups.items() if label == knee.label), NEUTRAL)
        figure.add_vline(x=knee.rank, line={"color": colour, "width": 1, "dash": "dot"})
        figure.add_annotation(
            text=f"r* {knee.rank}, {esc(knee.label)}" if knee.label else f"r* {knee.rank}",
            x=math.log10(knee.rank),  # as plotly places texts on a logarithmic axis
            xanchor="left",
            xshift=3,
            y=1,
            yref="paper",
            yanchor="top",
            yshift=-14 * number,
            showarrow=False,
            font={"size": 11},
        )
    ranks = sorted({arm.rank for arm in found if arm.rank})
    figure.update_xaxes(type="log", tickvals=ranks, ticktext=[str(rank) for rank in ranks], tickangle=0)
    return figure


def _interval(spreads: Sequence[Spread]) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 5,
        "array": [one.high - one.mean if one.high is not None else 0 for one in spreads],
        "arrayminus": [one.mean - one.low if one.low is not None else 0 for one in spreads],
        "visible": any(one.high is not None for one in spreads),
    }  # fmt: skip


def _loss_by_arm(found: Sequence[Arm], notes: Sequence[str]) -> go.Figure:
    several = any(len(losses(arm)) > 1 for arm in found)
    figure = by_row(
        "Evaluation loss",
        [arm.label for arm in found],
        unit="nats a token",
        subtitle=SEEDS if several else "One seed: no interval.",
        notes=notes,
        gaps={arm.label: arm.gap or "no evaluation loss" for arm in found if not losses(arm)},
    )
    colours, styles = hues(found), marks(found)
    for row, arm in enumerate(found):
        values = list(losses(arm).values())
        if values:
            one = spread(values)
            add_dot(
                figure, row, arm.label, one.mean, _ends(one), colour=colours[arm.label], symbol=styles[arm.label][1], values=values,
                text=f"{one.mean:.4f}", hover=_in_words(one, ".4f"),
            )  # fmt: skip
    room_for_dots(figure)
    return figure


def _ends(one: Spread) -> tuple[float, float] | None:
    return None if one.low is None or one.high is None else (one.low, one.high)


def _in_words(one: Spread, digits: str) -> str:
    if one.low is None:
        return f"{one.mean:{digits}}, one seed"
    return f"{one.mean:{digits}}, 95 % interval {one.low:{digits}} to {one.high:{digits}}, {one.count} seeds"


def sensitivities(found: Sensitivity, notes: Sequence[str]) -> go.Figure:
    """What quantising each group alone adds to the evaluation loss of the arm without 4 bits."""
    figure = by_row(
        "What each group costs in 4 bits",
        list(found.costs),
        unit=f"evaluation loss above that of {found.reference}, nats a token",
        subtitle="Mean over seeds with its 95 % interval." if found.chance is not None else "One seed: no interval.",
        notes=notes,
    )
    for row, (label, cost) in enumerate(found.costs.items()):
        add_dot(
            figure, row, label, cost.mean, _ends(cost), colour=METHOD_HUES["qlora"], text=f"{cost.mean:+.4f}",
            hover=_in_words(cost, "+.4f"),
        )  # fmt: skip
    room_for_dots(figure)
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    return figure


def quality_figures(
    results: StudyResults,
    found: Sequence[Arm],
    knees: Sequence[Knee],
    sensitive: Sensitivity | None,
    notes: Sequence[str],
) -> dict[str, go.Figure]:
    """Title -> figure, of those that have data."""
    figures = {}
    if any(losses(arm) for arm in found):
        figures["Evaluation loss"] = final_loss(found, knees, notes)
    if sensitive:
        figures["What each group costs in 4 bits"] = sensitivities(sensitive, notes)
    if any(run.evaluations for arm in found for run in arm.runs):
        figures["Evaluation loss while training"] = loss_curves(results, what="evaluation", notes=notes)
    if any(run.steps for arm in found for run in arm.runs):
        figures["Training loss"] = loss_curves(results, smoothing=SMOOTHINGS[usual_smoothing(results)], notes=notes)
    return figures
