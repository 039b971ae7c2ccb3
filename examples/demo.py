"""`make demo`: fine-tune the bundled model on the example tickets with LoRA and with QLoRA, and print what was measured.

Each run goes through the command line, so through the same worker process as the app; every figure of the table is
read from the runs' result.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
GIB = 1024**3


def main() -> int:
    begin = time.monotonic()
    results = {}
    for method in ("lora", "qlora"):
        print(f"\n{method}: python -m qlora_core train --config examples/{method}.yaml", file=sys.stderr)
        command = [sys.executable, "-m", "qlora_core", "train", "--config", str(EXAMPLES / f"{method}.yaml"), "--json"]
        finished = subprocess.run(command, cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            return finished.returncode
        results[method] = json.loads(finished.stdout)["result"]
    print(table(results))
    print(
        f"\n{time.monotonic() - begin:.0f} s in all. Look at both runs, or train on your own data, in the app:\n\n  make app\n"
    )
    return 0


def table(results: dict[str, dict[str, Any]]) -> str:
    """One column a method, one line a figure; lines that hold for no method (GPU memory on a CPU) are left out."""
    lines = [("", *(f"{method.upper().replace('LORA', 'LoRA')}" for method in results))]
    for label, value in FIGURES:
        cells = [value(result["train_info"]) for result in results.values()]
        if any(cells):
            lines.append((label, *(cell or "-" for cell in cells)))
    info = next(iter(results.values()))["run_info"]
    packages = ", ".join(
        f"{name} {info['packages'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    rows = "\n".join(f"{line[0]:42}" + "".join(f"{cell:>24}" for cell in line[1:]) for line in lines)
    base = f"{info['base_model']['name']}, {info['base_model']['origin']}"
    return f"\n{base}; {info['compute_dtype']} on {info['device']}; {packages}\n\n{rows}"


def _gib(name: str) -> Any:
    return lambda train: None if train[name] is None else f"{train[name] / GIB:.2f} GiB"


def _score(place: int) -> Any:
    def text(train: dict[str, Any]) -> str | None:
        if not train["scores"]:
            return None
        score = train["scores"][place]
        low, high = score["interval_95"]
        return f"{score['correct']}/{score['total']}  [{low:.0%}, {high:.0%}]"

    return text


FIGURES = (
    ("peak GPU memory allocated", _gib("peak_allocated_bytes")),
    ("peak GPU memory reserved", _gib("peak_reserved_bytes")),
    ("peak host memory of the process, training", _gib("peak_host_bytes")),
    ("peak host memory of the process, loading", _gib("load_peak_host_bytes")),
    ("step time, median", lambda train: f"{train['step_seconds_median']:.2f} s"),
    ("tokens per second", lambda train: f"{train['tokens_per_second']:.0f}"),
    ("evaluation loss before", lambda train: f"{train['eval_losses'][0]['loss']:.3f}"),
    ("evaluation loss after", lambda train: f"{train['eval_losses'][-1]['loss']:.3f}"),
    ("tickets right before, 95 % interval", _score(0)),
    ("tickets right after, 95 % interval", _score(-1)),
    ("trainable parameters", lambda train: f"{train['trainable_parameters']:,}"),
    ("adapter", lambda train: f"{train['adapter_bytes'] / 1024**2:.1f} MiB"),
)

if __name__ == "__main__":
    sys.exit(main())
