"""A template that somebody typed, tried on a dataset's rows in a process with little time and memory.

Jinja's sandbox keeps a template from reaching anything, not from taking all day: the page fills one only after its trial.
"""

import json
import resource
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from qlora_core.config import TEMPLATES
from qlora_core.data.inspected import Inspected
from qlora_core.data.sample import SAMPLED_ROWS
from qlora_core.errors import ConfigError
from qlora_core.tokens import load_tokenizer, render_many

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 20, 60, 6_000_000_000
REMEMBERED = 64
_TRYING = threading.Lock()


def check_trial(template: str, tokenizer_folder: Path, rows: Inspected) -> None:
    """Raises ConfigError where a typed template takes too long or too much for the rows that the page looks at."""
    if template in TEMPLATES:
        return
    with _TRYING:  # several parts of the page ask at once, and one trial answers all
        passes = _passes(template, tokenizer_folder, rows.folder)
    if not passes:
        raise ConfigError(
            f"template: takes more than {CPU_SECONDS} s, or {MEMORY_BYTES / 1e9:.0f} GB, for {SAMPLED_ROWS:,} rows; does a loop "
            "never end, or repeat the text?"
        )


@lru_cache(maxsize=REMEMBERED)
def _passes(template: str, tokenizer_folder: Path, rows_folder: Path) -> bool:
    told = json.dumps({"template": template, "tokenizer": str(tokenizer_folder), "rows": str(rows_folder)})
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "qlora_core.template_trial"],
            input=told, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=WALL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return finished.returncode == 0


def main() -> None:
    """The child: fills the template for the rows that the page will; what it refuses in words is no failure."""
    told = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        tokenizer = load_tokenizer(Path(told["tokenizer"]), told["template"])
    except ConfigError:  # it does not parse, which the page finds out by itself
        return
    rows = Inspected(Path(told["rows"]))
    numbers = dict.fromkeys([*range(1, min(len(rows), SAMPLED_ROWS) + 1), *([rows.longest()] if len(rows) else [])])
    for _ in render_many(map(rows.row, numbers), tokenizer):
        pass


if __name__ == "__main__":
    main()
