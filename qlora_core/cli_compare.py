"""`compare` and `studies` of the command line: a study made, followed to its end, told in a table and in verdicts."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from tqdm import tqdm

from qlora_core import queue
from qlora_core.cli_estimate import facts_for
from qlora_core.cli_options import add_options, print_json, run_config
from qlora_core.config import TrainConfig
from qlora_core.data.locate import locate
from qlora_core.errors import ConfigError, RunError
from qlora_core.planner.studying import fit_sentence
from qlora_core.run_status import ACTIVE, CRASHED, FAILED
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.studies import GRID, Study, StudyStore, measured_paces
from qlora_core.study_grid import KINDS, grid_problems, sentence
from qlora_core.study_numbers import Arm, arms, losses
from qlora_core.study_plan import LORA_VS_QLORA, StudyPlan, Wanted, plan, values_of
from qlora_core.study_results import StudyResults
from qlora_core.study_status import StudyStatus
from qlora_core.verdicts import verdicts
from qlora_core.wording import duration, loss, seconds, size

POLL_SECONDS = 0.5


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "compare", parents=[common], help="a study: runs that differ in what is varied alone, compared and judged"
    )
    command.add_argument("--config", type=Path, help="YAML of settings; options win over it")
    kinds = "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())
    command.add_argument(
        "--kind", choices=KINDS, metavar="KIND", help=f"what is compared, where --vary is not enough. {kinds}"
    )
    command.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="again for each setting; q_proj+k_proj is one value",
    )
    command.add_argument(
        "--seeds", default="", metavar="SEED,SEED", help="each arm once for each; default: the seed of the settings"
    )
    command.add_argument(
        "--noise-floor",
        action=argparse.BooleanOptionalAction,
        help="LoRA against itself: another seed, another row order",
    )
    command.add_argument(
        "--skip-unfitting", action="store_true", help="train what fits the memory and leave a gap for the rest"
    )
    command.add_argument("--estimate", action="store_true", help="print runs, memory and time, and start nothing")
    command.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.html, tables and the bundle here at the end"
    )
    _add_without_rows(command)
    command.add_argument("--detach", action="store_true", help="queue the study and return at once")
    add_options(command, TrainConfig)
    command.set_defaults(command=_compare)
    _add_studies(commands.add_parser("studies", help="list, show, stop, resume, delete, report studies"), common)


def _add_studies(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", parents=[common], help="all studies, newest first").set_defaults(command=_list)
    for name, function, help_text in (
        ("show", _show, "state, figures and verdicts of a study"),
        ("stop", _stop, "save and stop all of its runs"),
        ("resume", _resume, "go on with what has not finished, analyse again, and follow"),
        ("delete", _delete, "forget a study; its runs stay"),
        ("report", _report, "write report.html, tables and a bundle that reproduces it"),
        ("pick", _pick, "a study of runs that have finished already"),
    ):
        command = actions.add_parser(name, parents=[common], help=help_text)
        if name == "pick":
            command.add_argument("runs", nargs="+", metavar="RUN", help="id of a run, or its beginning")
        else:
            command.add_argument("study", help="id of the study, or its beginning")
        if name == "delete":
            command.add_argument("--with-runs", action="store_true", help="delete its runs and their adapters too")
        if name == "report":
            command.add_argument("--out", type=Path, required=True, metavar="DIR")
            _add_without_rows(command)
        command.set_defaults(command=function, detach=False, report=None)
        if name in ("resume", "pick"):
            command.set_defaults(without_rows=False)


def _add_without_rows(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--without-rows",
        action="store_true",
        help="no row and no answer in the report, where a licence forbids to pass them on",
    )


def _compare(options: argparse.Namespace, settings: Settings) -> int:
    config, wanted = run_config(options), _wanted(options)
    locate(config, settings, token=get_token())  # a mistyped file, before the model is asked for
    found = plan(wanted, config, facts_for(config, None, settings), measured_paces(settings))
    for note in found.notes:
        print(note, file=sys.stderr)
    if options.estimate:
        return _print_estimate(found, as_json=options.json)
    found.check_fits(skip=options.skip_unfitting, way_out="them: --skip-unfitting")
    study = found.create(settings, token=get_token())
    print(f"{sentence(found.cells)}; {fit_sentence(found.estimate)}", file=sys.stderr)
    return _start_and_follow(study, options, settings)


def _wanted(options: argparse.Namespace) -> Wanted:
    """Raises ConfigError with all that is wrong."""
    kind = options.kind or (GRID if options.vary or options.seeds else LORA_VS_QLORA)
    vary, seeds = dict(KINDS[kind].vary) if kind in KINDS else {}, _seeds(options.seeds)
    vary |= _varied(options.vary)
    if problems := grid_problems(vary, seeds):
        raise ConfigError(*problems)
    return Wanted(kind, vary, seeds, options.noise_floor)


def _varied(given: list[str]) -> dict[str, list[Any]]:
    """ "rank=4,8" -> {"rank": [4, 8]}. Raises ConfigError with all that is wrong."""
    found, problems = {}, []
    for text in given:
        field, equals, values = text.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or not values.strip():
            problems.append(f"--vary is {text!r}; write a setting and its values: rank=4,8,16")
            continue
        try:
            found[field] = values_of(field, values)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return found


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; write whole numbers with commas between them: 42,43,44") from None


def _print_estimate(plan: StudyPlan, *, as_json: bool) -> int:
    found = plan.estimate
    if as_json:
        print_json({
            "runs": [
                {"label": cell.cell.label, "seed": cell.cell.seed, "fits": cell.fits,
                 "needed_bytes": cell.plan.estimate.needed_bytes if cell.plan else None}
                for cell in found.cells
            ],
            "usable_bytes": found.usable_bytes,
            "seconds": found.seconds,
        })  # fmt: skip
        return 0
    print(sentence(plan.cells))
    for cell in found.cells:
        needed = size(cell.plan.estimate.needed_bytes) if cell.plan else "unknown"
        print(
            f"  {f'{cell.cell.label}, seed {cell.cell.seed}':<60}{needed:>11}{'' if cell.fits else '   does not fit'}"
        )
    time_told = duration(found.seconds) if found.seconds else "unknown until a run of each method was measured here"
    fits = fit_sentence(found)
    print(f"{fits[0].upper()}{fits[1:]}.\nTime, estimated without the analysis: {time_told}.")
    return 0


# -- following


def _start_and_follow(study: Study, options: argparse.Namespace, settings: Settings) -> int:
    study.start()
    if options.detach:
        print_json(study.status().to_json()) if options.json else print(study.study_id)
        return 0
    with _stopping_on_interrupt(study):
        _watch(study, settings)
    return _tell(study, as_json=options.json, report=options.report, rows=not options.without_rows)


@contextlib.contextmanager
def _stopping_on_interrupt(study: Study) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(RunError):
            print(f"\n{study.study_id}: {study.stop()}; Ctrl-C again leaves them to themselves", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            while study.status().state in ACTIVE:
                time.sleep(POLL_SECONDS)


def _watch(study: Study, settings: Settings) -> None:
    """A bar of all steps on standard error, and a line when a run changes its state, until nothing waits or trains."""
    states: dict[str, str] = {}
    bar = tqdm(total=None, unit="step", dynamic_ncols=True, file=sys.stderr)
    while True:
        status = study.status()
        for label, run in (*status.runs, ("analysis", status.analysis)):
            if run and states.get(label) != run.state:
                states[label] = run.state
                result = f", evaluation loss {loss(run.eval_loss)}" if run.state not in ACTIVE and run.eval_loss else ""
                tqdm.write(f"{label}: {run.state}{result}", file=sys.stderr)
        known = [run for _, run in status.runs if run]
        longest = max((run.total_steps or 0 for run in known), default=0)
        bar.total = longest * len(status.runs) or None
        if made := sum(run.step for run in known) - bar.n:  # in a log file each update is a line
            bar.update(made)
        if status.state not in ACTIVE:
            bar.close()
            return
        queue.start_next(settings)
        time.sleep(POLL_SECONDS)


def _tell(study: Study, *, as_json: bool, report: Path | None, rows: bool = True) -> int:
    """The table, the verdicts, and where the report lies; exit status 2 where a run did not come to its end."""
    status, results = study.status(), study.results()
    found = verdicts(results)
    written = _written(results, report, rows=rows) if report else None
    if as_json:
        print_json({
            "study": status.to_json(),
            "arms": [_row(arm) for arm in arms(results)],
            "verdicts": [verdict.to_json() for verdict in found],
            "report": str(written) if written else None,
        })  # fmt: skip
    else:
        print(_table(results))
        for verdict in found:
            print(f"\n{verdict.title}\n  {verdict.sentence}\n  Sureness: {verdict.sureness}.")
        print(f"\n{study.study_id}: {status.detail}" + (f"\nreport: {written}" if written else ""))
    return _exit_status(status)


def _written(results: StudyResults, folder: Path, *, rows: bool) -> Path:
    from qlora_core.report import write_report  # plotly, which only a report needs, is slow to import

    return write_report(results, folder, rows=rows)


def _exit_status(status: StudyStatus) -> int:
    if status.state not in (FAILED, CRASHED):
        return 0
    ended = [(label, run) for label, run in (*status.runs, ("analysis", status.analysis)) if run]
    for label, run in ended:
        if run.state in (FAILED, CRASHED):
            print(f"{label}: {run.state}: {run.detail}", file=sys.stderr)
    return 1 if status.state == CRASHED else 2


def _row(arm: Arm) -> dict[str, Any]:
    by_seed = losses(arm)
    return {
        "label": arm.label,
        "varied": arm.varied,
        "gap": arm.gap,
        "eval_loss": arm.mean(lambda run: run.eval_loss),
        "eval_losses": {str(seed): value for seed, value in by_seed.items()},
        "peak_bytes": arm.mean(lambda run: run.peak_bytes),
        "memory_kind": next((run.memory_kind for run in arm.finished), None),
        "step_seconds": arm.mean(lambda run: run.step_seconds),
    }


def _table(results: StudyResults) -> str:
    lines = [f"{'':<36}{'evaluation loss':>16}{'peak memory':>18}{'step time':>12}"]
    for arm in arms(results):
        row = _row(arm)
        if row["gap"]:
            lines.append(f"{arm.label:<36}{row['gap']:>16}")
            continue
        memory = f"{size(row['peak_bytes'])} {row['memory_kind']}"
        lines.append(f"{arm.label:<36}{loss(row['eval_loss']):>16}{memory:>18}{seconds(row['step_seconds']):>12}")
    return "\n".join(lines)


# -- studies


def _list(options: argparse.Namespace, settings: Settings) -> int:
    found = []
    for study in StudyStore(settings).list():
        try:
            found.append(study.status())
        except RunError as error:
            print(error, file=sys.stderr)
    if options.json:
        print_json({"studies": [status.to_json() for status in found]})
        return 0
    for status in found:
        print(f"{status.study_id:<60} {status.state:<9} {status.detail}")
    if not found:
        print("no studies yet; python -m qlora_core compare --data FILE")
    return 0


def _show(options: argparse.Namespace, settings: Settings) -> int:
    _tell(StudyStore(settings).get(options.study), as_json=options.json, report=None)
    return 0


def _stop(options: argparse.Namespace, settings: Settings) -> int:
    study = StudyStore(settings).get(options.study)
    told = study.stop()
    print_json({"study_id": study.study_id, "detail": told}) if options.json else print(f"{study.study_id}: {told}")
    return 0


def _resume(options: argparse.Namespace, settings: Settings) -> int:
    return _start_and_follow(StudyStore(settings).get(options.study), options, settings)


def _delete(options: argparse.Namespace, settings: Settings) -> int:
    study = StudyStore(settings).get(options.study)
    StudyStore(settings).delete(study, with_runs=options.with_runs)
    print_json({"deleted": study.study_id}) if options.json else print(f"{study.study_id}: deleted")
    return 0


def _report(options: argparse.Namespace, settings: Settings) -> int:
    written = _written(StudyStore(settings).get(options.study).results(), options.out, rows=not options.without_rows)
    print_json({"report": str(written)}) if options.json else print(written)
    return 0


def _pick(options: argparse.Namespace, settings: Settings) -> int:
    study = StudyStore(settings).of_runs(RunStore(settings).get_all(options.runs))
    return _start_and_follow(study, options, settings)
