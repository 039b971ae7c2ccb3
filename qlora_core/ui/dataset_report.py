"""A dataset's report as the words and tables of the page. Every text from a file is escaped here."""

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qlora_core.data.hub_source import origin_of
from qlora_core.data.inspected import DUPLICATES, PROBLEMS, Inspected
from qlora_core.data.inspection import DatasetReport
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.data.rows import counted
from qlora_core.settings import Settings
from qlora_core.ui.chosen import Chosen
from qlora_core.ui.words import esc, facts, size

LISTED = 200


def report_html(report: DatasetReport, chosen: Chosen) -> str:
    if chosen.is_prepared:
        return prepared_html(PreparedSet.load(Path(chosen.path)), report)
    held_out = (
        f"Evaluated on {Path(chosen.eval_path).name}."
        if chosen.eval_path
        else "A tenth of the rows is held out for evaluation; the share is in the Train form."
    )
    return (
        f'<div class="lab-card"><h3>{esc(report.file_name)}</h3><p class="lab-hint">{esc(" · ".join(_notes(report)))}</p>'
        f'{facts(report_facts(report))}<p class="lab-hint" style="margin-top:10px">{esc(_read_as(report))}</p>'
        f'{_origin_html(chosen)}<p class="lab-hint">{esc(held_out)}</p></div>'
    )


def _origin_html(chosen: Chosen) -> str:
    """Where the rows of a Hub dataset come from, and what of it they are not."""
    origin = origin_of(chosen.file)
    if not origin:
        return ""
    told = f"From {origin['source']}; licence: {origin['license'] or 'unknown'}."
    if origin["truncated"]:
        told += f" Only the first {origin['rows']:,} rows were fetched."
    if origin["left_out_columns"]:
        told += f" Columns that hold no text were left out: {', '.join(origin['left_out_columns'])}."
    return f'<p class="lab-hint" style="overflow-wrap:anywhere">{esc(told)}</p>'


def prepared_html(made: PreparedSet, report: DatasetReport) -> str:
    lineage = made.lineage
    rows, since = lineage["rows"], lineage["since_last_version"]
    pairs = [
        ("rows to train on", f"{rows['train']:,}"),
        ("to evaluate on", f"{rows['eval']:,}" if rows["eval"] else "held out by the run"),
        ("problems", f"{report.bad_rows:,}"),
        ("licence", lineage["license"] or "unknown"),
    ]
    notes = [f"prepared, version {lineage['version']}", lineage["form"], f"fingerprint {lineage['fingerprint'][:12]}"]
    if since:
        notes.append(
            f"since version {since['version']}: {since['rows_added']:,} added, {since['rows_removed']:,} removed"
        )
    sources = "".join(
        f"<li><b>{esc(source['name'])}</b>: {counted(source['rows'], 'row')}, {esc(source['form'])} ({esc(source['read_as'])})"
        + (f", {counted(source['left_out'], 'row')} left out" if source["left_out"] else "")
        + "</li>"
        for source in lineage["sources"]
    )
    return (
        f'<div class="lab-card"><h3>{esc(lineage["name"])}</h3><p class="lab-hint">{esc(" · ".join(notes))}</p>'
        f'{facts(pairs)}<ul class="lab-hint lab-sources">{sources}</ul></div>'
    )


def report_facts(report: DatasetReport) -> list[tuple[str, str]]:
    """Named figures of a report."""
    pairs = [
        ("usable rows", f"{report.rows:,}"),
        ("form", report.form or "unknown"),
        ("problems", f"{report.bad_rows:,}"),
        ("duplicates", f"{report.duplicate_rows:,}"),
    ]
    if report.turns > report.rows:
        pairs.append(("responses", f"{report.turns:,}"))
    return pairs


def _notes(report: DatasetReport) -> list[str]:
    notes = [report.kind, size(report.size_bytes), f"read in {report.seconds:.1f} s"]
    if report.blank_lines:
        notes.append(counted(report.blank_lines, "blank line"))
    if report.byte_order_mark:
        notes.append("byte-order mark skipped")
    return notes


def _read_as(report: DatasetReport) -> str:
    """Why the rows are read as they are, and what of them is not."""
    parts = [report.detection.reason]
    if report.scripts:
        shares = [f"{name} {_share(count / max(1, report.rows))}" for name, count in list(report.scripts.items())[:4]]
        parts.append("rows with letters of " + ", ".join(shares))
    if report.empty_fields:
        parts.append(
            "empty: " + ", ".join(f"{name} {count:,}" for name, count in list(report.empty_fields.items())[:4])
        )
    if report.ignored_columns:
        named = ", ".join(f"{name} ({count:,})" for name, count in list(report.ignored_columns.items())[:8])
        parts.append(f"columns that are not used: {named}")
    if report.duplicates:
        listed = ", ".join(f"{line} = {first}" for line, first in report.duplicates[:8])
        more = " …" if report.duplicate_rows > 8 else ""
        parts.append(f"duplicates are trained on: {report.unit}s {listed}{more}")
    return ". ".join(part[:1].upper() + part[1:] for part in parts) + "."


