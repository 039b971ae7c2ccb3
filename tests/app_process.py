"""`python app.py` as a person starts it, in a process of its own, on a free port; it can be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.error import URLError

from helpers import ROOT, wait_for
from hub_server import Hub

STARTS_WITHIN_SECONDS = 90
# What this machine knows of the Hub, or pretends, is not the app's.
NOT_OF_THE_APP = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "SYSTEM", "SPACE_ID")


class AppProcess:
    """Everything that the app and its jobs write is below `folder`: settings' home, caches, temporary files, the log."""

    def __init__(self, folder: Path, hub: Hub, **environment: str) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        places = {"HOME": folder, "HF_HOME": folder / "hf", "TMPDIR": folder / "tmp", "PYTHONPATH": ROOT}
        places |= {"GRADIO_TEMP_DIR": folder / "tmp" / "gradio"}
        places |= {"QLORA_LAB_HOME": folder / "home", "QLORA_LAB_LOCKS": folder / "locks"}
        kept = {name: value for name, value in os.environ.items() if name not in NOT_OF_THE_APP}
        self.environment = kept | {name: str(path) for name, path in places.items()} | {
            "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1",
        } | environment  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "app.py")],
                cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(self._answers, seconds=STARTS_WITHIN_SECONDS)

    def kill(self) -> None:
        """SIGKILL to the app alone: its jobs are processes of their own."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text()
        with suppress(URLError, OSError), urllib.request.urlopen(f"{self.url}config", timeout=10):
            return True
        return False

    def __enter__(self) -> "AppProcess":
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def written_with(self, text: str) -> list[str]:
        """Files below the folder that hold the text."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return [str(path) for path in files if text.encode() in path.read_bytes()]
