"""A study -> report.html, CSV tables, and a bundle that makes it again by one command. Measures and judges nothing."""

import json
from pathlib import Path

from qlora_core.report.bundle import JSON, YAML, bundle, named, reproducible, study_yaml
from qlora_core.report.page import report_html as report_html
from qlora_core.report.tables import tables, to_csv
from qlora_core.study_results import StudyResults

HTML = "report.html"


def write_report(results: StudyResults, folder: Path, *, rows: bool = True) -> Path:
    """Write report.html, a CSV for each table, study.json and study.yaml (of picked runs configs/RUN.yaml); returns the page.

    `rows`: False leaves out prompts, references and answers of held-out rows, which a dataset's licence may forbid to pass on. The
    folder is made where it is not there; files of an earlier report are replaced. Raises OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not rows:
        (folder / "answers.csv").unlink(missing_ok=True)
    for name, content in report_files(results, rows=rows, folder=folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / HTML


def report_files(
    results: StudyResults, *, rows: bool = True, folder: Path | None = None, at: float | None = None
) -> dict[str, bytes]:
    """What `write_report` writes, by name. `folder`: where it will lie, which local data are named from, else by their names
    alone; `at`: the time that it tells as that of its writing, seconds since the epoch, else now."""
    texts = {f"{name}.csv": to_csv(table) for name, table in tables(results, rows=rows).items()}
    texts[JSON] = json.dumps(bundle(results, folder=folder, rows=rows, at=at), indent=1, ensure_ascii=False)
    if not reproducible(results):
        beside = folder / "configs" if folder else None
        texts |= {
            f"configs/{run.run_id}.yaml": named(run.config, beside).to_yaml() for run in results.runs if run.config
        }
    elif settings := study_yaml(results, folder=folder):
        texts[YAML] = settings
    texts[HTML] = report_html(results, rows=rows, folder=folder, at=at)
    # Half a surrogate pair, from a file name or an answer, has no bytes of its own.
    return {name: text.encode("utf-8", errors="backslashreplace") for name, text in texts.items()}
