"""What runs of many shapes need of memory, measured beside the estimate that the app shows before Start.

`python examples/benchmarks/memory.py --out FILE.json` from the project's folder trains 3 steps of each configuration in a
process of its own. The file holds all that an estimate needs, so `--compare FILE.json` makes the table again anywhere,
whatever has become of the estimate since. Shapes held out are those that no constant of the estimate was fitted on.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import worker_runs  # noqa: E402
from workloads import WORKLOADS, as_tokens, make_rows  # noqa: E402

from qlora_core import architecture, memory  # noqa: E402
from qlora_core.config import TrainConfig  # noqa: E402
from qlora_core.devices import GIB  # noqa: E402
from qlora_core.settings import Settings  # noqa: E402
from qlora_core.targets import Architecture  # noqa: E402

STEPS, TOKEN_BUDGET = 3, 8192
KIND = "configurations"  # what the file holds
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FITTED, HELD_OUT, SMOKE = "fitted", "held out", "smoke test"


@dataclass(frozen=True)
class Configuration:
    """`workload`: W1, long rows that are learnt whole, or W2, short ones of which the responses are."""

    role: str
    shape: str
    method: str
    rank: int
    checkpointing: str
    workload: str

    @property
    def key(self) -> str:
        return "/".join((self.shape, self.method, f"r{self.rank}", self.checkpointing, self.workload))


CONFIGURATIONS = [
    *(Configuration(SMOKE, "tiny", method, 8, "none", "W2") for method in ("lora", "qlora")),
    *(Configuration(FITTED, "135m", method, 8, "none", "W2") for method in ("lora", "qlora")),
    *(Configuration(FITTED, "135m", method, 64, "full", "W1") for method in ("lora", "qlora")),
    Configuration(FITTED, "135m", "qlora", 64, "none", "W1"),
    *(Configuration(FITTED, "1b", method, 8, "full", "W2") for method in ("lora", "qlora")),
    *(Configuration(FITTED, "1b", method, 64, "none", "W1") for method in ("lora", "qlora")),
    Configuration(FITTED, "1b", "lora", 8, "none", "W2"),
    *(Configuration(FITTED, "8b", method, 64, "full", "W2") for method in ("lora", "qlora")),
    Configuration(FITTED, "8b", "qlora", 64, "full", "W1"),
    Configuration(FITTED, "8b", "lora", 8, "none", "W2"),
    *(Configuration(FITTED, "8b", method, 8, "none", "W1") for method in ("qlora", "lora")),
    Configuration(HELD_OUT, "small-vocabulary", "qlora", 16, "none", "W2"),
    Configuration(HELD_OUT, "small-vocabulary", "lora", 64, "none", "W1"),
    Configuration(HELD_OUT, "multi-head", "lora", 8, "full", "W1"),
    Configuration(HELD_OUT, "qwen2-0.5b", "qlora", 64, "none", "W1"),
    Configuration(HELD_OUT, "3b", "qlora", 128, "full", "W2"),
    Configuration(HELD_OUT, "3b", "lora", 16, "none", "W2"),
]
SHAPES = tuple(dict.fromkeys(c.shape for c in CONFIGURATIONS))


def measure(wanted: Configuration, model_folder: Path, *, device: str, limit_seconds: float) -> dict[str, Any]:
    """Every step learns from the same rows, so that all of them are the step with the largest pass."""
    workload = WORKLOADS[wanted.workload]
    rows = make_rows(workload, workload.rows_per_step, model_folder=model_folder)
    settings = {
        "base_model": str(model_folder),
        "method": wanted.method,
        "rank": wanted.rank,
        "activation_checkpointing": wanted.checkpointing,
        "token_budget": TOKEN_BUDGET,  # a choice by free memory would depend on what runs beside it
        "compile": "off",
        "rows_per_step": workload.rows_per_step,
        "max_seq_length": workload.max_seq_length,
        "loss_on": workload.loss_on,
        "max_steps": STEPS,
    }
    tokens = as_tokens(rows, workload.loss_on, model_folder)
    learnt = sum(label >= 0 for row in tokens for label in row["labels"][1:])
    lengths = [len(row["input_ids"]) for row in tokens]
    found = worker_runs.train(settings, rows, device=device, limit_seconds=limit_seconds)
    return found | {
        "is_gpu": worker_runs.kind(device) != "cpu",
        "row_lengths": lengths,
        "supervised_share": learnt / sum(lengths),
        "model_config": json.loads((model_folder / "config.json").read_text()),
    }


def peak_bytes(entry: dict[str, Any]) -> int:
    name = "peak_allocated_bytes" if entry["is_gpu"] else "peak_host_bytes"
    return max(step[name] for step in entry["steps"])


def estimated(entry: dict[str, Any]) -> memory.MemoryEstimate:
    """From what the file holds alone."""
    shape = architecture_of(json.dumps(entry["model_config"]))
    return memory.estimate(
        shape,
        TrainConfig.from_mapping(entry["config"]),
        plan_of(entry),
        row_lengths=entry["row_lengths"],
        supervised_share=entry["supervised_share"],
        is_gpu=entry["is_gpu"],
        dtype_bytes=DTYPE_BYTES[entry["dtype"]],
    )


def plan_of(entry: dict[str, Any]) -> memory.Plan:
    """The plan that ran, as the run's result tells it."""
    path = entry["path"]
    return memory.Plan(
        fused=path["layers"].startswith("fused"),
        token_budget=path["token_budget"],
        checkpointed_layers=path["checkpointed_layers"],
        offloaded=path["offloaded"],
    )


