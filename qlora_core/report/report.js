"use strict";
// Draws the figures that the page brings along, when they come into sight, and saves them as PNG, SVG or CSV.
const study = JSON.parse(document.getElementById("study-figures").textContent);
const touch = window.matchMedia("(pointer: coarse)").matches;

function draw(card) {
  const target = card.querySelector(".plot");
  if (card.dataset.drawn || !target.offsetWidth) return;
  card.dataset.drawn = "yes";
  const { data, layout } = study[card.dataset.figure].figure;
  // On a touch screen a finger scrolls the page, not the figure.
  Plotly.newPlot(target, data, touch ? { ...layout, dragmode: false } : layout, { responsive: true, displayModeBar: false });
}

function save(name, href) {
  const link = document.createElement("a");
  link.download = name;
  link.href = href;
  link.click();
}

async function picture(card, format) {
  const { figure, file } = study[card.dataset.figure];
  const shown = card.querySelector(".plot");
  draw(card);
  const layout = {
    ...figure.layout, ...JSON.parse(JSON.stringify({ xaxis: shown.layout.xaxis, title: shown.layout.title })),
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", font: { ...figure.layout.font, color: "#1e293b" },
  };
  const size = { width: Math.max(shown.offsetWidth, 640), height: figure.layout.height };
  const scale = format === "png" ? 2 : 1;
  save(`${file}.${format}`, await Plotly.toImage({ data: shown.data, layout }, { format, scale, ...size }));
}

function choose(card, kind, key) {
  const { update, layout } = study[card.dataset.figure][kind][key];
  draw(card);
  Plotly.update(card.querySelector(".plot"), update, layout);
}

const seen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "400px" },
);
for (const card of document.querySelectorAll(".figure")) {
  seen.observe(card);
  card.addEventListener("click", ({ target }) => {
    if (target.dataset.save === "csv") {
      const { csv, file } = study[card.dataset.figure];
      save(`${file}.csv`, URL.createObjectURL(new Blob([csv], { type: "text/csv" })));
    } else if (target.dataset.save) picture(card, target.dataset.save);
  });
  card.addEventListener("change", ({ target }) => choose(card, target.name, target.value));
}
window.addEventListener("beforeprint", () => document.querySelectorAll(".figure").forEach(draw));
