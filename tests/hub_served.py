"""A Hub on loopback with the people who push to it in tests, and a client of it in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from hub_server import Hub, hub

# huggingface_hub 2.4.0 sends LFS files in a way that its HTTP client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
MARK = "hf_SECRETMARKER"
ALICE, READER, BOB, ENVIRONMENT = f"{MARK}alice", f"{MARK}reader", f"{MARK}bob", f"{MARK}environment"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Clients of this process are told of it by `endpoint=`, and upload by LFS."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # the client waits between its attempts
    with hub(tmp_path / "hub") as found:
        found.add_user("alice", organizations={"acme": "write", "readers": "read", "closed": "write"})
        found.add_user("bob")
        found.add_token("alice", text=ALICE)
        found.add_token("alice", "read", text=READER)
        found.add_token("bob", text=BOB)
        yield found


def client(endpoint: str, home: Path, code: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """A process whose Hub is `endpoint`, and in whose environment there is a token that nobody asked to use."""
    names = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    names |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | names, cwd=home, input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done
