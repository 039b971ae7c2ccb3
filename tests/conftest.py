"""What holds for every test."""

import os

import pytest

# hf_xet reads these once a process, at its first upload; with its own, each fault takes it a minute and more.
for name, value in {"MAX_ATTEMPTS": "1", "BASE_DELAY": "10ms", "MAX_DURATION": "200ms"}.items():
    os.environ[f"HF_XET_CLIENT_RETRY_{name}"] = value


@pytest.fixture(autouse=True)
def only_gpu_tests_see_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU too, tests without the mark `gpu` mean the CPU: their bounds and bits are those of fp32."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
