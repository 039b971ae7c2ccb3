"""A merged model as one GGUF file, for llama.cpp and what is built on it, by llama.cpp's own converter where settings name it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qlora_core import devices, merging
from qlora_core.errors import ModelError, RunError
from qlora_core.queue import worker_environment
from qlora_core.runs import Run

TYPES = ("bf16", "f16", "q8_0")
NO_CONVERTER = (
    "no converter to GGUF is set: llama.cpp brings one, which is in no package of ours; set QLORA_LAB_GGUF_CONVERTER to the path "
    "of its convert_hf_to_gguf.py, with llama.cpp's requirements installed here, or to a program that takes the same options"
)


def export_gguf(
    run: Run, *, onto: str | None = None, kind: str = "bf16", report: Callable[[str], None] = lambda text: None
) -> Path:
    """`merged-<onto>-<kind>.gguf` below the run's folder; made once for an adapter. Merges first where that is not done.

    `kind`: numbers of 16 bits, or "q8_0", whole numbers of 8 bits with a scale for each 32. The converter gets neither a token nor
    a network. Raises RunError and ModelError, with the converter's last words.
    """
    if kind not in TYPES:
        raise RunError(f"the type of a GGUF file is {kind!r}; choose one of {', '.join(TYPES)}")
    converter = Path(run.settings.gguf_converter).expanduser() if run.settings.gguf_converter else None
    if converter is None:
        raise RunError(NO_CONVERTER)
    if not converter.is_file():
        raise RunError(f"QLORA_LAB_GGUF_CONVERTER is {converter}, and there is no such file; {NO_CONVERTER}")
    folder = merging.merge(run, onto=onto, report=report)
    target = run.path / f"{folder.name}-{kind}.gguf"
    if target.exists() and target.stat().st_mtime > folder.stat().st_mtime:
        return target
    needed, free = sum(path.stat().st_size for path in folder.iterdir()), devices.free_disk_bytes(run.path)
    if free < needed:
        raise RunError(
            f"{run.path} has {free / devices.GIB:.1f} GiB free, the GGUF file needs up to {needed / devices.GIB:.1f}; "
            "delete runs or free disk space"
        )
    report(f"converting {folder.name} to GGUF, {kind}")
    partial = target.with_name(f".partial-{target.name}")
    program = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    try:
        done = subprocess.run(
            [*program, str(folder), "--outfile", str(partial), "--outtype", kind],
            env=worker_environment(run.settings, device="cpu"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise merging.failure(
                run, "conversion to GGUF", "gguf-log.txt", done.returncode, f"{done.stdout}{done.stderr}"
            )
        if not partial.exists():
            raise ModelError(
                f"{run.run_id}: {converter} ended without a word, and without a GGUF file; try another version"
            )
        partial.replace(target)
    except OSError as error:
        raise ModelError(f"{run.run_id}: {converter} cannot be run: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target
