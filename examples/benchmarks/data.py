"""How long it takes to inspect a million rows and to prepare 52,000, and in how much memory; each in a process of its own.

`python examples/benchmarks/data.py` from the project's folder. The rows are made here, from words, with lengths like those of
Stanford Alpaca: lognormal, with a median of about 60 words.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "time person year way day thing man world life hand part child eye woman place work week case point government company "
    "number group problem fact be have do say get make go know take see come think look want give use find tell ask work seem "
    "feel try leave call good new first last long great little own other old right big high different small large next early"
)


def make_rows(path: Path, rows: int, *, row_bytes: int | None = None, seed: int = 0) -> None:
    """Alpaca columns; with `row_bytes`, each row about that long. One in a thousand is damaged, one in a hundred a duplicate."""
    draw = random.Random(seed)
    text = " ".join(draw.choices(WORDS.split(), k=20_000))
    last = ""
    with path.open("w") as file:
        for number in range(rows):
            size = row_bytes - 90 if row_bytes else min(3000, int(draw.lognormvariate(5.5, 0.8)))
            # Pieces, so that rows share words and not much more.
            begins = [draw.randrange(len(text) - 40) for _ in range(size // 40 + 2)]
            pieces = [text[begin : begin + 40] for begin in begins]
            row = {"instruction": f"Question {number}: {pieces[0]}?", "input": "", "output": "".join(pieces[1:])[:size]}
            line = json.dumps(row)
            if number % 1000 == 500:
                line = "{damaged"
            elif number % 100 == 99:
                line = last
            last = line
            file.write(line + "\n")


def timed(*arguments: str) -> tuple[float, float, dict]:
    """(seconds, peak MiB, what it printed) of `python -m qlora_core ARGUMENTS --json`."""
    begun = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", "qlora_core", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - begun
    # Of the largest child so far: commands run in the order of their size.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, json.loads(finished.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large file, of about 1,000 bytes each")
    parser.add_argument("--small-rows", type=int, default=52_002, help="rows of the file that is prepared")
    parser.add_argument("--base-model", default="bundled", help="model whose tokenizer is used")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large, small, home = Path(folder, "large.jsonl"), Path(folder, "small.jsonl"), str(Path(folder, "home"))
        make_rows(large, options.rows, row_bytes=1000)
        make_rows(small, options.small_rows)
        seconds, mebibytes, report = timed("inspect", str(large))
        assert report["rows"] + report["bad_rows"] == options.rows
        print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
        print(
            f"inspect {options.rows:,} rows, {large.stat().st_size / 1e9:.2f} GB: {seconds:.1f} s, peak {mebibytes:.0f} MiB; "
            f"{report['bad_rows']:,} problems, {report['duplicate_rows']:,} duplicates"
        )
        prepare = ("prepare", str(small), "--out", str(Path(folder, "set")), "--skip-bad-rows", "--tokenise")
        prepare = (*prepare, "--base-model", options.base_model)
        for what in ("prepare and tokenise", "the same again"):
            seconds, _, made = timed(*prepare)
            rows = made["lineage"]["rows"]
            print(
                f"{what}, {options.small_rows:,} rows: {seconds:.1f} s; {rows['train']:,} + {rows['eval']:,} rows kept"
            )
        seconds, mebibytes, report = timed("inspect", str(large), "--near-duplicates", "0.8", "--home", home)
        near = report["near_duplicates"]
        print(
            f"near duplicates of {options.rows:,} rows: {near['seconds']:.0f} s, {near['count']:,} found; peak {mebibytes:.0f} MiB"
        )


if __name__ == "__main__":
    main()
