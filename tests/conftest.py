"""What holds for every test."""

import pytest


@pytest.fixture(autouse=True)
def only_gpu_tests_see_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU too, tests without the mark `gpu` mean the CPU: their bounds and bits are those of fp32."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
