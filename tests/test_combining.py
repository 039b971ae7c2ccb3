"""Asking for a combination: what is refused, with which remedy, and the run that is made. Nothing is trained here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import alpaca, run_in, say, settings_in, started, write_rows

from qlora_core import events, queue
from qlora_core.cli import main
from qlora_core.combining import create_combined
from qlora_core.errors import RunError
from qlora_core.run_status import QUEUED
from qlora_core.runs import Run, RunStore

ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "use_rslora": False, "target_modules": ["q_proj", "v_proj"]}


def trained(
    folder: Path, name: str, *, adapter: dict[str, Any] | None = None, weights_sha256: str = "ab" * 32, **config: Any
) -> Run:
    """A run as a worker leaves it, with these words in its adapter_config.json."""
    run = run_in(folder, name=name, **config)
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | (adapter or {})))
    (run.adapter / "adapter_model.safetensors").write_text(name)
    losses = [{"step": 0, "loss": 3.0, "tokens": 9}, {"step": 5, "loss": 1.5, "tokens": 9}, {"step": 9, "loss": 1.7}]
    result = {
        "run_info": {"base_model": {"weights_sha256": weights_sha256}},
        "train_info": {"eval_losses": losses, "adapter_step": 5},
    }
    (run.path / "result.json").write_text(json.dumps(result))
    say(run, events.Launched(attempt=1), started(), events.Finished(step=9))
    return run


@pytest.fixture
def parts(tmp_path: Path) -> list[Run]:
    return [trained(tmp_path, "one"), trained(tmp_path, "two", lora_alpha=4, use_rslora=True)]


def problems(runs: list[Run], weights: list[float], **how: Any) -> list[str]:
    with pytest.raises(RunError) as caught:
        create_combined(runs, weights, **({"method": "svd", "name": "sum"} | how))
    return list(caught.value.problems)


def test_the_new_run_says_what_it_is_made_of(parts: list[Run]) -> None:
    run = create_combined(parts, [0.25, -1], method="svd", name=" both ")
    config = run.config()
    assert (config.name, config.rank, config.alpha, config.adapter_scale) == ("both", 8, 8.0, 1.0)
    assert run.base_model() == parts[0].base_model() and run.dataset() == parts[0].dataset()
    combination = run.combination()
    assert (combination["method"], combination["density"]) == ("svd", None)
    first, second = combination["parts"]
    assert (first["run_id"], first["name"], first["weight"]) == (parts[0].run_id, "one", 0.25)
    assert first["adapter_sha256"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # of "one"
    assert first["eval_loss"] == 1.5, "of the step whose adapter was kept"
    assert second["weight"] == -1.0 and second["same_eval_rows"]
    assert parts[0].combination() is None
    assert create_combined(parts, [1, 1], method="ties", name="x").combination()["density"] == 0.5


def test_the_rank_is_that_of_the_saved_adapters(tmp_path: Path) -> None:
    """A PiSSA run saves twice the rank of its config."""
    runs = [trained(tmp_path, "one", adapter={"r": 16}, rank=8), trained(tmp_path, "two", adapter={"r": 6}, rank=6)]
    assert create_combined(runs, [1, 1], method="svd", name="x").config().rank == 16
    assert create_combined(runs, [1, 1], method="svd", name="x", rank=3).config().rank == 3
    assert create_combined(runs, [1, 1], method="cat", name="x").config().rank == 22
    assert "linear needs adapters of one rank" in problems(runs, [1, 1], method="linear")[0]


def test_other_modules_are_joined(tmp_path: Path) -> None:
    runs = [trained(tmp_path, "one"), trained(tmp_path, "two", adapter={"target_modules": ["up_proj", "q_proj"]})]
    assert create_combined(runs, [1, 1], method="svd", name="x").config().target_modules == (
        "q_proj",
        "up_proj",
        "v_proj",
    )


def test_an_equal_combination_that_waits_is_the_same_run(parts: list[Run]) -> None:
    """A double click starts one."""
    run = create_combined(parts, [1, 2], method="svd", name="x")
    assert create_combined(parts, [1, 2], method="svd", name="x") == run
    queue.add(run)
    assert run.status().state == QUEUED
    assert create_combined(parts, [1, 2], method="svd", name="x") == run
    assert create_combined(parts, [2, 1], method="svd", name="x") != run
    assert create_combined(parts, [1, 2], method="cat", name="x") != run
    assert not list(run.path.parent.glob(".creating-*"))


def test_numbers_that_cannot_be_are_named_together(parts: list[Run]) -> None:
    found = problems([parts[0]], [math.nan, 1], method="svd", name=" ", density=0.5, rank=0)
    assert [text.partition(";")[0] for text in found] == [
        "the combination has no name",
        "there is 1 run to combine",
        "2 weights for 1 runs",
        "weights are nan, 1",
        "density is 0.5, but svd drops no entries",
        "rank is 0",
    ]
    assert all("; " in text for text in found), "each has a remedy"


@pytest.mark.parametrize(
    ("weights", "how", "expected"),
    [
        ([0, 0], {}, "all weights are 0"),
        ([math.inf, 1], {}, "weights are inf, 1; each must be a finite number"),
        ([1, 1], {"method": "average"}, "method is 'average'; choose one of svd, cat, linear"),
        ([1, 1], {"method": "ties", "density": 0}, "density is 0; it must be above 0"),
        ([1, 1], {"method": "ties", "density": math.nan}, "density is nan; it must be above 0"),
        ([1, 1], {"method": "ties", "rank": 4}, "rank is 4, but ties has the rank that its parts give it"),
        ([1, 1], {"rank": 5000}, "rank is 5000; it must be at least 1 and at most 1024"),
    ],
)
def test_wrong_numbers(parts: list[Run], weights: list[float], how: dict[str, Any], expected: str) -> None:
    found = problems(parts, weights, **how)
    assert len(found) == 1 and expected in found[0]


def test_runs_that_have_nothing_to_combine(tmp_path: Path, parts: list[Run]) -> None:
    bare, dora = run_in(tmp_path, name="bare"), trained(tmp_path, "dora", adapter={"use_dora": True})
    say(bare, events.Launched(attempt=1), events.Failed(step=0, reason="memory"))
    waiting = run_in(tmp_path, name="waiting")
    queue.add(waiting)
    found = problems([parts[0], parts[0], bare, dora, waiting], [1] * 5)
    assert [text.split(": ", 1) for text in found] == [
        [parts[0].run_id, "is named twice; add its weights up instead"],
        [bare.run_id, "has no adapter; train it to its end, or leave it out"],
        [dora.run_id, "is a DoRA adapter, whose magnitudes PEFT cannot combine; leave it out, or merge it instead"],
        [waiting.run_id, "is queued; combine it when it has ended, or stop it first"],
    ]


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    """Bases, precision, ranks and kinds of modules, all at once; what is told names each run and its value."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    one = trained(tmp_path, "one")
    two = trained(
        tmp_path, "two", base_model=str(other), method="qlora", adapter={"r": 4, "target_modules": ".*_proj"}
    )  # fmt: skip
    found = problems([one, two], [1, 1], method="ties")
    assert [text.partition(":")[0] for text in found[:2]] == [
        "the runs have different bases",
        "the runs have different methods",
    ]
    assert f"{one.run_id} tiny, {two.run_id} other" in found[0]
    assert f"{one.run_id} lora (16-bit base), {two.run_id} qlora (nf4, double quantisation)" in found[1]
    assert "ties needs adapters of one rank" in found[2] and "target modules" in found[3] and len(found) == 4


