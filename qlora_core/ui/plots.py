"""A plotly figure that stays on the page while its data change, so that a redraw keeps the zoom; gr.Plot makes it anew.

plotly.js comes from the installed plotly package, not from another machine.
"""

from pathlib import Path

import gradio as gr
import plotly
import plotly.graph_objects as go

PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# The template never changes, so gradio leaves the drawing alone; the figure comes as the component's value.
DRAW = """
const target = element.querySelector('.lab-plot');
const draw = () => {
  if (!props.value) return;
  const figure = JSON.parse(props.value);
  window.Plotly.react(target, figure.data, figure.layout, { responsive: true, displaylogo: false });
};
watch('value', draw);
draw();
// A tab that was hidden has no width while it is drawn.
new ResizeObserver(() => { if (target.data && target.offsetWidth) window.Plotly.Plots.resize(target); }).observe(target);
"""


def plot(figure: go.Figure, *, height: int, elem_id: str, label: str) -> gr.HTML:
    """Its value is a figure as JSON: `figure.to_json()`."""
    return gr.HTML(
        figure.to_json(),
        html_template=f'<div class="lab-plot" role="img" aria-label="{label}" style="height:{height}px"></div>',
        js_on_load=DRAW,
        head=f'<script src="gradio_api/file={PLOTLY_JS}"></script>',
        elem_id=elem_id,
        elem_classes="lab-chart",
        min_width=300,
        min_height=height,
    )
