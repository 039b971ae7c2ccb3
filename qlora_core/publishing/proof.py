"""The proof of a push: downloaded again into an empty cache, loaded as the card says, and its logits compared with ours."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_core import devices, hub
from qlora_core.errors import HubError
from qlora_core.hub.arrived import download
from qlora_core.queue import host_work, worker_environment
from qlora_core.runs import Run

# Of the bytes of the weights as they lie on the disk, 16 bits each as a rule.
NEEDED = {"float32": 2.2, "auto": 1.2}


def prove(run: Run, push: hub.Push, folder: Path, pushed: hub.Pushed) -> dict[str, Any]:
    """Whether what is on the Hub is what the folder holds: `state` "proven", "differs" or "failed", these with a `reason`."""
    push.report("Downloading it again and loading it")
    for left in run.path.glob(".proof-*"):  # of a push that was ended in the middle of this
        shutil.rmtree(left, ignore_errors=True)
    with host_work(run.settings, push.report):
        return _prove(run, push, folder, pushed)


def _prove(run: Run, push: hub.Push, folder: Path, pushed: hub.Pushed) -> dict[str, Any]:
    sent = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size for content in push.files.values()
    )
    free = devices.free_disk_bytes(run.path)
    if free < sent:
        return _failed(
            f"downloading it again needs {_gib(sent)} of disk, {_gib(free)} are free; free some, then push again"
        )
    loaded = folder if push.release.what == "merged" else run.base_model().folder
    weights = sum(path.stat().st_size for path in loaded.glob("*.safetensors"))
    available = devices.host_memory().available_bytes
    dtype = next((name for name, share in NEEDED.items() if weights * share <= available), None)
    if dtype is None:
        needed = _gib(int(weights * NEEDED["auto"]))
        return _failed(
            f"loading it needs {needed} of host memory, {_gib(available)} are free; end other programs, then push again"
        )
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".proof-") as cache:
        try:
            downloaded = download(pushed, Path(cache), token=push.token, endpoint=push.endpoint)
        except HubError as error:
            return _failed(str(error))
        done = subprocess.run(
            [sys.executable, "-m", "qlora_core.worker.proving", str(run.path), push.release.what, str(downloaded),
             str(folder), dtype],
            env=worker_environment(run.settings, device="cpu"), capture_output=True, text=True, cwd=run.path,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        return _failed(f"it could not be loaded: {last[:500]}")
    verdict = json.loads(done.stdout.strip().splitlines()[-1])
    if verdict["same"]:
        return {"state": "proven", "files": len(pushed.files), **verdict}
    what = "its logits differ from" if verdict["same_tokens"] else "its tokenizer makes other tokens than"
    return {"state": "differs", "files": len(pushed.files), "reason": f"{what} those of the model here", **verdict}


def _failed(reason: str) -> dict[str, Any]:
    return {"state": "failed", "reason": reason}


def _gib(count: int) -> str:
    return f"{count / devices.GIB:.1f} GiB"
