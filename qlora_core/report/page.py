"""StudyResults -> one HTML page that works without a network: verdicts, runs, figures, answers, and how to make it again.

Every text from outside is escaped here; the page may load nothing (its own policy forbids it).
"""

import base64
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from qlora_core.charts import NEUTRAL
from qlora_core.data.rows import counted
from qlora_core.report.bundle import YAML, command, environments, reproducible, study_yaml
from qlora_core.report.cards import esc, figure_cards, slug
from qlora_core.report.tables import Table, tables, to_csv
from qlora_core.run_status import FINISHED
from qlora_core.study_charts import sections
from qlora_core.study_charts.behaviour import ordered
from qlora_core.study_charts.frame import hues
from qlora_core.study_grid import KINDS
from qlora_core.study_numbers import Arm, arms, losses, measured, memory_kind, spread
from qlora_core.study_results import ARM, StudyResults, StudyRun
from qlora_core.verdicts import Verdict, verdicts
from qlora_core.wording import loss, seconds, size

HERE = Path(__file__).parent
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
SIGNS = {"yes": "✓ yes", "no": "✕ no", "unclear": "? unclear"}
# Rows whose answers are written out, and those of them that are not folded.
SHOWN_ANSWERS, OPEN_ANSWERS = 20, 3
# A larger table lies beside the page only.
INLINE_BYTES = 1_500_000


def report_html(
    results: StudyResults, *, rows: bool = True, folder: Path | None = None, at: float | None = None
) -> str:
    """The whole report. `rows`: whether prompts, references and answers of held-out rows may go in; `folder`: where it will lie,
    which local data are named from; `at`: when it says that it was written."""
    parts, found = sections(results), verdicts(results)
    figures: list[dict[str, Any]] = []
    body = _head(results, parts) + _verdict(found[0], first=True)
    body += _section(
        "verdicts",
        "What else it says",
        f'<div class="grid">{"".join(map(_verdict, found[1:]))}</div>' if found[1:] else "",
    )
    body += _section("runs", "Runs", _runs(results))
    for name, some in parts.items():
        body += _section(slug(name), name, figure_cards(results, name, some, figures))
    if rows and results.analysis and results.analysis.behaviour:
        body += _section("side-by-side", "Answers side by side", _answers(results))
    body += _section("again", "Make it again", _again(results, rows=rows, folder=folder))
    # "<" would end the script that holds the figures.
    data = json.dumps(figures).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{esc(results.name)} · QLoRA Lab</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{(HERE / 'report.css').read_text(encoding='utf-8')}</style></head><body><main>{body}"
        f"<footer>Written by QLoRA Lab on {time.strftime('%d %B %Y', time.localtime(at))}. Estimates are hatched and named so; "
        f"every other number was measured.</footer></main><script>{get_plotlyjs()}</script>"
        f'<script type="application/json" id="study-figures">{data}</script>'
        f"<script>{(HERE / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{esc(title)}</h2>{content}</section>' if content else ""


def _head(results: StudyResults, parts: Mapping[str, Any]) -> str:
    done = sum(run.state == FINISHED for run in results.runs)
    ran = next((run.result["run_info"] for run in results.runs if run.result), None)
    kind = (
        KINDS[results.kind].title
        if results.kind in KINDS
        else "picked runs"
        if results.kind == "picked"
        else "grid of settings"
    )
    facts = [f"{done} of {counted(len(results.runs), 'run')} finished", f"{counted(len(results.seeds), 'seed')}"]
    if ran:
        dataset = ran.get("dataset", {})
        devices = dict.fromkeys(run.result["run_info"]["device"] for run in results.runs if run.result)
        facts = [ran["base_model"]["name"], dataset.get("file_name", ""), " and ".join(devices), *facts]
    links = "".join(f'<a href="#{slug(name)}">{esc(name)}</a>' for name in parts)
    notes = "".join(f"<li>{esc(note)}</li>" for note in results.differences)
    warning = (
        f'<div class="warning" role="note"><b>These runs are not quite comparable</b><ul>{notes}</ul></div>'
        if notes
        else ""
    )
    return (
        f'<header><p class="over">QLoRA Lab · study · {esc(kind)}</p><h1>{esc(results.name)}</h1>'
        f'<p class="meta">{esc(" · ".join(fact for fact in facts if fact))}</p>'
        f'<nav aria-label="Parts"><a href="#runs">Runs</a>{links}<a href="#again">Make it again</a></nav>{warning}</header>'
    )


