"""The device and number types that a run uses, memory read off it, and refusal of a GPU that torch cannot use."""

import contextlib
import re
import time
from pathlib import Path

import torch

from qlora_core import devices
from qlora_core.config import TrainConfig
from qlora_core.errors import DeviceError
from qlora_core.memory import CONTEXT_BYTES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(config: TrainConfig) -> torch.device:
    """Raises DeviceError where a GPU is here, or was asked for, that the installed torch cannot use."""
    if config.device == "cpu":
        return torch.device("cpu")
    here = devices.gpus()
    if not here:
        if config.device == "cuda":
            raise DeviceError("device is 'cuda' but no GPU is here; choose 'auto' or 'cpu'")
        return torch.device("cpu")
    problem = devices.torch_gpu_problem() or _capability_problem(here[0])
    if problem:
        raise DeviceError(problem)
    return torch.device("cuda", 0)


def _capability_problem(gpu: devices.Gpu) -> str | None:
    """Why kernels of the installed torch do not run on this GPU, asked of torch itself."""
    version = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    driver = devices.driver_versions() or ("unknown", "unknown")
    where = f"{gpu.name}, driver {driver[0]} (CUDA {driver[1]})"
    if not torch.cuda.is_available():
        return (
            f"A GPU is here ({where}) but the installed {version} cannot use it. "
            "Install a torch built for this driver, update the driver, or choose the device 'cpu'."
        )
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        built_for = ", ".join(torch.cuda.get_arch_list())
        return (
            f"The GPU ({where}, compute capability {gpu.capability[0]}.{gpu.capability[1]}) refuses a first sum: "
            f"{str(error).splitlines()[0]}. The installed {version} has kernels for {built_for}. "
            "Install a torch built for this GPU, or choose the device 'cpu'."
        )
    return None


def choose_dtype(config: TrainConfig, device: torch.device) -> str:
    """bf16, fp16 or fp32. fp16 where the GPU has no bf16; fp32 on CPUs without bf16 instructions."""
    if device.type == "cuda":
        native_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        if config.compute_dtype == "bf16" and not native_bf16:
            raise DeviceError(
                f"compute_dtype is bf16 but {torch.cuda.get_device_name(device)} has no bf16 (it came with compute "
                "capability 8.0); choose 'auto' or 'fp16'"
            )
        return config.compute_dtype if config.compute_dtype != "auto" else "bf16" if native_bf16 else "fp16"
    if config.compute_dtype == "fp16":
        raise DeviceError(
            "compute_dtype is fp16, which CPUs train too coarsely and slowly; choose 'auto', 'bf16' or 'fp32'"
        )
    return config.compute_dtype if config.compute_dtype != "auto" else "bf16" if devices.cpu_has_bf16() else "fp32"


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"CPU ({names[0].strip() if names else 'unknown'}, {torch.get_num_threads()} threads)"


def limit_memory(config: TrainConfig, device: torch.device) -> None:
    """Hold torch to the memory budget that is set, so that a pass that would exceed it is met like any shortage."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    budget = total if config.memory_budget_gib is None else config.memory_budget_gib * devices.GIB - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget, 0) / total), device)


def usable_bytes(device: torch.device) -> int:
    """Memory that this process may fill, with what it has filled already and its context: free and its own."""
    if device.type != "cuda":
        return devices.host_memory().available_bytes + own_bytes()
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return round(min(free + torch.cuda.memory_reserved(device), allowed)) + CONTEXT_BYTES


def own_bytes() -> int:
    """Host memory that this process holds already."""
    return _of_this_process("VmRSS") or 0


def _of_this_process(field: str) -> int | None:
    """Bytes that the kernel tells of this process under that name."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


class MemoryMeter:
    """Peak memory since the last `reset`, by kind, in bytes. GPU figures are None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        # Resets VmHWM to the memory now in use; some sandboxes forbid it, then the peak includes loading.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def allocated(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def reserved(self) -> int | None:
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None

    def host(self) -> int | None:
        return _of_this_process("VmHWM")


def clock(device: torch.device) -> float:
    """Seconds, read after the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
