"""How the page looks: one monochrome theme, so that colour always means something. System fonts, no foreign request."""

import gradio as gr

from qlora_core.charts import METHOD_HUES


def theme() -> gr.themes.Base:
    """Slate greys, near-black primary buttons, fonts of the system; light and dark."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.slate,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_title_text_weight="600",
        block_label_text_weight="600",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*neutral_500",
        button_border_width="1px",
        button_large_text_weight="600",
        button_small_text_weight="600",
        button_primary_border_color="transparent",
        button_cancel_background_fill="#b42318",
        button_cancel_background_fill_hover="#8f1b13",
        button_cancel_background_fill_dark="#b42318",
        button_cancel_background_fill_hover_dark="#d13c30",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        button_cancel_border_color="transparent",
        button_cancel_border_color_dark="transparent",
        button_primary_background_fill="*neutral_900",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*neutral_100",
        button_primary_background_fill_hover_dark="white",
        button_primary_text_color_dark="*neutral_900",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        checkbox_background_color_selected="*neutral_800",
        checkbox_background_color_selected_dark="*neutral_500",
        checkbox_label_background_fill="white",
        checkbox_label_background_fill_dark="*neutral_950",
        checkbox_label_background_fill_selected="*neutral_100",
        checkbox_label_background_fill_selected_dark="*neutral_800",
        checkbox_label_border_color_selected="*neutral_500",
        checkbox_label_border_color_selected_dark="*neutral_400",
        checkbox_label_text_color_selected="*body_text_color",
        checkbox_border_color_selected="*neutral_800",
        checkbox_border_color_selected_dark="*neutral_300",
        link_text_color="*neutral_700",
        link_text_color_dark="*neutral_200",
    )


_COLOURS = """
:root { --lora: LORA; --qlora: QLORA; --learn: #0b7a53; --learn-soft: #d5f2e4;
  --running: #1d4ed8; --finished: #0b7a53; --failed: #b42318; --stopped: #92600a; --queued: #556070;
  --warn-soft: #fdecea; --muted: var(--neutral-500);
  --part-libraries: #9aa6b6; --part-weights: #465468; --part-quantisation: #7f8da1; --part-adapters: #009e73;
  --part-optimizer: #56b4e9; --part-gradients: #cc79a7; --part-activations: #e69f00; --part-working: #f3d27a;
  --part-logits: #7b61b5; --part-context: #c3ccd8; }
.dark { --learn: #7fe0b5; --learn-soft: #103b2b; --running: #8fb4ff; --finished: #6fdcae; --failed: #ff9d92;
  --stopped: #f2c46d; --queued: #a9b4c4; --warn-soft: #3a1714; --muted: var(--neutral-400);
  --part-libraries: #6b7a90; --part-weights: #b4c0d0; --part-quantisation: #8b99ad; --part-adapters: #22c795;
  --part-optimizer: #6cc1f0; --part-gradients: #de93bd; --part-activations: #f2b233; --part-working: #94762c;
  --part-logits: #a48be0; --part-context: #55647a; }
"""

_PAGE = """
.html-container { padding: 0 !important; }
.html-container.pending { opacity: 1 !important; }
.block:has(> .html-container > .prose:empty) { display: none; }
.prose i { color: inherit; }
footer .divider { display: none; }
.tab-wrapper button.selected { color: var(--body-text-color) !important; font-weight: 600; }
/* All five tabs in sight on a phone: gradio hides those that do not fit behind three dots. */
@media (max-width: 480px) { .tab-wrapper button { padding: 0 8px !important; font-size: .92rem; } }
.lab-status { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 22px; min-height: 34px; }
.lab-status b { font-size: 1.35rem; letter-spacing: -0.02em; }
.lab-status .device { color: var(--muted); }
.lab-status .now { margin-left: auto; font-variant-numeric: tabular-nums; }
.lab-status .now::before { content: "●"; color: var(--muted); margin-right: 7px; font-size: .8em; }
.lab-status .now.busy::before { color: var(--running); }
#card-preview code { overflow-wrap: anywhere; }
.lab-step { margin: 4px 0 0; font-size: 1.02rem; font-weight: 600; display: flex; gap: 10px; align-items: center; }
.lab-step i { font-style: normal; width: 24px; height: 24px; border-radius: 50%; display: inline-grid;
  place-items: center; font-size: .85rem; background: var(--neutral-200); color: var(--neutral-800); }
.dark .lab-step i { background: var(--neutral-700); color: var(--neutral-100); }
.lab-hint, .lab-caption { color: var(--muted); font-size: .9rem; }
.lab-hint { margin: 0; }
.lab-card { border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
  padding: 14px 16px; }
.lab-card h3 { margin: 0 0 2px; font-size: 1.05rem; overflow-wrap: anywhere; }
.lab-facts { display: flex; flex-wrap: wrap; gap: 10px 30px; margin: 10px 0 0; }
.lab-facts dt { color: var(--muted); font-size: .82rem; }
.lab-facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.lab-empty { border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 30px 20px; text-align: center; }
.lab-empty p { color: var(--muted); margin: 4px 0 0; }
.lab-problems { border-left: 4px solid var(--failed); background: var(--warn-soft); border-radius: 8px; padding: 10px 14px;
  overflow-wrap: anywhere; }
.lab-problems ul { list-style: disc; }
.lab-problems b { color: var(--failed); }
.lab-problems ul { margin: 4px 0 0; padding-left: 18px; max-height: 260px; overflow: auto; }
.lab-warn { color: var(--failed); font-weight: 600; }
.lab-group { font-weight: 600; margin: 10px 0 -4px; padding-top: 12px; border-top: 1px solid var(--border-color-primary); }
.lab-group.first { border-top: 0; padding-top: 0; margin-top: 0; }
.lab-pager { align-items: center !important; gap: 10px !important; flex-wrap: nowrap !important; }
.lab-dataset { align-items: center !important; }
.lab-code textarea { font-family: var(--font-mono) !important; font-size: .82rem !important; line-height: 1.5 !important;
  white-space: pre !important; overflow-x: auto !important; }
#upload { min-height: 152px; }
#plan .lab-card { min-height: 108px; }
.lab-sticky { position: sticky; top: 12px; align-self: flex-start; }
button:focus-visible, a:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--running) !important;
  outline-offset: 2px; }
