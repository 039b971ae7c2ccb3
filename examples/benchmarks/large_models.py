"""Memory of a QLoRA step on large models, on one GPU, whose weights are made layer by layer as they are loaded.

`python examples/benchmarks/large_models.py` trains steps of a 70B shape on rows of 512 and 2,048 tokens;
`… --shape 8b --cap-bytes 12e9 --tokens 2048` those of an 8B shape where torch may take 12 GB. The 16-bit model is never whole on
GPU, host or disk. Peaks are in GiB of 1024**3 bytes; allocated is what tensors take, reserved what torch took for them.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from random_models import SHAPES, generated_shards  # noqa: E402

from qlora_core.config import TrainConfig  # noqa: E402
from qlora_core.worker import hardware, loading  # noqa: E402
from qlora_core.worker.batches import Row  # noqa: E402
from qlora_core.worker.steps import Stepper  # noqa: E402

GIB = 1024**3
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the one row of a step")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each length")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cap-bytes", type=float, help="what torch may take of the GPU, such as 12e9")
    parser.add_argument("--budget-gib", type=float, help="what the plan of the passes may fill, context included")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the run")
    parser.add_argument("--shards", type=Path, help="where a shard lies while it is read (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.shards) as folder:
        result = measured(arguments, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load, then train steps of each length; where memory runs out, what was measured until then and that it did."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    config = configured(arguments, max(arguments.tokens))
    dtype = hardware.choose_dtype(config, device)
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "device": hardware.describe(device),
        "cap_gib": capped(arguments.cap_bytes, device),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "compute_dtype": dtype,
        "config": {name: value for name, value in config.to_json().items() if value != TrainConfig().to_json()[name]},
        "load": None,
        "runs": [],
    }
    meter = hardware.MemoryMeter(device)
    try:
        meter.reset()
        begun = hardware.clock(device)
        at_hand = generated_shards(arguments.shape, folder)
        base = loading.load_base(folder, config, device=device, dtype=dtype, shard_at_hand=at_hand)
        model = loading.add_adapter(base, config, base_name=arguments.shape)
        model.train()
        result["load"] = {"seconds": hardware.clock(device) - begun, **peaks(meter, device)}
        for tokens in arguments.tokens:
            for run in trained(model, config, tokens, device=device, dtype=dtype, steps=arguments.steps):
                print(json.dumps(run), file=sys.stderr, flush=True)
            result["runs"].append(run)
    except torch.OutOfMemoryError as error:
        result["out_of_memory"] = str(error).splitlines()[0]
    return result


def configured(arguments: argparse.Namespace, longest: int) -> TrainConfig:
    given = dict(entry.split("=", 1) for entry in arguments.set)
    values = {
        "method": "qlora",
        "rank": arguments.rank,
        "rows_per_step": 1,
        "max_seq_length": longest,
        "max_steps": arguments.steps,
        "compile": "off",
        "memory_budget_gib": arguments.budget_gib,
    }
    return TrainConfig(**(values | {name: json_or_text(value) for name, value in given.items()}))


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def capped(cap_bytes: float | None, device: torch.device) -> float | None:
    if cap_bytes is None or device.type != "cuda":
        return None
    torch.cuda.set_per_process_memory_fraction(
        cap_bytes / torch.cuda.get_device_properties(device).total_memory, device
    )
    return round(cap_bytes / GIB, 3)


def trained(
    model: Any, config: TrainConfig, tokens: int, *, device: torch.device, dtype: str, steps: int
) -> Iterator[dict[str, Any]]:
    """Steps on one row of so many tokens, all of them learnt; what was measured, after each."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter = hardware.MemoryMeter(device)
    meter.reset()
    row = Row(1, [4 + place % 1000 for place in range(tokens)], [True] * tokens)
    notes: list[str] = []
    stepper = Stepper(model, config, [row], device=device, dtype=dtype, say=lambda event: notes.append(str(event)))
    begun = hardware.clock(device)
    stepper.warm_up()
    run: dict[str, Any] = {
        "tokens": tokens,
        "path": [stepper.passes.fused_reason, stepper.passes.memory_reason],
        "estimated_peak_gib": round(stepper.passes.estimated_peak_bytes / GIB, 3),
        "warm_up_seconds": hardware.clock(device) - begun,
        "warm_up": peaks(meter, device),
        "step_seconds": [],
        "losses": [],
        "notes": notes,
    }
    meter.reset()
    for number in range(steps):
        step = stepper.take(number)
        run["step_seconds"].append(step.step_seconds)
        run["losses"].append(step.loss)
        run["steps"] = peaks(meter, device)
        yield run


def peaks(meter: hardware.MemoryMeter, device: torch.device) -> dict[str, float | None]:
    """Peaks since the meter was reset, and what tensors take now, in GiB."""
    now = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    found = {
        "peak_allocated_gib": meter.allocated(),
        "peak_reserved_gib": meter.reserved(),
        "allocated_gib": now,
        "peak_host_gib": meter.host(),
    }
    return {name: None if size is None else round(size / GIB, 3) for name, size in found.items()}


if __name__ == "__main__":
    main()