def architecture_of(model_config: str) -> Architecture:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        folder.mkdir()
        (folder / "config.json").write_text(model_config)
        (folder / "model.safetensors").touch()  # a folder without weights is no base model; nobody reads them here
        return architecture.read(str(folder), Settings(home=Path(tempfile.gettempdir(), "qlora-lab-architectures")))


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: measured and estimated peak of each, then the largest difference by role, device and versions."""
    lines = [
        "| | shape | method | rank | checkpointing | rows | tokens | fused | measured, GiB | estimate, GiB | difference |",
        "|" + "-|" * 11,
    ]
    worst: dict[str, float] = {}
    places: dict[str, None] = {}
    for e in entries:
        name = f"| {e['role']} | {e['shape']} | {e['method']} | {e['rank']} | {e['checkpointing']} | {e['workload']} |"
        if e["failed"]:
            lines.append(f"{name} - | - | - | - | {e['failed'].splitlines()[-1][:120].replace('|', '/')} |")
            continue
        expected, measured, plan = estimated(e), peak_bytes(e), plan_of(e)
        difference = expected.total_bytes / measured - 1
        worst[e["role"]] = max(worst.get(e["role"], 0), abs(difference))
        lines.append(
            f"{name} {expected.tokens:,} | {'yes' if plan.fused else 'no'} | {measured / GIB:.3f} "
            f"| {expected.total_bytes / GIB:.3f} | {difference:+.1%} |"
        )
        kind = "allocated on the GPU" if e["is_gpu"] else "of the process on the host"
        places[f"Memory {kind}: {worker_runs.place(e)}"] = None
    sums = [f"Largest difference, {role}: {value:.1%}" for role, value in worst.items()]
    return "\n".join([*lines, "", *sums, *places])


def chosen(options: argparse.Namespace) -> Iterator[Configuration]:
    before = worker_runs.read(options.out, KIND) if options.missing else {}
    done = {key for key, entry in before.items() if not entry["failed"]}
    for wanted in CONFIGURATIONS:
        if wanted.shape in options.shapes and wanted.key not in done:
            yield wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[s for s in SHAPES if s != "tiny"], choices=SHAPES)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()), help="folder of the random models")
    parser.add_argument(
        "--jobs", type=int, default=1, help="configurations measured at once: what one allocates, no other changes"
    )
    parser.add_argument("--limit", type=float, default=200, help="seconds that one configuration may take")
    parser.add_argument("--missing", action="store_true", help="measure only what --out does not hold yet")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("memory-benchmark.json"))
    parser.add_argument("--compare", type=Path, metavar="JSON", help="only print the table of this file")
    options = parser.parse_args()
    if options.compare:
        print(table(list(worker_runs.read(options.compare, KIND).values())))
        return
    device = worker_runs.choose_device(options.device)
    wanted = list(chosen(options))
    folders = {
        shape: worker_runs.model_in(options.models / f"qlora-lab-random-{shape}", shape)
        for shape in dict.fromkeys(c.shape for c in wanted)
    }

    def run(one: Configuration) -> tuple[Configuration, dict[str, Any]]:
        return one, measure(one, folders[one.shape], device=device, limit_seconds=options.limit)

    with worker_runs.device_alone(device), ThreadPoolExecutor(options.jobs) as pool:
        for one, found in pool.map(run, wanted):
            worker_runs.keep(options.out, KIND, one.key, asdict(one) | found)
            said = found["failed"] or f"{peak_bytes(found) / GIB:.3f} GiB"
            print(f"{one.key}: {said} ({found.get('process_seconds', 0):.0f} s)", file=sys.stderr, flush=True)
    print(table(list(worker_runs.read(options.out, KIND).values())))


if __name__ == "__main__":
    main()
