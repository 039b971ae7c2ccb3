"""The memory that a run is estimated to need, beside Start: a bar of its parts, the plan, the rank that fits. HTML out."""

import json

from qlora_core.memory import GIB, MemoryEstimate
from qlora_core.planner import fitting
from qlora_core.planner.facts import Facts
from qlora_core.planner.fitting import RankChoice
from qlora_core.ui.words import esc, size
from qlora_core.wording import MEMORY_PARTS

# In the order in which they stand in the bar: shown name, and what it means. Colours are the theme's, --part-NAME.
# The height is fixed, so that nothing below moves while a person types.
MEMORY_CSS = """
.memory { height: 336px; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 10px;
  padding: 12px 14px; background: var(--block-background-fill); font-size: .87rem; }
.memory.none { display: grid; place-items: center; color: var(--muted); font-size: .9rem; }
.memory h4 { margin: 0; font-size: .95rem; display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 8px; }
.memory h4 em { font-style: normal; font-weight: 400; font-size: .82rem; color: var(--muted); }
.memory h4 strong { margin-left: auto; font-size: .9rem; font-variant-numeric: tabular-nums; color: var(--tone) !important; }
.memory.fits { --tone: var(--finished); } .memory.over { --tone: var(--failed); }
.memory .bar { position: relative; display: flex; height: 20px; margin: 8px 0; border-radius: 5px; overflow: hidden;
  background: color-mix(in srgb, var(--muted) 18%, transparent); }
.memory .bar i { flex: none; min-width: 2px; border-right: 1px solid var(--block-background-fill); background: var(--part); }
.memory .bar b { position: absolute; top: 0; bottom: 0; width: 0; border-left: 3px solid var(--failed); }
.memory ul { list-style: none; margin: 0; padding: 0; display: grid; grid-auto-flow: column;
  grid-template: repeat(5, auto) / minmax(0, 1fr) minmax(0, 1fr); gap: 0 22px; }
.memory li { margin: 0; padding: 1px 0; display: flex; gap: 7px; align-items: center; white-space: nowrap; }
.memory li::before { content: ""; flex: none; width: 10px; height: 10px; border-radius: 3px; background: var(--part); }
.memory li span { flex: 1; overflow: hidden; text-overflow: ellipsis; }
.memory li data { font-variant-numeric: tabular-nums; text-align: right; }
.memory p { margin: 7px 0 0; overflow-wrap: anywhere; }
.memory .rank { display: flex; align-items: center; gap: 10px; min-height: 28px; margin-top: 4px; }
.memory button { margin-left: auto; padding: 2px 11px; border: 1px solid var(--border-color-primary); border-radius: 7px;
  font-size: .85rem; font-weight: 600; cursor: pointer; color: var(--body-text-color); background: transparent;
  white-space: nowrap; }
.memory button:hover { border-color: var(--muted); }
.memory .others { margin: 5px 0 0; padding-top: 6px; border-top: 1px solid var(--border-color-primary); color: var(--muted);
  font-size: .82rem; display: grid; grid-template-columns: auto auto 1fr; gap: 1px 14px; }
.memory .others dt, .memory .others dd { margin: 0; font-weight: 400; }
.memory .others dt.head { grid-column: 1 / -1; } .memory .others * { color: var(--muted) !important; }
.memory .others dd.num { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
@media (max-width: 700px) { .memory { height: 388px; } .memory ul { gap: 0 14px; font-size: .82rem; } }
"""


def memory_html(facts: Facts) -> str:
    """The estimate for what the form says now; empty of figures where the model's sizes are unknown."""
    found = fitting.planned(facts)
    if found is None:
        return waiting_html("The model’s sizes are not known, so its memory is not either.")
    usable, needed = fitting.usable_bytes(facts), found.estimate.needed_bytes
    kind = "GPU" if found.estimate.is_gpu else "host memory"
    amount = f"{'✓ fits' if found.fits else '✕ does not fit'}: {needed / GIB:.2f} of {usable / GIB:.2f} GiB"
    return (
        f'<div class="memory {"fits" if found.fits else "over"}" tabindex="0" role="group" aria-label="Memory, estimated">'
        f"<h4>Memory <em>estimate, {kind}</em><strong>{amount}</strong></h4>"
        f"{_bar(found.estimate, usable)}<p>{esc(_sentence(found.reason))}</p>"
        f"{_rank(fitting.rank_for_memory(facts), facts)}{_others(facts)}</div>"
    )


def waiting_html(text: str) -> str:
    return f'<div class="memory none" role="status">{esc(text)}</div>'


def parts(estimate: MemoryEstimate) -> dict[str, int]:
    """The parts that the bar shows, context and fragmentation among them."""
    found = estimate.parts() | {"context": estimate.context_bytes}
    return {name: found[name] for name in MEMORY_PARTS if found[name]}


def _bar(estimate: MemoryEstimate, usable: int) -> str:
    whole, found = max(usable, estimate.needed_bytes, 1), parts(estimate)
    pieces = "".join(
        f'<i style="width:{100 * number / whole:.3f}%;--part:{_colour(name)}" title="{esc(_told(name, number))}"></i>'
        for name, number in found.items()
    )
    limit = f'<b style="left:{100 * usable / whole:.2f}%"></b>' if whole > usable else ""
    items = "".join(
        f'<li style="--part:{_colour(name)}" title="{esc(_told(name, number))}"><span>{MEMORY_PARTS[name][0]}</span>'
        f'<data value="{number}">{size(number)}</data></li>'
        for name, number in found.items()
    )
    label = f"{size(estimate.needed_bytes)} of {size(usable)}"
    return f'<div class="bar" role="img" aria-label="{label}">{pieces}{limit}</div><ul>{items}</ul>'


def _colour(name: str) -> str:
    return f"var(--part-{name.split()[0]})"


def _told(name: str, number: int) -> str:
    return f"{MEMORY_PARTS[name][0]}: {size(number)}, {MEMORY_PARTS[name][1]}"


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:]}."


def _rank(choice: RankChoice, facts: Facts) -> str:
    """The highest rank that fits, and what the rows bear; a button where another rank is the better choice."""
    if choice.largest is None:
        return '<p class="rank">No rank fits.</p>'
    text = f"Highest rank that fits: {choice.largest}"
    text += (
        f"; {choice.for_rows} is enough for these rows" if facts.train_rows and choice.for_rows < choice.largest else ""
    )
    button = ""
    if choice.rank != facts.config.rank:
        remedy = esc(json.dumps({"rank": choice.rank}))
        button = f'<button type="button" data-remedy="{remedy}">Use rank {choice.rank}</button>'
    return f'<p class="rank"><span>{text}</span>{button}</p>'


def _others(facts: Facts) -> str:
    """What is often asked for beside it, named for what it is."""
    thumb = fitting.rule_of_thumb(facts.config.method)
    rows = (
        ("Full fine-tuning", fitting.full_fine_tuning_bytes(facts.architecture), "12 bytes a weight"),
        ("Rule of thumb", fitting.rule_of_thumb_bytes(facts.architecture, facts.config), thumb),
    )
    lines = "".join(f'<dt>{name}</dt><dd class="num">{size(number)}</dd><dd>{what}</dd>' for name, number, what in rows)
    return f'<dl class="others"><dt class="head">For comparison; neither counts activations and logits</dt>{lines}</dl>'
