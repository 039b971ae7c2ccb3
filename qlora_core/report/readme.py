"""study.json and the tables beside it -> README.md of a dataset repository: what was compared, what came out, how to make it again.

Every text from outside is code or prose out of which nothing breaks.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_core.model_card.licences import licence_fields
from qlora_core.model_card.markdown import code, fenced, front_matter, plain, prose, table
from qlora_core.report.tables import ANSWERS, TABLES
from qlora_core.study_grid import KINDS
from qlora_core.study_results import label
from qlora_core.wording import loss, seconds, size

TAGS = ("qlora-lab", "lora", "qlora")
# The Hub's loader takes the types of a CSV's columns from so many rows at once.
ROWS_AT_ONCE = 10_000
LISTED_RUNS = 60
EMPTY, WHOLE, NUMBER, TEXT = range(4)
ABOUT = {
    "runs": "each run with its settings, memory, speed and losses",
    "steps": "each training step: loss, learning rate, time, tokens, memory",
    "evaluations": "losses on the held-out rows",
    "memory_estimates": "the memory that was expected, part by part",
    "similarity": "how alike the learnt updates of two runs are, layer by layer",
    "updates": "size and singular values of each update",
    "quantisation": "the rounding error of each matrix of the base",
    "models": "loss and score of each model on the held-out rows",
    "behaviour": "how alike the answers of two models are",
    ANSWERS: "prompts, references and answers of held-out rows",
}


def readme(study: Mapping[str, Any], files: Mapping[str, bytes], *, repo_id: str) -> str:
    """The card of a report. `study` is what study.json holds, `files` all that lies beside the card, by name.
    Raises KeyError, TypeError or AttributeError where `study` was not written by `report.bundle`."""
    held = [name for name in TABLES if f"{name}.csv" in files]
    shown = [name for name in held if loads_as_one_table(files[f"{name}.csv"])]
    name = plain(study["study"]["name"]) or "study"
    front: dict[str, Any] = {"pretty_name": name, **licence_fields(None), "tags": list(TAGS)}
    if shown:
        front["configs"] = [
            {"config_name": one, "data_files": f"{one}.csv"} | ({"default": True} if one == shown[0] else {})
            for one in shown
        ]
    else:
        front["viewer"] = False
    parts = [
        front_matter(front),
        f"# {code(name)}: a study of LoRA and QLoRA",
        _opening(study),
        "## What was compared",
        _compared(study),
        "## Verdicts",
        *(_verdict(one) for one in study["verdicts"]),
        "## Runs",
        _runs(study["runs"]),
        "## The report",
        "`report.html` is one page with all figures that needs no network. Save it from the list of files, or with the command "
        "below, and open it in any browser; the Hub itself shows only its source.",
        fenced(f"hf download {repo_id} report.html --repo-type dataset --local-dir .", "shell"),
        "## Tables",
        table(("file", "holds"), [(f"`{one}.csv`", ABOUT[one]) for one in held]),
        _loading(repo_id, shown),
        _answers(study, held),
        "## Make it again",
        _again(study, files),
        "## What it ran on",
        _grounds(study),
        "## Licence",
        _licence(study, has_rows=ANSWERS in held),
        "## Limits",
        "It was measured with these models, rows, steps and devices, and says nothing of others. A verdict is as sure as it says.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loads_as_one_table(content: bytes) -> bool:
    """Whether the Hub's loader can read this CSV: columns have different names, and rows read later hold nothing that the types
    taken from the first ones do not."""
    header, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline="")) if content else [[]]
    if not header or len(set(header)) < len(header) or not all(header):
        return False
    first, later = rows[:ROWS_AT_ONCE], rows[ROWS_AT_ONCE:]
    for place in range(len(header)):
        known = max((_kind(row[place]) for row in first), default=EMPTY)
        # A column that is empty so far, or empty in places, is read as numbers with a fraction.
        known = NUMBER if known == EMPTY or (known == WHOLE and any(not row[place] for row in first)) else known
        if later and max(_kind(row[place]) for row in later) > known:
            return False
    return True


def _kind(cell: str) -> int:
    if not cell:
        return EMPTY
    try:
        float(cell)
    except ValueError:
        return TEXT
    return WHOLE if cell.lstrip("-").isdecimal() else NUMBER


def _opening(study: Mapping[str, Any]) -> str:
    runs, told = study["runs"], study["study"]
    kind = KINDS[told["kind"]].title if told["kind"] in KINDS else "Settings side by side"
    done = sum(run["state"] == "finished" for run in runs)
    bases = ", ".join(code(base.get("name")) for base in study["bases"]) or "–"
    return f"{kind}: {done} of {len(runs)} runs finished, base model {bases}. Made with QLoRA Lab."


def _compared(study: Mapping[str, Any]) -> str:
    told = study["study"]
    rows = [(code(name), ", ".join(code(_value(value)) for value in values)) for name, values in told["vary"].items()]
    rows.append(("seeds", ", ".join(code(seed) for seed in told["seeds"]) or "–"))
    rows.append(("noise floor", "measured" if told["noise_floor"] else "not measured"))
    notes = "\n".join(f"- {prose(_line(note))}" for note in study["differences"])
    same = "Everything else was the same for all runs: rows, their order, steps."
    return f"{table(('setting', 'values'), rows)}\n\n" + (f"Not quite comparable:\n\n{notes}" if notes else same)


def _value(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _verdict(verdict: Mapping[str, Any]) -> str:
    title, holds = prose(_line(verdict["title"])), prose(_line(verdict["holds"]))
    return (
        f"**{title}**: {holds}. {prose(_line(verdict['sentence']))}\n\n"
        f"Sureness: {prose(_line(verdict['sureness']))}. Rests on {prose(_line(verdict['rests_on']))}."
    )


def _line(text: Any) -> str:
    """In the middle of a line nothing may begin a paragraph."""
    return " ".join(str(text).split())


def _runs(runs: Iterable[Mapping[str, Any]]) -> str:
    found = list(runs)
    rows = [_run(run) for run in found[:LISTED_RUNS]]
    more = f"\n\n{len(found) - LISTED_RUNS} more in `runs.csv`." if len(found) > LISTED_RUNS else ""
    return table(("run", "seed", "state", "evaluation loss", "peak memory", "step time"), rows) + more


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    measured = run.get("measured") or {}
    name = label(run["varied"]) or str(run["name"] or "as set")
    role = "" if run["role"] == "arm" else f" ({plain(run['role'])})"
    peak = measured.get("peak_allocated_bytes") or measured.get("peak_host_bytes")
    kind = "GPU" if measured.get("peak_allocated_bytes") else "host"
    return (
        code(name + role),
        code(run["seed"]),
        code(run["state"]),
        loss(eval_loss(run)),
        f"{size(peak)} {kind}" if peak else "–",
        seconds(measured.get("step_seconds_median")),
    )


def eval_loss(run: Mapping[str, Any]) -> float | None:
    """Of the adapter that was kept, nats a token; None where none was measured or it is no number."""
    measured = run.get("measured") or {}
    losses = {entry["step"]: entry["loss"] for entry in measured.get("eval_losses") or ()}
    found = losses.get(measured.get("adapter_step"))
    return found if isinstance(found, (int, float)) and math.isfinite(found) else None


def _loading(repo_id: str, shown: list[str]) -> str:
    if not shown:
        return ""
    first = shown[0]
    lines = ("from datasets import load_dataset", "", f'{first} = load_dataset("{repo_id}", "{first}", split="train")')
    return fenced("\n".join(lines), "python")


def _answers(study: Mapping[str, Any], held: list[str]) -> str:
    if ANSWERS in held:
        return "It holds prompts, references and answers of held-out rows; the licence of those rows goes on to hold for them."
    return (
        "No row of the dataset, no prompt and no answer is part of this repository."
        if study["analysis"]
        else "No row of the dataset is part of this repository."
    )


def _again(study: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    settings = sorted(name for name in files if name.endswith(".yaml"))
    if not settings:
        return "Every run was deleted, and its settings with it."
    commits = dict.fromkeys(one["git_commit"] for one in study["environments"] if one.get("git_commit"))
    code_of = f" at commit {' or '.join(map(code, commits))}" if commits else ""
    where = code(settings[0]) if len(settings) == 1 else "`configs/`, one for each run"
    return (
        f"With QLoRA Lab{code_of}, in a folder with {where}; data that is named there by a file must lie there:\n\n"
        + fenced(_line(study["reproduce"]["command"]), "shell")
    )


def _grounds(study: Mapping[str, Any]) -> str:
    rows = []
    for base in study["bases"]:
        revision = f" at {code(base['revision'])}" if base.get("revision") else ""
        rows.append(("base model", f"{code(base.get('name'))}{revision}"))
        rows.append(("base weights, SHA-256", code(base.get("weights_sha256") or "unknown")))
    for data in study["datasets"]:
        source = (data.get("origin") or {}).get("source") or data.get("file_name") or "unknown"
        counts = f"{data.get('train_rows', '–')} rows trained on, {data.get('eval_rows', '–')} held out"
        rows.append(("data", f"{code(source)}: {prose(_line(counts))}"))
        rows += [
            (f"{split} rows, SHA-256", code(data.get(f"{kind}_fingerprint") or "unknown"))
            for kind, split in (("train", "training"), ("eval", "evaluation"))
        ]
    for one in study["environments"]:
        packages = ", ".join(f"{name} {version}" for name, version in (one.get("packages") or {}).items())
        runs = f", {len(one['of'])} runs" if len(study["environments"]) > 1 else ""
        rows.append(("device", f"{code(one.get('device'))}, {code(one.get('compute_dtype'))}{runs}"))
        rows.append(("versions", code(f"Python {one.get('python')}, {packages}")))
        if one.get("git_commit"):
            rows.append(("code", code(one["git_commit"])))
    return table(("what", "which"), rows) if rows else "Nothing has finished."


def _licence(study: Mapping[str, Any], *, has_rows: bool) -> str:
    configs = [run["config"] for run in study["runs"] if run.get("config")]
    rows = ", ".join(dict.fromkeys(code(config.get("dataset_license") or "unknown") for config in configs)) or "unknown"
    part = "which are part of it" if has_rows else "which are not part of it"
    return f"No licence of this report was named. The rows that the runs learnt from, {part}: {rows}."
