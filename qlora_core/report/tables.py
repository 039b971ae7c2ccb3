"""StudyResults -> tables that a spreadsheet reads: runs, steps, evaluations, adapters, rounding errors, answers. Draws nothing."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_core.study_results import StudyResults, StudyRun

Table = tuple[list[str], list[list[Any]]]
# All that there may be, in the order of reading; only the last holds prompts and answers of held-out rows.
ANSWERS = "answers"
TABLES = (
    "runs", "steps", "evaluations", "memory_estimates", "similarity", "updates", "quantisation", "models", "behaviour", ANSWERS,
)  # fmt: skip
# A spreadsheet takes a text that begins so for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
MEASURED = (
    "peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes", "load_peak_allocated_bytes", "load_peak_host_bytes",
    "step_seconds_median", "tokens_per_second", "adapter_bytes", "trainable_parameters", "train_loss", "steps", "total_steps",
)  # fmt: skip
OF_A_STEP = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens", "supervised_tokens",
    "peak_allocated_bytes", "peak_reserved_bytes", "peak_host_bytes",
)  # fmt: skip
SIMILAR = ("cosine", "l2", "relative")


def tables(results: StudyResults, *, rows: bool = True) -> dict[str, Table]:
    """name -> (columns, rows), of those that hold something. `rows`: whether prompts and answers of held-out rows may go in.

    Bytes, seconds, nats a token; an empty cell was not measured.
    """
    found = {
        "runs": _runs(results),
        "steps": _events(results, OF_A_STEP, "steps"),
        "evaluations": _events(results, ("step", "loss", "tokens", "seconds"), "evaluations"),
        "memory_estimates": _estimates(results),
    }
    if analysis := results.analysis:
        found |= {
            "similarity": _similarity(analysis.similarity),
            "updates": _updates(analysis.updates),
            "quantisation": _plain(
                ("layer", "module", "type", "relative_error", "max_error", "parameters"), analysis.quantisation
            ),
        }
        if behaviour := analysis.behaviour:
            found |= {"models": _models(behaviour), "behaviour": _pairs(behaviour)}
            found |= {"answers": _answers(behaviour)} if rows else {}
    return {name: table for name, table in found.items() if table[1]}


def to_csv(table: Table) -> str:
    """RFC 4180; a text that a spreadsheet would run as a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_safe(name) for name in table[0]])
    writer.writerows([_safe(value) for value in row] for row in table[1])
    return text.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else "" if value is None else value


def _plain(columns: Sequence[str], entries: Iterable[dict[str, Any]]) -> Table:
    return list(columns), [[entry.get(name) for name in columns] for entry in entries]


def _runs(results: StudyResults) -> Table:
    varied = list(results.vary)
    columns = ["run_id", "label", "role", "seed", "state", "detail", *varied, "device", "memory_kind", "peak_bytes"]
    columns += ["estimated_peak_bytes", "eval_loss_before", "eval_loss", *MEASURED, "score_correct", "score_total"]
    return columns, [_run(run, varied) for run in results.runs]


def _run(run: StudyRun, varied: Sequence[str]) -> list[Any]:
    info = (run.result or {}).get("train_info", {})
    score = (info.get("scores") or [{}])[-1]
    before = next((one.loss for one in run.evaluations if one.step == 0), None)
    return [
        run.run_id, run.label, run.role, run.seed, run.state, run.detail, *(_joined(run.varied.get(name)) for name in varied),
        (run.result or {}).get("run_info", {}).get("device"), run.memory_kind, run.peak_bytes,
        run.started.estimated_peak_bytes if run.started else None, before, run.eval_loss,
        *(info.get(name) for name in MEASURED), score.get("correct"), score.get("total"),
    ]  # fmt: skip


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else value


def _events(results: StudyResults, fields: Sequence[str], of: str) -> Table:
    rows = [
        [run.run_id, run.label, run.role, run.seed, *(getattr(event, name) for name in fields)]
        for run in results.runs
        for event in getattr(run, of)
    ]
    return ["run_id", "label", "role", "seed", *fields], rows


def _estimates(results: StudyResults) -> Table:
    rows = [
        [run.run_id, run.label, part, size]
        for run in results.runs
        if run.started
        for part, size in run.started.estimated_parts.items()
    ]
    return ["run_id", "label", "part", "bytes"], rows


def _similarity(found: Iterable[dict[str, Any]]) -> Table:
    rows = [
        [one["kind"], one["label"], one["first"], one["second"], part["layer"], part["module"], *(part[name] for name in SIMILAR)]
        for one in found
        for part in ({"layer": None, "module": "all"} | one["overall"], *one["modules"])
    ]  # fmt: skip
    return ["kind", "label", "first", "second", "layer", "module", *SIMILAR], rows


def _updates(found: dict[str, list[dict[str, Any]]]) -> Table:
    def cells(one: dict[str, Any]) -> list[Any]:
        values = " ".join(f"{value:.6g}" for value in one["singular_values"])
        return [one["layer"], one["module"], one["norm"], one["effective_rank"], values]

    rows = [[run_id, *cells(one)] for run_id, entries in found.items() for one in entries]
    return ["run_id", "layer", "module", "norm", "effective_rank", "singular_values"], rows


def _models(behaviour: dict[str, Any]) -> Table:
    rows = []
    for source, one in behaviour["sources"].items():
        score = one.get("score") or {}
        rows.append(
            [source, one.get("label"), one.get("loss"), one.get("perplexity"), score.get("correct"), score.get("total")]
        )
    return ["model", "label", "eval_loss", "perplexity", "score_correct", "score_total"], rows


def _pairs(behaviour: dict[str, Any]) -> Table:
    names = ("token_match", "embedding_cosine")
    columns = [f"{name}{end}" for name in names for end in ("", "_95_low", "_95_high")]

    def cells(pair: dict[str, Any]) -> list[Any]:
        return [cell for name in names for cell in (pair.get(name), *(pair.get(f"{name}_95") or (None, None)))]

    rows = [[pair["first"], pair["second"], pair["rows"], *cells(pair)] for pair in behaviour["pairs"]]
    return ["first", "second", "rows", *columns], rows


def _answers(behaviour: dict[str, Any]) -> Table:
    rows = [
        [row["line"], row["prompt"], row["reference"], source, answer]
        for row in behaviour["rows"]
        for source, answer in row["answers"].items()
    ]
    return ["line", "prompt", "reference", "model", "answer"], rows