def _verdict(verdict: Verdict, *, first: bool = False) -> str:
    numbers = "".join(
        f"<tr><th scope='row'>{esc(name)}</th><td>{esc(value)}</td></tr>" for name, value in flat(verdict.numbers)
    )
    more = (
        f'<details><summary>The numbers</summary><div class="scroll"><table>{numbers}</table></div></details>'
        if numbers
        else ""
    )
    return (
        f'<article class="card verdict{" first" if first else ""}"><div class="top"><h3>{esc(verdict.title)}</h3>'
        f'<span class="holds {esc(verdict.holds)}">{SIGNS.get(verdict.holds, esc(verdict.holds))}</span></div>'
        f'<p class="sentence">{esc(verdict.sentence)}</p><p class="sure"><b>Sureness</b> {esc(verdict.sureness)}. '
        f"<b>Rests on</b> {esc(verdict.rests_on)}.</p>{more}</article>"
    )


def flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested numbers, a line each."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name} · {key}" if name else str(key).replace("_", " "))
    elif isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value):
        for place, inner in enumerate(value, 1):
            yield from flat(inner, f"{name} · {place}")
    elif isinstance(value, (list, tuple)):
        yield name, ", ".join(_number(one) for one in value) or "none"
    else:
        yield name, _number(value)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


HEADS = ("evaluation loss", "peak memory", "step time", "tokens/s", "adapter")


def _runs(results: StudyResults) -> str:
    """A row for each arm with the means over its seeds, and all runs folded; the runs alone where they are the arms."""
    found = arms(results)
    colours = hues(found)
    runs = _table("seed", (_run(run, colours.get(run.label, NEUTRAL)) for run in results.runs))
    if len(found) == len(results.runs):
        return runs
    folded = f"<details><summary>All {counted(len(results.runs), 'run')}</summary>{runs}</details>"
    return _table("seeds", (_arm(arm, colours[arm.label]) for arm in found)) + folded


def _table(seeds: str, rows: Iterable[str]) -> str:
    heads = f"<th>arm</th><th>{seeds}</th><th>state</th>" + "".join(f'<th class="num">{name}</th>' for name in HEADS)
    return f'<div class="scroll"><table class="runs"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _arm(arm: Arm, colour: str) -> str:
    losses_of = spread(list(losses(arm).values()))
    half = f" ± {losses_of.high - losses_of.mean:.3f}" if losses_of and losses_of.high is not None else ""
    values = [
        arm.mean(of) for of in (lambda run: run.peak_bytes, lambda run: run.step_seconds, measured("tokens_per_second"))
    ]
    state = f"{len(arm.finished)} of {len(arm.runs)} finished"
    if len(arm.finished) < len(arm.runs):
        state = f'<span class="gap">{esc(state)}</span>'
    cells = _cells(
        losses_of and losses_of.mean, *values, arm.mean(measured("adapter_bytes")), kind=memory_kind(arm), half=half
    )
    return _row(colour, esc(arm.label), ", ".join(str(run.seed) for run in arm.runs), state, cells, "seeds")


def _run(run: StudyRun, colour: str) -> str:
    info = (run.result or {}).get("train_info", {})
    role = "" if run.role == ARM else f' <span class="hint">{esc(run.role)}</span>'
    state = esc(run.state) if run.state == FINISHED else f'<span class="gap">{esc(run.state)}: {esc(run.detail)}</span>'
    speed, adapter = info.get("tokens_per_second"), info.get("adapter_bytes")
    cells = _cells(run.eval_loss, run.peak_bytes, run.step_seconds, speed, adapter, kind=run.memory_kind)
    return _row(colour, esc(run.label or run.name) + role, str(run.seed), state, cells, "seed")


def _row(colour: str, name: str, seed: str, state: str, cells: str, seeds: str) -> str:
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    return f'<tr><th scope="row">{swatch}{name}</th><td data-label="{seeds}">{seed}</td><td>{state}</td>{cells}</tr>'


def _cells(
    eval_loss: float | None,
    peak_bytes: float | None,
    step_seconds: float | None,
    speed: float | None,
    adapter_bytes: float | None,
    *,
    kind: str | None,
    half: str = "",
) -> str:
    values = (
        loss(eval_loss) + half,
        f"{size(peak_bytes)} {kind}" if peak_bytes else "–",
        seconds(step_seconds),
        f"{speed:,.0f}" if speed else "–",
        size(adapter_bytes),
    )
    return "".join(
        f'<td class="num" data-label="{name}">{esc(value)}</td>' for name, value in zip(HEADS, values, strict=True)
    )


# -- answers, and how to make it again


