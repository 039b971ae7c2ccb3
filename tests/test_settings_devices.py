"""Settings and devices: what the machine has is found without torch, and what cannot work is said with its remedy."""

from pathlib import Path

import pynvml
import pytest
from helpers import ROOT, fake_gpus

from qlora_core import devices
from qlora_core.errors import ConfigError, DeviceError
from qlora_core.settings import Settings

VARIABLES = [spec.metadata["env"] for spec in Settings.__dataclass_fields__.values()]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment() == Settings()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_LAB_HOME", "lab")
    monkeypatch.setenv("QLORA_LAB_MAX_ROW_BYTES", "5000")
    monkeypatch.setenv("QLORA_LAB_MAX_ROWS", "")
    found = Settings.from_environment()
    assert (found.home, found.max_row_bytes, found.max_rows) == (tmp_path / "lab", 5000, Settings().max_rows)
    assert (found.runs, found.queue) == (tmp_path / "lab" / "runs", tmp_path / "lab" / "queue")
    monkeypatch.setenv("QLORA_LAB_HOME", "~/lab")
    assert Settings.from_environment().home == (Path.home() / "lab").resolve()


def test_every_wrong_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LAB_MAX_ROW_BYTES", "1 MB")
    monkeypatch.setenv("QLORA_LAB_MAX_ROWS", "0")
    with pytest.raises(ConfigError) as error:
        Settings.from_environment()
    assert [problem.split()[0] for problem in error.value.problems] == ["QLORA_LAB_MAX_ROW_BYTES", "QLORA_LAB_MAX_ROWS"]
    assert "'1 MB'; it must be a whole number above 0" in str(error.value)


@pytest.mark.parametrize("text", ["-1", "1.5", "²", "1e6"])
def test_number_must_be_whole_and_above_zero(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QLORA_LAB_MAX_ROWS", text)
    with pytest.raises(ConfigError, match="QLORA_LAB_MAX_ROWS"):
        Settings.from_environment()


# --- GPUs --------------------------------------------------------------------------------------------------------------


def test_gpus_are_as_the_driver_reports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, "GPU-a", "GPU-b")
    first, second = devices.gpus()
    assert (first.name, first.uuid, second.uuid) == ("H100 80GB HBM3", "GPU-a", "GPU-b")
    assert (first.total_bytes, first.used_bytes, first.capability) == (80 * 1024**3, 1024**3, (9, 0))
    assert devices.driver_versions() == ("550.54", "12.4")


def test_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    assert (devices.gpus(), devices.driver_versions(), devices.torch_gpu_problem()) == ((), None, None)


def test_driver_that_fails_midway_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, "GPU-a")

    def lost(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert devices.gpus() == ()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("1", ["GPU-b"]), ("0, 1", ["GPU-a", "GPU-b"]), ("GPU-b", ["GPU-b"]), ("", []), ("-1", []), ("7", [])],
)
def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]) -> None:
    fake_gpus(monkeypatch, "GPU-a", "GPU-b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.uuid for gpu in devices.gpus()] == expected
    assert len(devices.gpus(visible=devices.ALL)) == 2


def test_torch_build_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    version, cuda = devices.torch_build()
    assert version[0].isdigit()
    assert cuda is None or cuda[0].isdigit()
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="torch is not installed here; run `make install`"):
        devices.torch_build()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
            ("2.13.0+cu130", "13.0"),
        ),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", ("2.13.0+cpu", None)),
        ("__version__ = '2.9.0+rocm6'\ncuda: str | None = None\nhip: Optional[str] = '6.4'\n", ("2.9.0+rocm6", None)),
    ],
)
def test_every_build_of_torch_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, str | None]
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = devices.importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: spec)
    assert devices.torch_build() == expected


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (("2.13.0+cpu", None), ["2.13.0+cpu", "CPUs only", "H100", "driver 550.54", "choose the device 'cpu'"]),
        (("2.13.0+cu130", "13.0"), ["2.13.0+cu130", "needs CUDA 13.0", "CUDA 12.4", "Update the driver"]),
        (("2.9.0+cu128", "12.8"), []),
        (("2.5.0+cu118", "11.8"), []),
    ],
)
def test_torch_that_cannot_use_the_gpu_is_named_with_both_versions(
    monkeypatch: pytest.MonkeyPatch, build: tuple[str, str | None], says: list[str]
) -> None:
    fake_gpus(monkeypatch, "GPU-a")
    monkeypatch.setattr(devices, "torch_build", lambda: build)
    problem = devices.torch_gpu_problem()
    assert (problem is None) == (not says)
    assert all(words in (problem or "") for words in says)


# --- the host ----------------------------------------------------------------------------------------------------------


def test_host_memory_and_disk_are_plausible(tmp_path: Path) -> None:
    memory = devices.host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert devices.free_disk_bytes(tmp_path / "not" / "yet") == pytest.approx(devices.free_disk_bytes(ROOT), rel=1)
    assert devices.free_disk_bytes(tmp_path / "not" / "yet") > 0


def test_files_that_a_container_has_read_leave_its_memory_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that has downloaded a large model is full of its pages, and has room all the same."""
    files = {
        "max": "64000000\n",
        "current": "63000000\n",
        "stat": "anon 3000000\nactive_file 40000000\ninactive_file 20000000\n",
    }
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert devices.host_memory() == devices.HostMemory(total_bytes=64_000_000, available_bytes=61_000_000)


def test_compiler_of_the_environment_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mycc")
    assert devices.c_compiler() is None
    (tmp_path / "mycc").touch(0o755)
    assert devices.c_compiler() == str(tmp_path / "mycc")
