"""Every config in examples/ trains, and the demo's table is made from what such runs measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from tiny_models import model_folder

from qlora_core.cli import main
from qlora_core.config import TrainConfig
from qlora_core.data.rows import Example, Message
from qlora_core.settings import Settings
from qlora_core.tokens import load_tokenizer, render
from qlora_core.worker.loading import load_base

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))


def run_example(config: Path, base_model: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    arguments = [
        "--base-model",
        str(base_model),
        "--max-steps",
        "3",
        "--score-rows",
        "4",
        "--score-max-new-tokens",
        "4",
    ]
    assert main(["train", "--config", str(config), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["result"]


def demo_table(results: dict[str, dict]) -> str:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo.table(results)


def test_the_two_configs_differ_in_method_and_name_alone() -> None:
    lora, qlora = (yaml.safe_load((EXAMPLES / f"{method}.yaml").read_text()) for method in ("lora", "qlora"))
    assert {name for name in lora if lora[name] != qlora[name]} == {"method", "name"}
    assert lora.keys() == qlora.keys()


def test_every_config_trains_and_the_table_shows_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QLORA_LAB_LOCKS", str(tmp_path / "locks"))
    base_model = model_folder()
    results = {path.stem: run_example(path, base_model, capsys) for path in CONFIGS}
    assert set(results) == {"lora", "qlora"}
    table = demo_table(results)
    for method, result in results.items():
        train = result["train_info"]
        assert result["run_info"]["config"]["method"] == method
        assert f"{train['eval_losses'][-1]['loss']:.3f}" in table
        assert f"{train['peak_host_bytes'] / 1024**3:.2f} GiB" in table
    assert "0/4  [0%, 49%]" in table


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_lifts_the_score_outside_the_bases_interval(tmp_path: Path) -> None:
    """The real thing, about ten minutes on two cores, with the bundled model that `make` has fetched."""
    assert (Settings.from_environment().models / "SmolLM2-135M-Instruct").is_dir(), "run `make model` first"
    finished = subprocess.run([sys.executable, str(EXAMPLES / "demo.py")], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    after = [line for line in finished.stdout.splitlines() if line.startswith("tickets right after")]
    correct = [int(cell.split("/")[0]) for cell in after[0].split() if "/" in cell]
    assert len(correct) == 2 and min(correct) > 4, finished.stdout  # 0 of 40 has an interval of [0, 3.5]


def test_configs_name_only_settings_that_differ_from_the_defaults_or_say_why_they_stand() -> None:
    """A config that repeats a default would hide a later change of it."""
    shown = {"method", "rank", "base_model"}  # what a reader looks for first
    for path in CONFIGS:
        values, default = yaml.safe_load(path.read_text()), TrainConfig().to_json()
        repeated = {name for name, value in values.items() if default[name] == value} - shown
        assert not repeated, f"{path.name}: {sorted(repeated)}"


def test_the_benchmark_of_data_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "data.py"), "--rows", "2000", "--small-rows", "300"]
    finished = subprocess.run(
        [*command, "--base-model", str(model_folder())],
        cwd=ROOT, env=os.environ | {"QLORA_LAB_HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "inspect 2,000 rows" in finished.stdout and "2 problems, 20 duplicates" in finished.stdout
    assert "the same again, 300 rows" in finished.stdout and "near duplicates of 2,000 rows" in finished.stdout


def test_a_random_model_is_written_and_a_row_of_words_has_a_token_each(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "random_models.py"), "tiny", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "tiny: 0.00 GiB in 4 files" in finished.stdout
    example = Example(1, (Message("user", "w1 " * 40), Message("assistant", "w1019 " * 60)))
    rendered = render(example, load_tokenizer(tmp_path))
    assert (len(rendered.token_ids), rendered.supervised.sum()) == (104, 61)
    model = load_base(tmp_path, TrainConfig(method="lora"), device=torch.device("cpu"), dtype="bf16")
    assert model.num_parameters() == 1_443_072 and model.dtype == torch.bfloat16


def run_benchmark(name: str, *options: str, folder: Path) -> str:
    """What it printed on the CPU, with the tiny random model."""
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "benchmarks" / name), *options],
        cwd=ROOT, env=os.environ | {"QLORA_LAB_LOCKS": str(folder / "locks"), "TMPDIR": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def test_the_benchmark_of_training_measures_each_arm_on_the_same_rows_and_draws_the_ratio(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    size = ["--shape", "tiny", "--device", "cpu", "--steps", "2", "--warmup", "1", "--out", str(out)]
    for arm in ("ours", "trainer"):  # two commands, one file
        printed = run_benchmark("training.py", *size, "--workloads", "W2", "--arms", arm, folder=tmp_path)
    printed = run_benchmark("training.py", *size, "--workloads", "W2", "--arms", "unsloth", folder=tmp_path)
    cases = json.loads(out.read_text())["cases"]
    measured = {f"tiny/W2/{method}/{arm}" for method in ("lora", "qlora") for arm in ("ours", "trainer")}
    assert measured == {key for key, case in cases.items() if not case["failed"]}
    assert len({tuple(step["tokens"] for step in cases[key]["steps"]) for key in measured}) == 1
    assert len({tuple(step["supervised_tokens"] for step in cases[key]["steps"]) for key in measured}) == 1
    for key in measured:
        case = cases[key]
        assert case["tokens_per_second"] > 0 and case["first_step_seconds"] > 0 and case["peak_host_bytes"] > 0
        assert case["device"].startswith("CPU") and case["packages"]["torch"] and case["path"]
        assert f"| {case['step_seconds_median']:.3f} (" in printed
    if importlib.util.find_spec("unsloth") is None:
        assert "| tiny | W2 | unsloth | qlora | - | - | - | - | - | not installed here: unsloth" in printed

    at_512 = {key.replace("W2", "T512"): cases[key] | {"workload": "T512"} for key in measured}
    out.write_text(json.dumps({"cases": at_512}))
    assert "Figure of the ratio" in run_benchmark("training.py", "--plot", str(out), folder=tmp_path)
    page = out.with_suffix(".html").read_text()
    assert "ours, tiny" in page and "trainer, tiny" in page


def test_the_benchmark_of_memory_sets_the_estimate_beside_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    printed = run_benchmark("memory.py", "--shapes", "tiny", "--device", "cpu", "--out", str(out), folder=tmp_path)
    entries = json.loads(out.read_text())["configurations"]
    assert set(entries) == {"tiny/lora/r8/none/W2", "tiny/qlora/r8/none/W2"}
    assert all(not e["failed"] and len(e["steps"]) == 3 and len(e["row_lengths"]) == 16 for e in entries.values())
    assert printed.count("| smoke test | tiny |") == 2 and "Largest difference, smoke test: " in printed
    # The file alone is enough, on a machine that has no model.
    assert run_benchmark("memory.py", "--compare", str(out), folder=tmp_path) == printed


def test_the_benchmark_of_adapters_compares_two_and_tells_seconds_and_memory(tmp_path: Path) -> None:
    printed = run_benchmark("adapters.py", "--shape", "tiny", "--rank", "8", folder=tmp_path)
    assert "tiny, rank 8, all linear layers" in printed and "14 modules, cosine 0.91" in printed
    assert "compared: " in printed and "peak of the process: " in printed


def test_every_example_is_listed_in_their_readme() -> None:
    told = (EXAMPLES / "README.md").read_text()
    files = [path for kind in ("*.py", "*.yaml", "*.jsonl") for path in EXAMPLES.rglob(kind)]
    assert not [name for path in files if f"`{(name := str(path.relative_to(EXAMPLES)))}`" not in told]


def test_the_benchmark_of_large_models_keeps_no_shard(tmp_path: Path) -> None:
    (shards := tmp_path / "shards").mkdir()
    out = tmp_path / "result.json"
    options = ["--shape", "tiny", "--device", "cpu", "--tokens", "16", "40", "--set", "learning_rate=1e-3"]
    printed = run_benchmark("large_models.py", *options, "--shards", str(shards), "--out", str(out), folder=tmp_path)
    result = json.loads(printed)
    assert result == json.loads(out.read_text()) and not list(shards.iterdir())
    assert [run["tokens"] for run in result["runs"]] == [16, 40] and result["config"]["learning_rate"] == 1e-3
    assert all(len(run["step_seconds"]) == 2 and run["steps"]["peak_host_gib"] > 0 for run in result["runs"])
