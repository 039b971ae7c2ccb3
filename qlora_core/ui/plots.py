"""A plotly figure that stays on the page while its data change, so that a redraw keeps the zoom; gr.Plot makes it anew.

plotly.js comes from the installed plotly package, not from another machine.
"""

from pathlib import Path

import gradio as gr
import plotly
import plotly.graph_objects as go

PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# Where a page has a base, plotly names patterns and clips by the page's address, and loses them when that changes.
WITHOUT_BASE = """
const withoutBase = (work) => {
  const base = document.querySelector('base[href]'), href = base?.getAttribute('href');
  base?.removeAttribute('href');
  try { return work(); } finally { base?.setAttribute('href', href); }
};
"""
# The template never changes, so gradio leaves the drawing alone; the figure comes as the component's value.
DRAW = (
    WITHOUT_BASE
    + """
const target = element.querySelector('.lab-plot');
const draw = () => {
  if (!props.value) return;
  const figure = JSON.parse(props.value);
  withoutBase(() => window.Plotly.react(target, figure.data, figure.layout, { responsive: true, displaylogo: false }));
};
watch('value', draw);
draw();
// A tab that was hidden has no width while it is drawn.
new ResizeObserver(() => { if (target.data && target.offsetWidth) window.Plotly.Plots.resize(target); }).observe(target);
"""
)


