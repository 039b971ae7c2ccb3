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
    texts = {f"{name}.csv": to_csv(table) for name, table in tables(results, rows=rows).items()}
    texts[JSON] = json.dumps(bundle(results, folder=folder, rows=rows), indent=1, ensure_ascii=False)
    if not reproducible(results):
        (folder / "configs").mkdir(exist_ok=True)
        beside = folder / "configs"
        texts |= {
            f"configs/{run.run_id}.yaml": named(run.config, beside).to_yaml() for run in results.runs if run.config
        }
    elif settings := study_yaml(results, folder=folder):
        texts[YAML] = settings
    texts[HTML] = report_html(results, rows=rows, folder=folder)
    for name, text in texts.items():
        # Half a surrogate pair, from a file name or an answer, has no bytes of its own.
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return folder / HTML
