"""Files that the page offers for download, packed once and kept until what is in them changes."""

import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from qlora_core.errors import RunError
from qlora_core.run_status import ACTIVE
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.study import Study
from qlora_core.ui import run_view
from qlora_core.ui.uploads import safe_name
from qlora_core.ui.words import esc, size

Report = Callable[[str], object]


def adapter_zip(run: Run, settings: Settings) -> Path:
    """`<run name>/…` of adapter/: what loads it, never a checkpoint or optimizer state. Raises RunError."""
    if not run_view.has_adapter(run) or run.status().state in ACTIVE:
        raise RunError(f"{run.run_id}: has no adapter to download yet; wait until it has finished, or stop it")
    name, top = f"{run.run_id}-adapter.zip", safe_name(run.config().run_name())
    return zipped(run.adapter, settings.downloads / name, top, lambda text: None, zipfile.ZIP_DEFLATED)


def merged_zip(run: Run, folder: Path, settings: Settings, report: Report) -> Path:
    # Weights do not compress.
    name, top = f"{run.run_id}-{folder.name}.zip", safe_name(run.config().run_name())
    return zipped(folder, settings.downloads / name, top, report, zipfile.ZIP_STORED)


def offered(file: Path, run: Run, settings: Settings) -> Path:
    """A file of a run's as a download, without a second copy where the disk can do without."""
    target = settings.downloads / f"{run.run_id}-{file.name}"
    if target.exists() and target.stat().st_mtime >= file.stat().st_mtime:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(file)
    except OSError:  # another file system
        shutil.copy2(file, target)
    return target


def study_zip(study: Study, settings: Settings) -> Path:
    """The report of a study as it stands now, with its tables and the bundle that reproduces it."""
    from qlora_core.report import write_report

    with tempfile.TemporaryDirectory(prefix="qlora-lab-report-") as name:
        folder = Path(name) / "report"
        write_report(study.results(), folder)
        target = settings.downloads / f"{study.study_id}.zip"
        return zipped(folder, target, safe_name(study.name), lambda text: None, zipfile.ZIP_DEFLATED)


def zipped(folder: Path, target: Path, top: str, report: Report, compression: int) -> Path:
    """The folder's files below `top`; the archive that is there, where none of them is newer."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in files):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with zipfile.ZipFile(partial, "w", compression) as archive:
            for path in files:
                report(f"packing {path.name}, {size(path.stat().st_size)}")
                archive.write(path, f"{top}/{path.relative_to(folder)}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def link(path: Path) -> str:
    # A plain link into allowed_paths: gradio's file components would first copy gigabytes into their cache.
    return (
        f'<div class="lab-fresh"><a class="lab-link" download="{esc(path.name)}" '
        f'href="gradio_api/file={esc(quote(str(path)))}">{esc(path.name)} · {size(path.stat().st_size)}</a></div>'
    )


def follow(elem_id: str) -> str:
    """Script that follows the link which a handler has just put into that output: one click prepares and downloads."""
    return f"() => {{ const a = document.querySelector('#{elem_id} .lab-fresh a.lab-link'); if (a) a.click(); }}"