GALLERY_CSS = """
.lab-gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 350px)), 1fr));
  gap: 12px; min-height: var(--height, 0); }
.lab-gallery:empty::before { content: attr(data-empty); display: grid; place-items: center; color: var(--muted); font-size: .9rem;
  border: 1px dashed var(--border-color-primary); border-radius: 10px; text-align: center; padding: 0 16px; }
.lab-gallery:empty:not([data-empty]) { display: none; }
.lab-figure { min-width: 0; display: flex; flex-direction: column; border: 1px solid var(--border-color-primary);
  border-radius: 10px; padding: 2px 4px 6px; background: var(--block-background-fill); }
.lab-figure .tools { display: flex; justify-content: flex-end; align-items: center; gap: 6px; padding: 0 8px; margin-top: auto; }
.lab-figure .tools button { margin: 0; padding: 1px 9px; border: 1px solid var(--border-color-primary); border-radius: 6px;
  cursor: pointer; font-size: .74rem; font-weight: 600; background: transparent; color: var(--muted); }
.lab-figure .tools button:hover { color: var(--body-text-color); border-color: var(--muted); }
.lab-figure .tools select { margin-right: auto; min-width: 0; max-width: 60%; padding: 2px 6px; appearance: auto;
  border-radius: 6px; border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  color: var(--body-text-color); font-size: .8rem; }
"""
# Figures come and go: each card has its place by its title, so that one that stays keeps its zoom and what was chosen in it. One
# is drawn when it comes into sight, and a closed part of the page draws none.
GALLERY = (
    WITHOUT_BASE
    + """
const target = element.querySelector('.lab-gallery');
const touch = window.matchMedia('(pointer: coarse)').matches;
const cards = new Map();
const save = (name, href) => {
  const link = document.createElement('a');
  link.download = name; link.href = href; link.click();
};
const entry = (card) => card.entries.find(({ name }) => name === card.chosen) || card.entries.at(-1);
const draw = (card) => {
  if (!card.near || !card.plot.offsetWidth) return;
  const text = JSON.stringify(entry(card).figure);
  if (card.drawn === text) return;
  card.drawn = text;
  // plotly writes into what it draws.
  const { data, layout } = JSON.parse(text);
  // On a touch screen a finger scrolls the page, not the figure.
  const shown = touch ? { ...layout, dragmode: false } : layout;
  withoutBase(() => window.Plotly.react(card.plot, data, shown, { responsive: true, displaylogo: false }));
};
const picture = async (card, format) => {
  const { figure, file } = entry(card), seen = card.plot.layout || {};
  const white = { paper_bgcolor: '#fff', plot_bgcolor: '#fff', font: { ...figure.layout.font, color: '#1e293b' } };
  const layout = { ...figure.layout, ...white };
  // As it is zoomed.
  for (const axis of Object.keys(seen).filter((name) => /^[xy]axis/.test(name)))
    layout[axis] = { ...layout[axis], range: seen[axis].range, autorange: seen[axis].autorange };
  const size = { width: Math.max(card.plot.offsetWidth, 640), height: figure.layout.height };
  const how = { format, scale: format === 'png' ? 2 : 1, ...size };
  save(file + '.' + format, await withoutBase(() => window.Plotly.toImage({ data: figure.data, layout }, how)));
};
const table = ({ csv, file }) => {
  const href = URL.createObjectURL(new Blob([csv], { type: 'text/csv' }));
  save(file + '.csv', href);
  setTimeout(() => URL.revokeObjectURL(href), 1000);
};
const of = (box) => [...cards.values()].find((card) => card.box === box || card.plot === box);
const near = new IntersectionObserver((seen) => seen.forEach(({ target: box, isIntersecting }) => {
  const card = of(box);
  if (card) { card.near = isIntersecting; draw(card); }
}), { rootMargin: '300px' });
// A window that is made narrower, a part that is opened.
const sized = new ResizeObserver((seen) => seen.forEach(({ target: plot }) => {
  const card = of(plot);
  if (card && plot.offsetWidth) { draw(card); if (plot.data) window.Plotly.Plots.resize(plot); }
}));
const make = (title) => {
  const [box, plot, tools] = ['lab-figure', 'lab-plot', 'tools'].map((name) => {
    const made = document.createElement('div'); made.className = name; return made; });
  const choice = document.createElement('select');
  const card = { box, plot, choice, near: false };
  choice.setAttribute('aria-label', title + ' of');
  choice.onchange = () => { card.chosen = choice.value; fit(card); draw(card); };
  tools.append(choice);
  ['PNG', 'SVG', 'CSV'].forEach((kind) => {
    const button = document.createElement('button');
    button.type = 'button'; button.textContent = kind; button.setAttribute('aria-label', title + ' as ' + kind);
    button.onclick = () => kind === 'CSV' ? table(entry(card)) : picture(card, kind.toLowerCase());
    tools.append(button);
  });
  plot.setAttribute('role', 'img'); plot.setAttribute('aria-label', title);
  box.append(plot, tools);
  near.observe(box); sized.observe(plot);
  return card;
};
const fit = (card) => { card.plot.style.height = entry(card).figure.layout.height + 'px'; };
const update = () => {
  const given = props.value ? JSON.parse(props.value) : [];
  given.forEach(({ title, entries }, place) => {
    if (!cards.has(title)) cards.set(title, make(title));
    const card = cards.get(title), names = entries.map(({ name }) => name);
    if (target.children[place] !== card.box) target.insertBefore(card.box, target.children[place] || null);
    card.entries = entries;
    if (card.names !== String(names)) {
      card.choice.replaceChildren(...names.map((name) => new Option(name, name)));
      card.names = String(names);
    }
    card.choice.hidden = names.length < 2;
    card.choice.value = entry(card).name;
    fit(card); draw(card);
  });
  const kept = new Set(given.map(({ title }) => title));
  cards.forEach((card, title) => {
    if (kept.has(title)) return;
    near.unobserve(card.box); sized.unobserve(card.plot);
    if (card.plot.data) window.Plotly.purge(card.plot);
    card.box.remove(); cards.delete(title);
  });
};
watch('value', update);
update();
"""
)


def gallery(*, elem_id: str, least: int = 350, empty: str = "") -> gr.HTML:
    """Any number of figures beside each other, none narrower than `least` pixels where the page is as wide. Its value is JSON:
    [{title, entries: [{name, figure, csv, file}]}]: a card for each title; of several entries one is chosen, at first the last.
    PNG and SVG are made from the figure; `file` is the name of what is saved, without its end. `empty` stands in the place of
    figures that are yet to come."""
    waiting = f' data-empty="{empty}"' if empty else ""
    style = f"--least:{least}px" + (";--height:320px" if empty else "")
    return gr.HTML(
        "",
        html_template=f'<div class="lab-gallery" style="{style}"{waiting}></div>',
        css_template=GALLERY_CSS,
        js_on_load=GALLERY,
        head=f'<script src="gradio_api/file={PLOTLY_JS}"></script>',
        elem_id=elem_id,
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