def _answers(results: StudyResults) -> str:
    assert results.analysis is not None and results.analysis.behaviour is not None
    behaviour = results.analysis.behaviour
    order = ordered(behaviour, arms(results))
    order |= {source: {} for row in behaviour["rows"] for source in row["answers"] if source not in order}
    labels = {source: one.get("label") or source for source, one in order.items()}
    cards = []
    for row in behaviour["rows"][:SHOWN_ANSWERS]:
        answers = {labels[source]: row["answers"][source] for source in order if source in row["answers"]}
        texts = {"reference": row["reference"]} | answers
        each = "".join(f"<div><h4>{esc(name)}</h4><pre>{esc(text) or '–'}</pre></div>" for name, text in texts.items())
        head = f'<h3>line {esc(row["line"])}</h3><pre class="prompt">{esc(row["prompt"])}</pre>'
        cards.append(f'<article class="card">{head}<div class="each">{each}</div></article>')
    more = len(behaviour["rows"]) - SHOWN_ANSWERS
    note = f'<p class="hint">{more} more in answers.csv.</p>' if more > 0 else ""
    if not cards:
        return ""
    first, rest = cards[:OPEN_ANSWERS], cards[OPEN_ANSWERS:]
    folded = f'<summary>{counted(len(rest), "more row")}</summary><div class="answers">{"".join(rest)}</div>'
    folded = f"<details>{folded}</details>" if rest else ""
    return f'<div class="answers">{"".join(first)}</div>{folded}{note}'


def _again(results: StudyResults, *, rows: bool, folder: Path | None) -> str:
    settings = study_yaml(results, folder=folder)
    if settings and reproducible(results):
        how = (
            f'<p>With {YAML}, which lies beside this page and stands below:</p><pre class="code">{esc(command(results))}</pre>'
            f'<details><summary>{YAML}</summary><pre class="code">{esc(settings)}</pre></details>'
        )
    elif settings:
        how = f'<p>Runs picked by hand; each has its settings in configs/:</p><pre class="code">{esc(command(results))}</pre>'
    else:
        how = "<p>Every run was deleted, and its settings with it.</p>"
    links = "".join(_download(name, table) for name, table in tables(results, rows=rows).items())
    files = f'<h3>Tables</h3><ul class="files">{links}</ul>' if links else ""
    return f'<div class="card">{how}{_fingerprints(results)}{files}</div>'


def _download(name: str, table: Table) -> str:
    text = to_csv(table).encode(errors="backslashreplace")
    if len(text) > INLINE_BYTES:
        return f"<li class='hint'>{name}.csv ({size(len(text))}) lies beside this page</li>"
    return f'<li><a download="{name}.csv" href="data:text/csv;base64,{base64.b64encode(text).decode()}">{name}.csv</a></li>'


def _fingerprints(results: StudyResults) -> str:
    """Base, rows and environment, each distinct one once."""
    lines: dict[tuple[str, str], None] = {}
    for run in results.runs:
        if run.result is None:
            continue
        base, rows = run.result["run_info"]["base_model"], run.result["run_info"].get("dataset", {})
        name = base["name"] + (f" @ {base['revision']}" if base.get("revision") else "")
        lines[("base model", f"{name}, {base.get('origin') or ''}".rstrip(", "))] = None
        lines[("base weights, SHA-256", base.get("weights_sha256") or "–")] = None
        source = (rows.get("origin") or {}).get("source") or rows.get("file_name", "–")
        lines[
            ("data", f"{source}: {rows.get('train_rows', '–')} rows trained on, {rows.get('eval_rows', '–')} held out")
        ] = None
        for kind in ("train", "eval"):
            lines[
                (
                    f"{'training' if kind == 'train' else 'evaluation'} rows, SHA-256",
                    rows.get(f"{kind}_fingerprint", "–"),
                )
            ] = None
    every = environments(results)
    for one, of in every:
        alike = "" if len(every) == 1 else f" ({counted(len(of), 'run')})"
        packages = ", ".join(f"{name} {version}" for name, version in (one.get("packages") or {}).items())
        lines[(f"device{alike}", f"{one.get('device')}, {one.get('compute_dtype')}")] = None
        lines[(f"versions{alike}", f"Python {one.get('python')}, {packages}")] = None
        if one.get("git_commit"):
            lines[(f"code{alike}", one["git_commit"])] = None
    rows_html = "".join(f"<tr><th scope='row'>{esc(name)}</th><td>{esc(value)}</td></tr>" for name, value in lines)
    return f'<div class="scroll"><table>{rows_html}</table></div>' if rows_html else ""
