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


GALLERY_CSS = """
.lab-gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px 18px; }
.lab-gallery h3 { grid-column: 1 / -1; margin: 10px 0 0; } .lab-gallery .lab-plot { min-width: 0; }
"""
# Figures come and go: each has its place by its title, so that one that stays keeps its zoom. SVG and CSV go beside plotly's PNG.
GALLERY = """
const target = element.querySelector('.lab-gallery');
const save = (text, name) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/csv' })); link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
const cell = (value) => {
  const text = value === null || value === undefined ? '' : String(value);
  return /[",\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
};
const csv = (plot) => {
  const rows = [['trace', 'x', 'y', 'z']];
  plot.data.forEach((trace) => {
    if (trace.z) trace.z.forEach((row, i) => Array.from(row).forEach((z, j) =>
      rows.push([trace.name, trace.x ? trace.x[j] : j, trace.y ? trace.y[i] : i, z])));
    else {
      const x = trace.x || [], y = trace.y || [];
      for (let i = 0; i < Math.max(x.length, y.length); i++) rows.push([trace.name, x[i], y[i], '']);
    }
  });
  return rows.map((row) => row.map(cell).join(',')).join('\\n');
};
const icon = (letter) => ({ width: 1000, height: 1000,
  svg: `<svg viewBox="0 0 24 24" xmlns="http://www.w3.org/2000/svg"><text x="12" y="18" text-anchor="middle" font-size="15"
    font-family="system-ui, sans-serif" font-weight="700">${letter}</text></svg>` });
const buttons = (title) => [
  { name: 'Save as PNG', icon: icon('P'), click: (p) => Plotly.downloadImage(p, { format: 'png', filename: title, scale: 2 }) },
  { name: 'Save as SVG', icon: icon('S'), click: (p) => Plotly.downloadImage(p, { format: 'svg', filename: title }) },
  { name: 'Save as CSV', icon: icon('C'), click: (p) => save(csv(p), title + '.csv') },
];
const draw = () => {
  const parts = props.value ? JSON.parse(props.value) : [];
  const wanted = new Set();
  let last = null;
  const place = (key, make) => {
    wanted.add(key);
    let found = [...target.children].find((child) => child.dataset.key === key);
    if (!found) { found = make(); found.dataset.key = key; }
    const next = last ? last.nextSibling : target.firstChild;
    if (found !== next) target.insertBefore(found, next);
    last = found;
    return found;
  };
  parts.forEach(({ part, figures }) => {
    if (part) place('part ' + part, () => {
      const head = document.createElement('h3'); head.className = 'lab-step'; head.textContent = part; return head; });
    figures.forEach(({ title, figure }) => {
      const box = place(part + ' / ' + title, () => {
        const made = document.createElement('div');
        made.className = 'lab-plot'; made.setAttribute('role', 'img'); return made; });
      box.setAttribute('aria-label', title);
      box.style.height = figure.layout.height + 'px';
      window.Plotly.react(box, figure.data, figure.layout,
        { responsive: true, displaylogo: false, modeBarButtonsToAdd: buttons(title) });
    });
  });
  [...target.children].forEach((child) => { if (!wanted.has(child.dataset.key)) child.remove(); });
};
watch('value', draw);
draw();
// A tab that was hidden has no width while it is drawn.
new ResizeObserver(() => target.querySelectorAll('.lab-plot').forEach((plot) => {
  if (plot.data && plot.offsetWidth) window.Plotly.Plots.resize(plot); })).observe(target);
"""


def gallery(*, elem_id: str) -> gr.HTML:
    """Any number of figures, by part and title. Its value is JSON: [{part, figures: [{title, figure}]}]."""
    return gr.HTML(
        "",
        html_template='<div class="lab-gallery"></div>',
        css_template=GALLERY_CSS,
        js_on_load=GALLERY,
        head=f'<script src="gradio_api/file={PLOTLY_JS}"></script>',
        elem_id=elem_id,
        elem_classes="lab-chart",
    )


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
