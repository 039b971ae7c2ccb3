"""StudyResults -> plotly figures, by part of the study. Colours of text and grid come from the page; knows no page."""

import plotly.graph_objects as go

from qlora_core.study_charts.behaviour import behaviour_figures
from qlora_core.study_charts.cost import cost_figures
from qlora_core.study_charts.quality import AXES as AXES
from qlora_core.study_charts.quality import SMOOTHINGS as SMOOTHINGS
from qlora_core.study_charts.quality import loss_curves as loss_curves
from qlora_core.study_charts.quality import quality_figures
from qlora_core.study_charts.quality import usual_smoothing as usual_smoothing
from qlora_core.study_charts.tabled import table_of as table_of
from qlora_core.study_charts.weights import weight_figures
from qlora_core.study_hypotheses import knees, sensitivity
from qlora_core.study_numbers import arms, pairs
from qlora_core.study_results import StudyResults

COST, QUALITY, WEIGHTS, BEHAVIOUR = "Memory and time", "Loss", "Weights", "Answers"


def sections(results: StudyResults) -> dict[str, dict[str, go.Figure]]:
    """Part of the study -> title -> figure, in the order of reading; only what has data. Titles are unique.

    Every figure carries in itself what makes the runs not quite comparable, and names an arm that has nothing to show.
    """
    found, notes = arms(results), notes_of(results)
    parts = {
        COST: cost_figures(found, pairs(found), notes),
        QUALITY: quality_figures(results, found, knees(results, found), sensitivity(found), notes),
        WEIGHTS: weight_figures(results, found, notes),
        BEHAVIOUR: behaviour_figures(results.analysis, found, notes),
    }
    for figures in parts.values():
        for figure in figures.values():
            figure.update_layout(uirevision=results.study_id)
    return {name: figures for name, figures in parts.items() if figures}


def figures(results: StudyResults) -> dict[str, go.Figure]:
    """Title -> figure, in the order of reading; only those that have data."""
    return {title: figure for part in sections(results).values() for title, figure in part.items()}


def notes_of(results: StudyResults) -> list[str]:
    """What every figure must say: how the runs are not quite comparable."""
    return ["Not quite comparable: " + "; ".join(results.differences) + "."] if results.differences else []