def _share(value: float) -> str:
    return "< 1 %" if value < 0.01 else f"{value:.0%}"


def problems_html(report: DatasetReport, kept: Inspected, settings: Settings) -> str:
    """Line and reason of the first problems, and links to the lists of all; empty without any."""
    links = [download_link(kept.folder / DUPLICATES, settings, "duplicates.csv")] if report.duplicate_rows else []
    if not report.bad_rows:
        return f'<p class="lab-links">{"".join(links)}</p>' if links else ""
    if report.detection.form is None:
        told = f"{report.detection.reason}. Say which column is what, under Columns below."
        return f'<div class="lab-problems"><b>The rows are in no form that is known.</b> {esc(told[:1].upper() + told[1:])}</div>'
    links.insert(0, download_link(kept.folder / PROBLEMS, settings, "problems.csv"))
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in report.problem_counts.items())
    rows = "".join(
        f'<tr><td class="num">{problem.line:,}</td><td>{esc(problem.kind)}</td><td>{esc(problem.message)}</td></tr>'
        for problem in report.problems[:LISTED]
    )
    more = f'<p class="lab-hint">The first {LISTED} are listed.</p>' if report.bad_rows > LISTED else ""
    remedy = "Mend them, or leave them out." if report.rows else "No row is left to train on."
    return (
        f'<div class="lab-problems"><b>{counted(report.bad_rows, "row")} cannot be trained on.</b> {remedy} '
        f'{esc(kinds)}.</div><div class="lab-scroll" style="margin-top:8px"><table class="lab-table"><thead><tr>'
        f'<th class="num">{report.unit}</th><th>kind</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table></div>{more}'
        f'<p class="lab-links">{"".join(links)}</p>'
    )


def near_html(kept: Inspected, similarity: float, settings: Settings) -> str:
    """What a search for near duplicates found, and how long it took; the first pairs with what they say."""
    path = kept.folder / f"near_duplicates-{similarity:g}.json"
    found = json.loads(path.read_text())
    told = f"{counted(found['count'], 'near duplicate')} at {similarity:g} among {len(kept):,} rows, in {found['seconds']:.1f} s."
    if found["not_fully_compared"]:
        told += (
            f" {counted(found['not_fully_compared'], 'row')} of a crowded template were not compared with every other."
        )
    if not found["count"]:
        return f'<p class="lab-hint" role="status">{esc(told)}</p>'
    rows = "".join(
        f'<tr><td class="num">{pair["line"]:,}</td><td class="num">{pair["first_line"]:,}</td>'
        f'<td class="num">{pair["similarity"]:.0%}</td></tr>'
        for pair in found["pairs"][:LISTED]
    )
    more = f"The first {LISTED} are listed. " if found["count"] > LISTED else ""
    link = download_link(path.with_suffix(".csv"), settings, "near_duplicates.csv")
    unit = kept.report.unit
    return (
        f'<p class="lab-hint" role="status">{esc(told)} {more}Prepare it with “Near duplicates” set, and they are left out.</p>'
        f'<div class="lab-scroll" style="margin-top:8px"><table class="lab-table"><thead><tr><th class="num">{unit}</th>'
        f'<th class="num">is like {unit}</th><th class="num">similarity, estimated</th></tr></thead><tbody>{rows}</tbody></table>'
        f'</div><p class="lab-links">{link}</p>'
    )


def download_link(path: Path, settings: Settings, name: str) -> str:
    """A link to a copy below `downloads`, the one folder that the app gives files from."""
    copy = settings.downloads / f"{path.parent.name}-{path.name}"
    if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return f'<a class="lab-link" download="{esc(name)}" href="gradio_api/file={esc(quote(str(copy)))}">{esc(name)}</a>'


def steps_html(made: PreparedSet) -> str:
    """What each step of a preparation did."""
    rows = "".join(
        f"<tr><td>{esc(step)}</td><td>{esc(_counts(counts))}</td></tr>"
        for step, counts in made.lineage["steps"].items()
    )
    return (
        '<div class="lab-scroll" style="margin-top:8px; max-height:none"><table class="lab-table">'
        "<thead><tr><th>step</th><th>what it did</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _counts(counts: dict[str, Any]) -> str:
    words = []
    for what, value in counts.items():
        if isinstance(value, bool):
            words.append(what if value else f"not {what}")
        else:
            words.append(f"{what} {value:,}" if isinstance(value, (int, float)) else f"{what} {value}")
    return ", ".join(words) or "nothing to do"
