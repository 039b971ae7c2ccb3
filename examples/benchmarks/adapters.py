"""How long it takes to compare what two adapters have learnt, and in how much memory, without a base model.

`python examples/benchmarks/adapters.py` from the project's folder writes two random adapters in the shape of 8B, of rank 64 on all
linear layers, and compares them in a process of its own. The second is the first and a little noise, as QLoRA's is LoRA's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qlora_core.adapter_comparison import compare, load_update, spectrum  # noqa: E402

NOISE = 0.3  # in norms of the first


def write_adapters(shape: str, rank: int, folders: list[Path]) -> None:
    """As PEFT saves them, in fp32."""
    from random_models import config_of, tensor_shapes  # imports torch

    sizes = {
        name: size for name, size in tensor_shapes(config_of(shape)).items() if ".layers." in name and len(size) == 2
    }
    chance, tensors = np.random.default_rng(0), [{}, {}]
    for name, (outputs, inputs) in sizes.items():
        for part, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
            first = chance.standard_normal(size, dtype=np.float32)
            both = first, first + NOISE * chance.standard_normal(size, dtype=np.float32)
            for adapter, values in zip(tensors, both, strict=True):
                adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] = values
    for folder, adapter in zip(folders, tensors, strict=True):
        folder.mkdir(parents=True)
        save_file(adapter, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank}))


def measure(folders: list[Path]) -> None:
    """Print what this process took. Pages of files that it maps count as its memory, but the system can take them back."""
    begun = time.perf_counter()
    first, second = map(load_update, folders)
    loaded = time.perf_counter()
    found = compare(first, second)
    compared = time.perf_counter()
    spectra = spectrum(first)
    ended = time.perf_counter()
    print(
        f"{len(found.modules)} modules, cosine {found.overall['cosine']:.4f}, relative difference "
        f"{found.overall['relative']:.4f}, mean effective rank {np.mean([m['effective_rank'] for m in spectra]):.1f}"
    )
    print(f"read and checked: {loaded - begun:.2f} s")
    print(f"compared: {compared - loaded:.2f} s")
    print(f"singular values of one: {ended - compared:.2f} s")
    peak, files = memory_mebibytes("VmHWM"), memory_mebibytes("RssFile")
    print(f"peak of the process: {peak:,.0f} MiB, of which mapped files, which need not stay: {files:,.0f} MiB")


def memory_mebibytes(field: str) -> float:
    """Of this process, on Linux; rusage would count the memory of the process that started it."""
    told = Path("/proc/self/status").read_text()
    return int(told.partition(f"{field}:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b", help="a shape of random_models.py")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--measure", nargs=2, type=Path, metavar="FOLDER", help="compare two adapters that are there")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name, "adapter") for name in ("first", "second")]
        write_adapters(options.shape, options.rank, folders)
        print(
            f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, numpy {np.__version__}"
        )
        print(f"{options.shape}, rank {options.rank}, all linear layers", flush=True)
        subprocess.run([sys.executable, __file__, "--measure", *map(str, folders)], check=True)


if __name__ == "__main__":
    main()
