"""`inspect` and `prepare` of the command line, for a person and as jobs of the page. Prints; decides nothing."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from tqdm import tqdm

from qlora_core import jobs
from qlora_core.cli_options import add_options, given_options, print_json
from qlora_core.data.detection import columns_text
from qlora_core.data.formats import detection_of
from qlora_core.data.hub_source import PREFIX, HubDataset, fetch
from qlora_core.data.inspected import inspect_into, near_duplicates
from qlora_core.data.inspection import DatasetReport, inspect
from qlora_core.data.locate import LINEAGE
from qlora_core.data.preparation import Preparation
from qlora_core.data.preparing import prepare
from qlora_core.data.rows import Problem
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser("inspect", parents=[common], help="check datasets; lists every bad row")
    command.add_argument("data", nargs="+", help="a file, or hub:OWNER/NAME[:CONFIG[:SPLIT]][@REVISION]")
    command.add_argument("--columns", default="", help="which columns are read: prompt=question, response=answer")
    command.add_argument("--eval-data", type=Path, help="file whose rows are looked for in the data")
    command.add_argument(
        "--near-duplicates", type=float, metavar="SIMILARITY", help="list rows that are alike, such as 0.8"
    )
    command.add_argument("--limit", type=int, help="most rows to fetch from the Hub")
    command.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)  # jobs of the page
    command.add_argument("--token-from-stdin", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(command=_inspect)

    command = commands.add_parser(
        "prepare", parents=[common], help="clean, mask, balance and split datasets into a folder"
    )
    command.add_argument("data", nargs="+", help="files, or hub:OWNER/NAME[:CONFIG[:SPLIT]][@REVISION]")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the prepared dataset")
    command.add_argument("--token-from-stdin", action="store_true", help=argparse.SUPPRESS)
    add_options(command, Preparation)
    command.set_defaults(command=_prepare)


def _token(options: argparse.Namespace) -> str | None:
    """Of a page's job through its pipe; else that of `hf auth login` or HF_TOKEN."""
    return sys.stdin.read().strip() or None if options.token_from_stdin else get_token()


class _Bar:
    """Progress on a terminal, one bar for each thing that is done; nothing where standard error is a file."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._doing = ""

    def __call__(self, progress: jobs.Progress) -> None:
        if self._bar is None or self._doing != progress.doing:
            self.close()
            self._doing = progress.doing
            scale = progress.unit == "bytes"
            self._bar = tqdm(
                total=progress.total or None, desc=progress.doing, unit=progress.unit, unit_scale=scale, disable=None,
                leave=False, file=sys.stderr,
            )  # fmt: skip
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _inspect(options: argparse.Namespace, settings: Settings) -> int:
    bar = _Bar()
    reporter, token = jobs.Reporter(bar), _token(options)
    reports, paths, problems = [], [], []
    for named in options.data:
        try:
            path = _fetched(named, options, settings, token, reporter)
            reports.append(_inspected(path, options, settings, reporter))
            paths.append(str(path))
        except DatasetError as error:
            problems += error.problems
    bar.close()
    if problems and not (reports and options.json):
        raise DatasetError(*problems)
    reporter.end(jobs.DONE, result={"paths": paths})
    if options.json and not options.keep:
        print_json(reports[0] if len(options.data) == 1 else {"files": reports, "problems": problems})
    return 0


def _fetched(
    named: str, options: argparse.Namespace, settings: Settings, token: str | None, report: jobs.Reporter
) -> Path:
    if not named.startswith(PREFIX):
        path = Path(os.path.expanduser(named))
        return path / "train.jsonl" if (path / LINEAGE).is_file() else path
    found = fetch(
        HubDataset.parse(named),
        settings.home / "hub-datasets",
        token=token,
        limit=options.limit or settings.max_rows,
        max_bytes=settings.max_dataset_bytes,
        progress=lambda rows: report(f"fetching {named}", rows, 0, "rows"),
    )
    if not options.json:
        cut = f", the first {found.rows:,} rows" if found.truncated else ""
        print(f"{found.source}{cut}; licence: {found.license or 'unknown'}")
    return found.path


def _inspected(path: Path, options: argparse.Namespace, settings: Settings, report: jobs.Reporter) -> dict[str, Any]:
    def watch(done: int, total: int) -> None:
        report(f"reading {path.name}", done, total, "bytes")

    # Of rows that are all in no known form there is one thing to say.
    listed = not options.json and (options.columns or detection_of(path, settings.limits).form is not None)

    def show(problem: Problem) -> None:
        if listed:
            print(f"  {problem}")

    common = {"columns": options.columns, "eval_path": options.eval_data, "watch": watch}
    if options.keep or options.near_duplicates is not None:
        kept = inspect_into(path, settings, **common)
        found, folder = kept.report, {"folder": str(kept.folder)}
    else:
        kept, folder = None, {}
        found = inspect(path, limits=settings.limits, on_problem=show, **common)
    near = None
    if kept is not None and options.near_duplicates is not None:
        near = near_duplicates(
            kept, options.near_duplicates, lambda done, total: report("comparing rows", done, total, "rows")
        )
    if not options.json:
        _print(found, near)
    return found.to_json() | folder | ({"near_duplicates": near} if near else {})


def _print(report: DatasetReport, near: dict[str, Any] | None) -> None:
    for line, first in report.duplicates[:1000]:
        print(f"  {report.unit} {line}: the same as {report.unit} {first}")
    if report.duplicate_rows > 1000:
        print(f"  … and {report.duplicate_rows - 1000:,} more duplicates")
    for pair in (near or {"pairs": []})["pairs"]:
        print(f"  {report.unit} {pair['line']}: about {pair['similarity']:.0%} like {report.unit} {pair['first_line']}")
    print(report.summary())
    print(f"  {report.kind}; {report.detection.reason}")
    if report.detection.proposal:
        print(f"  likely: --columns {shlex.quote(columns_text(report.detection.proposal))}")
    for what, counts in (("rows with letters of", report.scripts), ("empty", report.empty_fields)):
        if counts:
            print(f"  {what} {', '.join(f'{name}: {count:,}' for name, count in list(counts.items())[:8])}")
    if report.eval_rows_also_here is not None:
        print(f"  {report.eval_rows_also_here:,} rows of the evaluation file are here too")
    if near:
        print(f"  {near['count']:,} near duplicates at {near['threshold']:g} ({near['seconds']:.1f} s)")


def _prepare(options: argparse.Namespace, settings: Settings) -> int:
    bar = _Bar()
    reporter, token = jobs.Reporter(bar), _token(options)
    begun = time.monotonic()
    preparation = Preparation.from_mapping(given_options(options, Preparation), where="the options")
    out = Path(os.path.expanduser(str(options.out))).resolve()
    made = prepare(options.data, out, preparation, settings, token=token, report=reporter)
    result: dict[str, Any] = {"folder": str(made.folder), "lineage": made.lineage}
    bar.close()
    reporter.end(jobs.DONE, result=result)
    if options.json:
        print_json(result | {"seconds": round(time.monotonic() - begun, 2)})
        return 0
    rows = made.lineage["rows"]
    print(
        f"{made.folder}: version {made.lineage['version']}, {rows['train']:,} rows to train on, {rows['eval']:,} to evaluate on"
    )
    for step, counts in made.lineage["steps"].items():
        print(f"  {step}: {', '.join(f'{what} {value}' for what, value in counts.items()) or 'nothing'}")
    return 0