.lab-links { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0 0; }
.lab-sources { margin: 10px 0 0; padding-left: 18px; list-style: disc; }
.lab-job { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px;
  background: var(--block-background-fill); }
.lab-job .lab-bar { margin-top: 8px; }
.lab-bar.moving i { animation: lab-moving 1.6s ease-in-out infinite alternate; opacity: .5; }
@keyframes lab-moving { from { transform: translateX(-60%); } to { transform: translateX(60%); } }
.lab-link { display: inline-block; border: 1px solid var(--neutral-400); border-radius: 8px; padding: 8px 14px;
  font-weight: 600; text-decoration: none !important; }
"""

_RUNS = """
.lab-chip { display: inline-flex; gap: 6px; align-items: center; font-weight: 600; white-space: nowrap; }
.lab-chip i { font-style: normal; width: 1.1em; text-align: center; }
.lab-running { color: var(--running); } .lab-finished { color: var(--finished); } .lab-stopped { color: var(--stopped); }
.lab-failed, .lab-crashed { color: var(--failed); } .lab-queued { color: var(--queued); }
.lab-method { display: inline-flex; align-items: center; gap: 6px; white-space: nowrap; }
.lab-method::before { content: ""; width: 10px; height: 10px; border-radius: 3px; background: var(--hue); }
.lab-method:has(+ .lab-variant) { margin-right: 8px; }
.lab-card h3 .lab-method { white-space: normal; }
.lab-method-lora { --hue: var(--lora); } .lab-method-qlora { --hue: var(--qlora); }
.lab-scroll { max-height: 290px; overflow: auto; border: 1px solid var(--border-color-primary) !important; border-radius: 10px;
  background: var(--block-background-fill); }
.lab-table { width: 100%; border: 0 !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; margin: 0 !important; }
.lab-table th { text-align: left; font-weight: 600; font-size: .82rem; color: var(--muted); position: sticky; top: 0;
  background: var(--block-background-fill); z-index: 1; }
.lab-table th, .lab-table td { padding: 8px 12px; border: 0; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; }
.lab-table tr:last-child td { border-bottom: 0; }
.lab-table td.num, .lab-table th.num { text-align: right; }
.lab-table td pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; background: none; }
.lab-runs tbody tr { cursor: pointer; }
.lab-runs tbody tr:hover, .lab-runs tr.chosen { background: var(--neutral-100); }
.dark .lab-runs tbody tr:hover { background: var(--neutral-800); }
.dark .lab-runs tr.chosen { background: var(--neutral-800); }
.lab-table tr, .lab-table thead, .lab-table tbody { border: 0 !important; }
.lab-runs tr.chosen td:first-child { box-shadow: inset 3px 0 0 var(--body-text-color); }
.lab-runs td:nth-child(2) { white-space: nowrap; }
.lab-runs button { all: unset; cursor: pointer; font-weight: 600; overflow-wrap: anywhere; color: inherit; }
.lab-variant, .lab-id { display: inline-block; font-size: .76rem; font-weight: 600; line-height: 1.5; padding: 0 6px;
  border-radius: 5px; white-space: nowrap; vertical-align: 1px; }
