"""What this machine has: GPUs (by nvidia-ml-py), host memory, disk, compilers. Never imports torch, never touches a GPU."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pynvml

from qlora_core.errors import DeviceError

GIB = 1024**3
ALL = "all"
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it; memory is what all processes together use."""

    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    capability: tuple[int, int]


def gpus(*, visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs of this machine that `visible`, by default CUDA_VISIBLE_DEVICES, names; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ALL)
    if visible == ALL:
        return tuple(found)
    chosen = [part.strip() for part in visible.split(",")]
    return tuple(gpu for index, gpu in enumerate(found) if str(index) in chosen or gpu.uuid in chosen)


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle).removeprefix("NVIDIA "),
        total_bytes=memory.total,
        used_bytes=memory.used,
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def driver_versions() -> tuple[str, str] | None:
    """(driver version, newest CUDA version it serves), or None without a driver."""
    try:
        pynvml.nvmlInit()
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return driver, f"{cuda // 1000}.{cuda % 1000 // 10}"


def torch_build() -> tuple[str, str | None]:
    """(torch version, CUDA version it was built for or None), read from its files without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise DeviceError("torch is not installed here; run `make install` (it installs requirements.txt)")
    text = (Path(spec.origin).parent / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda: .* = '([^']+)'", text, re.MULTILINE)
    return version[1] if version else importlib.metadata.version("torch"), cuda[1] if cuda else None


def torch_gpu_problem() -> str | None:
    """Why the installed torch cannot use the GPU that is here, naming both versions and the remedy; None if it can.

    Only what files and driver tell; the worker asks torch itself before it trains.
    """
    driver = driver_versions()
    if driver is None or not gpus():
        return None
    version, cuda = torch_build()
    here = f"{gpus()[0].name}, driver {driver[0]} (CUDA {driver[1]})"
    if cuda is None:
        return (
            f"A GPU is here ({here}) but the installed torch {version} is a build for CPUs only. "
            "Install a CUDA build of torch (see pytorch.org/get-started), or choose the device 'cpu'."
        )
    if int(cuda.split(".")[0]) > int(driver[1].split(".")[0]):
        return (
            f"The installed torch {version} needs CUDA {cuda}, but the driver here serves less ({here}). "
            f"Update the driver, install a torch built for CUDA {driver[1]}, or choose the device 'cpu'."
        )
    return None


@dataclass(frozen=True)
class HostMemory:
    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """Host memory in bytes; a container's limit counts where it is lower than the machine's. Pages of files that were read are
    available: the kernel gives them up."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        kinds = dict(re.findall(r"^(\w+) (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE))
        of_files = sum(int(kinds.get(kind, 0)) for kind in ("active_file", "inactive_file"))
        available = min(available, max(0, int(text) - int(used.read_text()) + of_files))
    return HostMemory(total_bytes=total, available_bytes=available)


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def c_compiler() -> str | None:
    """The C compiler that torch.compile would call, or None."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
