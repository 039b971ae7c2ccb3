"""This project's training beside other trainers: seconds a step, tokens a second, memory, and seconds to the first step.

`python examples/benchmarks/training.py --out FILE.json` from the project's folder, on an idle GPU. Each measurement is a
process of its own on a random model; a trainer that is not installed is a row that says so. Commands with the same --out
add to its measurements, so a long comparison can be made in parts. `--plot FILE.json` draws what another machine measured.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import worker_runs  # noqa: E402
from ratio_figure import write_ratio_figure  # noqa: E402
from workloads import RATIO_WORKLOADS, WORKLOADS, as_tokens, make_rows  # noqa: E402

from qlora_core.config import TrainConfig  # noqa: E402
from qlora_core.devices import GIB  # noqa: E402
from qlora_core.settings import Settings  # noqa: E402

METHODS = ("lora", "qlora")
KIND = "cases"  # what the file holds
# This project's own worker with these settings.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-8gib": {"activation_checkpointing": "offloaded", "memory_budget_gib": 8},
    "ours-plain": {"fused_layers": "off", "compile": "off"},
    "ours-dropout": {"lora_dropout": 0.05},
}
# Other trainers: what must be installed, and with which checkpointing it is tried until it fits the memory.
OTHERS: dict[str, tuple[tuple[str, ...], tuple[bool, ...]]] = {
    "trainer": ((), (True,)),
    "trainer-lean": ((), (False, True)),
    "trainer-liger": (("liger_kernel",), (False, True)),
    "trl": (("trl", "datasets"), (False, True)),
    "unsloth": (("unsloth", "trl", "datasets"), (True,)),
}
# Whose LoRA and QLoRA are compared over tokens a step, unless workloads are named one by one.
RATIO_ARMS = ("ours", "trainer")
BUSY_BYTES = GIB


@dataclass(frozen=True)
class Case:
    shape: str
    workload: str
    method: str
    arm: str
    max_steps: int
    warmup: int
    rank: int

    @property
    def key(self) -> str:
        return "/".join((self.shape, self.workload, self.method, self.arm))

    @property
    def rows(self) -> int:
        """One epoch: every trainer reads each row once."""
        return self.max_steps * WORKLOADS[self.workload].rows_per_step


def chosen_cases(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.workloads:
        for workload in RATIO_WORKLOADS if name == "ratio" else (name,):
            for arm in options.arms:
                if name != "ratio" or arm in RATIO_ARMS or len(options.arms) == 1:
                    for method in options.methods:
                        yield Case(options.shape, workload, method, arm, options.steps, options.warmup, options.rank)


def measure(case: Case, model_folder: Path, *, device: str, limit_seconds: float) -> dict[str, Any]:
    workload = WORKLOADS[case.workload]
    rows = make_rows(workload, case.rows, model_folder=model_folder)
    if case.arm in OURS:
        settings = {
            "base_model": str(model_folder),
            "method": case.method,
            "rank": case.rank,
            "compute_dtype": dtype_on(device),
            "rows_per_step": workload.rows_per_step,
            "max_seq_length": workload.max_seq_length,
            "loss_on": workload.loss_on,
            "max_steps": case.max_steps,
        }
        return worker_runs.train(settings | OURS[case.arm], rows, device=device, limit_seconds=limit_seconds)
    needed, ways = OTHERS[case.arm]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return {"failed": f"not installed here: {', '.join(absent)}"}
    found: dict[str, Any] = {}
    for checkpointing in ways:
        found = measure_other(case, rows, model_folder, checkpointing, device=device, limit_seconds=limit_seconds)
        if not found.get("out_of_memory"):
            break
    return found


def measure_other(
    case: Case, rows: list[dict], model_folder: Path, checkpointing: bool, *, device: str, limit_seconds: float
) -> dict[str, Any]:
    workload = WORKLOADS[case.workload]
    with tempfile.TemporaryDirectory(prefix="qlora-lab-benchmark-") as name:
        folder = Path(name)
        rows_file, case_file, result_file = (folder / f"{part}.json" for part in ("rows", "case", "result"))
        rows_file.write_text(json.dumps(as_tokens(rows, workload.loss_on, model_folder)))
        told = {
            "arm": case.arm,
            "method": case.method,
            "rank": case.rank,
            "max_steps": case.max_steps,
            "seed": TrainConfig().seed,
            "rows_per_step": workload.rows_per_step,
            "max_seq_length": workload.max_seq_length,
            "checkpointing": checkpointing,
            "model_folder": str(model_folder),
            "rows_file": str(rows_file),
            "dtype": dtype_on(device),
            "device": worker_runs.kind(device),
        }
        case_file.write_text(json.dumps(told))
        command = [sys.executable, str(Path(__file__).with_name("other_trainers.py")), str(case_file), str(result_file)]
        settings, begun = Settings(home=folder), time.monotonic()
        failed = worker_runs.run_process(
            command, folder / "log.txt", settings, device=device, limit_seconds=limit_seconds
        )
        if failed:
            return {"failed": failed}
        return json.loads(result_file.read_text()) | {"process_seconds": time.monotonic() - begun}


def dtype_on(device: str) -> str:
    return "fp32" if worker_runs.kind(device) == "cpu" else "bf16"


def summary(found: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Figures of the steps after the warm-up; peaks are of all steps."""
    if found["failed"]:
        return {}
    steps = found["steps"]
    timed = steps[warmup:] or steps
    seconds = [step["step_seconds"] for step in timed]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    peaks = {name: max((s[name] for s in steps if s[name] is not None), default=None) for name in worker_runs.PEAKS}
    return peaks | {
        "step_seconds_median": statistics.median(seconds),
        "step_seconds_quartiles": [quartiles[0], quartiles[2]],
        "tokens_per_second": sum(step["tokens"] for step in timed) / sum(seconds),
        "tokens_per_step": statistics.fmean(step["tokens"] for step in timed),
        "supervised_tokens_per_step": statistics.fmean(step["supervised_tokens"] for step in timed),
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a row a case, then on which device and versions they were measured."""
    lines = [
        "| shape | workload | arm | method | seconds a step (quartiles) | tokens/s | tokens a step (learnt) "
        "| peak memory, GiB | to first step | path | on |",
        "|" + "-|" * 11,
    ]
    places: dict[str, int] = {}
    for case in cases:
        name = f"| {case['shape']} | {case['workload']} | {case['arm']} | {case['method']} |"
        if case["failed"]:
            lines.append(f"{name} - | - | - | - | - | {reason(case)} | |")
            continue
        number = places.setdefault(worker_runs.place(case), len(places) + 1)
        low, high = case["step_seconds_quartiles"]
        lines.append(
            f"{name} {case['step_seconds_median']:.3f} ({low:.3f} to {high:.3f}) | {case['tokens_per_second']:,.0f} "
            f"| {case['tokens_per_step']:,.0f} ({case['supervised_tokens_per_step']:,.0f}) | {memory(case)} "
            f"| {case['first_step_seconds']:.1f} s | {path(case)} | [{number}] |"
        )
    named = dict.fromkeys(case["workload"] for case in cases)
    workloads = [f"{name}: {WORKLOADS[name].about}" for name in named]
    return "\n".join([*lines, "", *workloads, "", *(f"[{number}] {place}" for place, number in places.items())])


def reason(case: dict[str, Any]) -> str:
    """Why it failed, in one line; the file keeps the whole of it."""
    lines = case["failed"].splitlines()
    return (lines[-1] if len(lines) > 1 else lines[0])[:160].replace("|", "/")


def memory(case: dict[str, Any]) -> str:
    if case["peak_allocated_bytes"] is None:
        return f"host {case['peak_host_bytes'] / GIB:.2f}"
    return f"{case['peak_allocated_bytes'] / GIB:.2f} (reserved {case['peak_reserved_bytes'] / GIB:.2f})"


def path(case: dict[str, Any]) -> str:
    """What ran, in a few words: of a sentence its part before the colon."""
    if isinstance(case["path"], str):
        return case["path"]
    parts = [
        value.partition(":")[0] if isinstance(value, str) else f"{name} {value}" for name, value in case["path"].items()
    ]
    return ", ".join(parts)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", default="8b", help="of random_models.py")
    made.add_argument("--model-folder", type=Path, help="where the random model lies, or is written the first time")
    made.add_argument("--workloads", nargs="+", default=["W1", "W2", "ratio"], choices=[*WORKLOADS, "ratio"])
    made.add_argument("--arms", nargs="+", default=[*OURS, *OTHERS], choices=[*OURS, *OTHERS])
    made.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--warmup", type=int, default=5, help="first steps that no figure of speed counts")
    made.add_argument("--limit", type=float, default=300, help="seconds that one measurement may take")
    made.add_argument("--missing", action="store_true", help="measure only what --out does not hold yet")
    made.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    made.add_argument("--out", type=Path, default=Path("training-benchmark.json"))
    made.add_argument("--plot", type=Path, metavar="JSON", help="only print the table of this file and draw its figure")
    return made


def main() -> None:
    options = parser().parse_args()
    if options.plot:
        report(options.plot)
        return
    device = worker_runs.choose_device(options.device)
    folder = options.model_folder or Path(tempfile.gettempdir(), f"qlora-lab-random-{options.shape}")
    with worker_runs.device_alone(device):
        worker_runs.model_in(folder, options.shape)
        for case in chosen_cases(options):
            if options.missing and not worker_runs.read(options.out, KIND).get(case.key, {"failed": True})["failed"]:
                continue
            used = worker_runs.used_before(device)
            if used and used > BUSY_BYTES:
                print(f"{used / GIB:.1f} GiB of the GPU are in use by others: timings mean little", file=sys.stderr)
            found = measure(case, folder, device=device, limit_seconds=options.limit) | {"used_before_bytes": used}
            found |= {"measured_at": time.strftime("%Y-%m-%d %H:%M:%S")}
            entry = vars(case) | found | summary(found, case.warmup)
            worker_runs.keep(options.out, KIND, case.key, entry)
            print(f"{case.key}: {reason(found) if found['failed'] else 'measured'}", file=sys.stderr, flush=True)
    report(options.out)


def report(out: Path) -> None:
    cases = worker_runs.read(out, KIND)
    print(table(list(cases.values())))
    print("\n" + write_ratio_figure(cases.values(), out.with_suffix(".html")))


if __name__ == "__main__":
    main()