.lab-variant { margin-right: 4px; background: var(--neutral-200); color: var(--neutral-700); }
.dark .lab-variant { background: var(--neutral-700); color: var(--neutral-100); }
.lab-id { font-family: var(--font-mono); color: var(--muted); border: 1px solid var(--border-color-primary); }
.lab-waiting ol { list-style: none; margin: 4px 0 0; padding: 0; max-height: 236px; overflow: auto; }
.lab-waiting li { display: flex; align-items: center; gap: 4px 12px; padding: 5px 2px; margin: 0;
  border-top: 1px solid var(--border-color-primary); }
.lab-waiting li:first-child { border-top: 0; }
.lab-waiting .place { color: var(--muted); font-variant-numeric: tabular-nums; min-width: 1.6em; }
.lab-waiting .name { font-weight: 600; overflow-wrap: anywhere; flex: 1; }
.lab-waiting .acts { display: inline-flex; gap: 6px; }
.lab-waiting button { width: 34px; height: 32px; padding: 0; display: inline-grid; place-items: center;
  border: 1px solid var(--border-color-primary); border-radius: 7px; background: none; color: inherit; cursor: pointer;
  line-height: 1; }
.lab-waiting button:hover { background: var(--neutral-100); } .dark .lab-waiting button:hover { background: var(--neutral-700); }
.lab-waiting button[aria-disabled=true] { opacity: .3; cursor: default; background: none; }
.lab-ask { align-items: end !important; gap: 10px !important; }
.lab-ask .lab-warn { margin: 0; padding: 9px 0; }
.lab-ask > button { flex: 0 0 auto !important; }
.lab-ask > .form { flex: 0 1 300px !important; }
.lab-ask > .block:has(.lab-warn) { flex: 0 1 auto !important; }
.lab-parts ul { list-style: none; margin: 4px 0 0; padding: 0; } .lab-parts li { margin: 2px 0; }
.lab-differences { table-layout: fixed; } .lab-scroll:has(.lab-differences) { max-height: 460px; }
.lab-differences th[scope=row] { font-weight: 400; color: inherit; font-size: inherit; position: static; }
.lab-differences tr.group th { position: static; padding-top: 14px; }
.lab-differences td { overflow-wrap: anywhere; font-weight: 600; }
.lab-head { min-height: 132px; } #study-head .lab-head { min-height: 154px; }
#study-kinds { gap: 14px; } #study-kinds button { min-height: 62px; font-size: 1.08rem; }
#run-result .lab-card, #run-result .lab-empty { min-height: 300px; }
#run-result .lab-empty { display: grid; align-content: center; }
.lab-head .top { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; }
.lab-head .lab-chip { font-size: 1.25rem; }
.lab-head .detail { margin: 6px 0 10px; overflow-wrap: anywhere; }
.lab-bar { height: 8px; border-radius: 4px; background: var(--neutral-200); overflow: hidden; }
.dark .lab-bar { background: var(--neutral-700); }
.lab-bar i { display: block; height: 100%; background: var(--hue); transition: width .4s; }
.lab-bar-words { display: flex; justify-content: space-between; gap: 12px; color: var(--muted); font-size: .88rem;
  margin-top: 5px; font-variant-numeric: tabular-nums; }
.lab-log { height: 300px; overflow: auto; padding: 10px 14px; border: 1px solid var(--border-color-primary);
  border-radius: 10px; background: var(--block-background-fill); font-size: .9rem; }