def test_bases_of_one_name_must_have_the_same_weights(tmp_path: Path, parts: list[Run]) -> None:
    changed = trained(tmp_path, "three", weights_sha256="cd" * 32)
    assert "bases of one name but different weights" in problems([parts[0], changed], [1, 1])[0]


def test_adapters_of_different_templates_do_not_belong_together(tmp_path: Path, parts: list[Run]) -> None:
    other = trained(tmp_path, "three", template="chatml")
    (found,) = problems([parts[0], other], [1, 1])
    assert f"different templates: {parts[0].run_id} model, {other.run_id} chatml; their adapters answer" in found


def test_four_bits_must_be_the_same_four_bits(tmp_path: Path) -> None:
    runs = [trained(tmp_path, kind, method="qlora", quant_type=kind) for kind in ("nf4", "fp4")]
    assert "qlora (fp4, double quantisation)" in problems(runs, [1, 1])[0]


def test_cat_beyond_the_highest_rank(tmp_path: Path) -> None:
    runs = [trained(tmp_path, name, adapter={"r": 600}) for name in ("one", "two")]
    assert "cat adds the ranks up to 1200, above 1024; choose svd" in problems(runs, [1, 1], method="cat")[0]


def test_evaluation_rows_that_any_part_was_trained_on_are_counted(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held.jsonl", [alpaca(n) for n in (100, 101, 102)])
    one = trained(tmp_path, "one", eval_data=str(held_out))
    other = write_rows(tmp_path / "other.jsonl", [alpaca(n) for n in range(101, 110)])
    two = trained(tmp_path, "two", data=str(other))
    run = create_combined([one, two], [1, 1], method="svd", name="x")
    assert run.dataset().eval_rows_also_trained >= 1
    assert "evaluation rows are also training rows" in run.dataset().remarks()[0]
    assert not run.combination()["parts"][1]["same_eval_rows"]


def test_a_part_stays_while_its_combination_is_not_made(parts: list[Run]) -> None:
    run = create_combined(parts, [1, 1], method="svd", name="x")
    queue.add(run)
    store = RunStore(run.settings)
    with pytest.raises(RunError, match=f"needed by {run.run_id}, which could no longer"):
        store.delete(parts[1])
    run.request_stop()
    store.delete(parts[1])
    assert parts[1].run_id not in [known.run_id for known in store.list()]


def test_the_command_names_all_that_is_wrong_and_queues(
    tmp_path: Path, parts: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path)
    monkeypatch.setattr(queue, "start_next", lambda settings: [])
    where = ["--home", str(settings.home), "--out", "both"]
    assert main(["combine", "nope", parts[0].run_id, "--weights", "a,b", *where]) == 2
    assert [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "there is no run 'nope'",
        "weights is 'a,b'",
    ]
    ids = [run.run_id for run in parts]
    how = ["--weights", "0.5,0.5", "--method", "ties", "--density", "0.3", "--detach", "--json"]
    assert main(["combine", *ids, *how, *where]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["name"], status["state"]) == ("both", QUEUED)
    run = RunStore(settings).get(status["run_id"])
    assert (run.combination()["method"], run.combination()["density"]) == ("ties", 0.3)
