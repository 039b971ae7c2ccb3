"""The data card of a prepared dataset: what it holds, where it comes from, what was done. Text from a lineage, nothing more."""

import re
from typing import Any

# https://huggingface.co/docs/hub/datasets-cards
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))


def data_card(lineage: dict[str, Any]) -> str:
    """README.md with front matter. What comes from files and people stands in code spans, out of which nothing breaks."""
    # Here, as model cards know runs, and runs know prepared datasets.
    from qlora_core.model_card.licences import licence_fields
    from qlora_core.model_card.markdown import front_matter, table

    rows = lineage["rows"]
    total = sum(rows.values())
    files = [{"split": "train", "path": "data/train.parquet"}]
    if rows["eval"]:
        files.append({"split": "validation", "path": "data/validation.parquet"})
    front = {
        # The Hub refuses a card that names a licence which it does not know.
        **(licence_fields(lineage["license"]) if is_license_id(lineage["license"]) else {}),
        "task_categories": ["text-generation"],
        "size_categories": [next((name for most, name in _SIZES if total < most), "10M<n<100M")],
        "tags": ["qlora-lab"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    since = lineage["since_last_version"]
    parts = [
        front_matter(front),
        f"# {code(lineage['name'])}, version {lineage['version']}",
        f"{rows['train']:,} rows to train on, {rows['eval']:,} to evaluate on; {lineage['form']}. Prepared with QLoRA Lab.",
        "## Sources",
        table(
            ("file", "from", "usable rows", "read as", "licence", "SHA-256"),
            [
                (
                    code(source["name"]),
                    code(source.get("hub") or "a file"),
                    f"{source['rows']:,}",
                    code(f"{source['form']}: {source['read_as']}"),
                    code(source.get("license") or "unknown"),
                    code(source["sha256"]),
                )
                for source in lineage["sources"]
            ],
        ),  # fmt: skip
        "## What was done",
        "In this order; `changes.csv` lists every row that a step changed or left out.",
        table(
            ("step", "counts"),
            [
                (name, ", ".join(f"{code(what)} {_figure(value)}" for what, value in counts.items()) or "–")
                for name, counts in lineage["steps"].items()
            ],
        ),
        "## Licence",
        code(lineage["license"]) if lineage["license"] else "Unknown. Find it out before this is used or published.",
        "## Personal data",
        _personal(lineage["steps"].get("personal data")),
        "## Columns",
        ", ".join(code(name) for name in lineage["columns"]),
        "## Version",
        f"Fingerprint `{lineage['fingerprint']}`: SHA-256 over all columns of the rows in their order, as "
        "`sha256sum train.jsonl eval.jsonl | sha256sum` prints it (without `eval.jsonl` where no rows are held out)."
        + (
            f" Since version {since['version']}: {since['rows_added']:,} rows added, {since['rows_removed']:,} removed."
            if since
            else " The first version."
        ),
        "## Limits",
        "The rows say what their sources say: they were not checked for being true, fair or safe beyond the steps above.",
    ]
    return "\n\n".join(parts) + "\n"


def is_license_id(text: str | None) -> bool:
    """Whether the Hub may know it: an identifier, not a sentence."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", text or ""))


def code(value: Any) -> str:
    """Any text as a code span of one line that nothing in it ends, not even in a table."""
    text = " ".join(str(value).replace("`", "'").replace("|", "¦").split())
    return f"`{text}`" if text else "–"


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else code(value)


def _personal(counts: dict[str, Any] | None) -> str:
    if counts is None:
        return "Not looked for."
    what = "and masked" if counts["masked"] else "and left as it is"
    return (
        f"Looked for with {code(counts['found by'])}: found in {counts['rows']:,} rows {what}. What no pattern knows is not "
        "found."
    )