.lab-log div { display: grid; grid-template-columns: 92px 1fr; gap: 8px; padding: 2px 0; overflow-wrap: anywhere; }
.lab-log time { color: var(--muted); font-variant-numeric: tabular-nums; }
.lab-raw { max-height: 320px; overflow: auto; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.block.lab-chart { border: 1px solid var(--border-color-primary) !important; border-radius: 10px !important;
  background: var(--block-background-fill) !important; }
.js-plotly-plot text { fill: var(--body-text-color) !important; }
.dark .js-plotly-plot .scatterlayer { filter: brightness(1.45); }
.dark .js-plotly-plot .legend .layers { filter: brightness(1.45); }
.js-plotly-plot .bglayer rect.bg { fill-opacity: 0 !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
.lab-right::before { content: "✓ right"; color: var(--finished); font-weight: 600; white-space: nowrap; }
.lab-wrong::before { content: "✕ wrong"; color: var(--failed); font-weight: 600; white-space: nowrap; }
"""

_TOKENS = """
.lab-caption { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-bottom: 8px; }
.lab-legend { display: inline-flex; gap: 8px; } .lab-legend span { padding: 0 6px; border-radius: 4px; }
.lab-tokens { height: 250px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; padding: 12px 14px;
  border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--block-background-fill);
  font-family: var(--font-mono); font-size: .85rem; line-height: 1.75; }
.lab-tokens .off, .lab-legend .off { color: var(--muted); }
.lab-tokens .on, .lab-legend .on { background: var(--learn-soft); color: var(--learn); }
.lab-tokens span { border-right: 1px solid color-mix(in srgb, currentColor 22%, transparent); }
.lab-tokens .special { font-weight: 700; border: 1px solid color-mix(in srgb, currentColor 45%, transparent);
  border-radius: 4px; padding: 0 2px; }
.lab-tokens .cut { opacity: .45; text-decoration: line-through; }
.lab-tokens .cut-line { display: inline-block; padding: 0 8px; margin: 0 2px; border-radius: 4px; font-size: .76rem;
  color: var(--failed); background: var(--warn-soft); }
.lab-tokens .newline { opacity: .5; font-style: normal; }
"""

_NARROW = """
@media (max-width: 700px) {
  .lab-scroll { max-height: 420px; }
  .lab-pager { flex-wrap: wrap !important; }
  .lab-pager > button { flex: 1 1 40% !important; }
  .lab-pager > .block { flex: 1 1 100% !important; }
  #prepare .row > *, #prepare .form > *, .lab-choices > *, .lab-choices > .form > * { flex: 1 0 100% !important; }
  .lab-status .now { margin-left: 0; }
  .lab-sticky { position: static; }
  .lab-runs thead { display: none; }
  .lab-runs tr { display: grid; grid-template-columns: 1fr auto; gap: 2px 12px; padding: 9px 12px;
    border-bottom: 1px solid var(--border-color-primary); }
  .lab-runs td { border: 0 !important; padding: 0 !important; text-align: left !important; font-size: .86rem; }
  .lab-runs td[data-label]::before { content: attr(data-label) " "; color: var(--muted); }
  .lab-runs td:first-child { box-shadow: none !important; font-size: 1rem; }
  .block.lab-chart { flex: 1 0 100% !important; }
  .lab-waiting li { display: grid; grid-template-columns: auto 1fr auto; }
  .lab-waiting .name { grid-column: 2 / -1; } .lab-waiting .method { grid-column: 2; }
  #run-buttons > button, #study-buttons > button { flex: 1 1 40% !important; }
  #study-runs .lab-runs tr { grid-template-columns: 1fr 1fr; }
  #study-page .lab-figure { padding: 2px 0 6px; }
  /* A figure needs the whole width. */
  #study-page [id$="-part"] { padding-left: 1px !important; padding-right: 1px !important; }
  #study-page [id$="-part"] > button { padding: 0 9px; }
  .lab-ask > .block, .lab-ask > .form { flex: 1 0 100% !important; } .lab-ask > button { flex: 1 1 40% !important; }
  .lab-answers thead { display: none; }
  .lab-answers tr { display: block; padding: 6px 0; border-bottom: 1px solid var(--border-color-primary) !important; }
  .lab-answers td { display: block; border: 0 !important; padding: 3px 12px; }
  .lab-answers td::before { content: attr(data-label); display: block; color: var(--muted); font-size: .8rem; }
  .lab-log div { grid-template-columns: 1fr; gap: 0; }
}
"""

# Rules for what lies around gradio's own container, which its rewriting of `css` cannot reach.
HEAD = """<style>
.gradio-container .main.fillable { max-width: 1240px !important; margin: 0 auto !important; padding: 18px 24px 30px !important; }
.gradio-container main.contain { padding: 0 !important; }
@media (max-width: 700px) { .gradio-container .main.fillable { padding: 8px 12px 24px !important; } }
</style>"""

CSS = (
    _COLOURS.replace("QLORA", METHOD_HUES["qlora"], 1).replace("LORA", METHOD_HUES["lora"], 1)
    + _PAGE
    + _RUNS
    + _TOKENS
    + _NARROW
)
