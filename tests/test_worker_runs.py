"""Whole runs: what a finished one leaves, and that stops, kills and damaged checkpoints change no bit of the result."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import wait_for
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import (
    CHATML,
    StopAfter,
    adapter_bytes,
    dataset,
    eval_losses,
    losses,
    make_run,
    said,
    train_here,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core import events, queue
from qlora_core.data.stored import read_stored
from qlora_core.errors import TrainingError
from qlora_core.run_status import CRASHED, FAILED, FINISHED, RUNNING, STOPPED
from qlora_core.runs import Run, RunStore
from qlora_core.token_cache import make_table
from qlora_core.tokens import load_tokenizer, render
from qlora_core.worker import checkpoints
from qlora_core.worker.batches import Row
from qlora_core.worker.evaluation import evaluation_loss

# Long enough that a kill or stop after the second checkpoint always comes before the end.
PROCESS = {"max_steps": 60, "eval_steps": 30, "save_steps": 2, "lora_dropout": 0.1}
SHORT = {"max_steps": 8, "eval_steps": 4, "save_steps": 2, "lora_dropout": 0.1, "keep_checkpoints": 3}


def start(run: Run) -> None:
    queue.add(run)
    assert [started.run_id for started in queue.start_next(run.settings)] == [run.run_id]


def start_when_free(run: Run) -> None:
    """As the page's timer does: a worker that has just ended may hold the device a moment longer."""
    wait_for(lambda: queue.start_next(run.settings) or run.queue_place() is None)


def wait_until_over(run: Run) -> str:
    wait_for(lambda: run.status().state != RUNNING, seconds=120)
    return run.status().state


def wait_for_event(run: Run, kind: type[events.Event], *, step: int) -> None:
    wait_for(lambda: run.status().state != RUNNING or any(e.step >= step for e in said(run, kind)), seconds=120)
    assert run.status().state == RUNNING, run.log_tail()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """By a real worker, started as the page starts it."""
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), **PROCESS)
    start(run)
    assert wait_until_over(run) == FINISHED, run.log_tail()
    return run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("short"), **SHORT))


def assert_same_end(run: Run, undisturbed: Run) -> None:
    assert run.status().state == FINISHED
    assert losses(run) == losses(undisturbed)
    assert eval_losses(run) == eval_losses(undisturbed)
    assert adapter_bytes(run) == adapter_bytes(undisturbed)


# -- a finished run


def test_the_adapter_loads_on_the_base_and_gives_the_recorded_loss(uninterrupted: Run) -> None:
    run = uninterrupted
    tokenizer = load_tokenizer(run.adapter)
    rows = list(Row.all_of(make_table(read_stored(run.path / "dataset" / "eval.jsonl"), tokenizer), 512))
    base = AutoModelForCausalLM.from_pretrained(run.base_model().folder, dtype=torch.float32)
    for step, load in ((0, lambda: base), (60, lambda: PeftModel.from_pretrained(base, run.adapter))):
        found, tokens = evaluation_loss(load(), rows, token_budget=64, packed=False, device=torch.device("cpu"))
        assert found == pytest.approx(eval_losses(run)[step], abs=1e-5)
        assert tokens == said(run, events.Evaluation)[0].tokens
    assert eval_losses(run)[60] < eval_losses(run)[0] - 0.3


def test_the_adapter_brings_tokenizer_and_template_but_no_path(uninterrupted: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted.adapter)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    settings = json.loads((uninterrupted.adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == uninterrupted.base_model().name
    assert not [
        path for path in uninterrupted.adapter.iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")
    ]


def test_result_json_says_what_ran_how_fast_and_how_good(uninterrupted: Run) -> None:
    result = uninterrupted.result()
    assert result is not None and result.keys() == {"run_info", "train_info", "meta_info"}
    ran, found, meta = result["run_info"], result["train_info"], result["meta_info"]
    assert ran["config"] == uninterrupted.config().to_json()
    assert len(ran["base_model"]["weights_sha256"]) == 64 and ran["packages"]["torch"] == torch.__version__
    assert (
        ran["compute_dtype"] == "fp32"
        and ran["device"].startswith("CPU")
        and ran["path"]["packed"].startswith("packed")
    )
    assert (found["steps"], found["total_steps"], found["train_rows"], found["eval_rows"]) == (60, 60, 12, 5)
    assert [e["step"] for e in found["eval_losses"]] == [0, 30, 60]
    assert found["train_loss"] == losses(uninterrupted)[-1]
    assert found["peak_allocated_bytes"] is None and found["peak_host_bytes"] > 10**8
    assert found["tokens_per_second"] > 0 and found["step_seconds_median"] > 0
    planned = said(uninterrupted, events.Started)[0]
    assert (
        planned.estimated_parts["weights"] > 0 and sum(planned.estimated_parts.values()) == planned.estimated_peak_bytes
    )
    weights = load_file(uninterrupted.adapter / "adapter_model.safetensors")
    assert found["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert (meta["ended"], meta["attempts"]) == ("finished", 1)


def test_every_step_is_told_with_its_numbers(uninterrupted: Run) -> None:
    steps = said(uninterrupted, events.Step)
    assert [event.step for event in steps] == list(range(1, 61))
    assert [event.epoch for event in steps[:3]] == pytest.approx([1 / 3, 2 / 3, 1])
    epoch = steps[:3]
    tokenizer = load_tokenizer(uninterrupted.adapter)
    rendered = [render(e, tokenizer) for e in read_stored(uninterrupted.path / "dataset" / "train.jsonl")]
    assert sum(event.tokens for event in epoch) == sum(len(row.token_ids) for row in rendered)
    assert sum(event.supervised_tokens for event in epoch) == sum(row.supervised_tokens(512) for row in rendered)
    assert all(event.peak_allocated_bytes is None and event.peak_host_bytes for event in steps)


def test_the_newest_checkpoints_and_the_best_are_kept(uninterrupted: Run) -> None:
    found = eval_losses(uninterrupted)
    assert min(found, key=found.get) == 30, "the run overfits, so that its best step is not among the last"
    kept = checkpoints.list_checkpoints(uninterrupted.path / "checkpoints")
    assert [path.name for path in kept] == ["checkpoint-60", "checkpoint-58", "checkpoint-30"]


# -- processes that are stopped, killed, or break


def test_a_stopped_worker_saves_and_resumes_to_the_same_bits(uninterrupted: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, **PROCESS)
    start(run)
    wait_for_event(run, events.Step, step=3)
    assert run.request_stop() == "saving and stopping after the current step"
    assert wait_until_over(run) == STOPPED
    stopped = run.status()
    assert 3 <= stopped.step < 60 and stopped.checkpoint_step == stopped.step
    assert stopped.detail == f"saved at step {stopped.step}"
    wait_for(lambda: not (run.path / "stop").exists())
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert run.result()["meta_info"]["ended"] == "stopped"
    queue.resume(run)
    start_when_free(run)
    assert wait_until_over(run) == FINISHED, run.log_tail()
    assert_same_end(run, uninterrupted)
    assert run.result()["meta_info"]["attempts"] == 2


def test_a_killed_worker_is_a_crash_and_resumes_to_the_same_bits(uninterrupted: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, **PROCESS)
    start(run)
    wait_for_event(run, events.Checkpoint, step=4)
    os.kill(int((run.path / "lock").read_text()), signal.SIGKILL)
    assert wait_until_over(run) == CRASHED
    crashed = run.status()
    assert f"can be resumed from step {crashed.checkpoint_step}" in crashed.detail
    assert not run.adapter.exists() and run.result() is None
    queue.resume(run)
    start_when_free(run)
    assert wait_until_over(run) == FINISHED, run.log_tail()
    assert said(run, events.Resumed)[0].from_step >= 4
    assert_same_end(run, uninterrupted)


def test_a_worker_that_breaks_leaves_its_traceback_and_one_that_fails_its_reason(tmp_path: Path) -> None:
    """Two runs in one queue. A crash cannot start the next worker; whoever is alive does."""
    broken = make_run(tmp_path, name="broken")
    failing = make_run(tmp_path, name="failing", target_modules="c_attn")
    (broken.path / "dataset" / "train.jsonl").unlink()
    queue.add(broken)
    queue.add(failing)
    assert queue.start_next(broken.settings) == [broken]
    assert wait_until_over(broken) == CRASHED
    assert "FileNotFoundError" in broken.log_tail()
    start_when_free(failing)
    wait_for(lambda: failing.status().state == FAILED, seconds=120)
    assert "no linear layer c_attn; name other layers of down_proj" in failing.status().detail
    assert "failed: " in failing.log_tail() and "Traceback" not in failing.log_tail()
    assert RunStore(broken.settings).get(broken.run_id).status().step == 0


@pytest.mark.slow
def test_killed_at_any_moment_it_always_resumes_to_the_same_bits(uninterrupted: Run, tmp_path: Path) -> None:
    """Kills at ever later steps, the resumed worker included."""
    run = make_run(tmp_path, **PROCESS)
    queue.add(run)
    for step in (1, 7, 20, 33, 48):
        start_when_free(run)
        wait_for_event(run, events.Step, step=step)
        os.kill(int((run.path / "lock").read_text()), signal.SIGKILL)
        assert wait_until_over(run) == CRASHED
        queue.resume(run)
    start_when_free(run)
    assert wait_until_over(run) == FINISHED, run.log_tail()
    assert_same_end(run, uninterrupted)


# -- the same in this process, at chosen steps


def test_a_stop_is_answered_within_an_evaluation_and_what_it_left_out_is_made_up(tmp_path: Path) -> None:
    """Answering or evaluating may take minutes; the stop does not wait for its end, and no figure is lost for good."""

    class StopInTheEvaluation:
        def __bool__(self) -> bool:
            return any(getattr(event, "name", "").startswith("evaluating") for event in said(run, events.Phase)[-1:])

    run = make_run(tmp_path, **SHORT)
    train_here(run, StopInTheEvaluation())
    assert (run.status().state, run.status().step, said(run, events.Evaluation)) == (STOPPED, 0, [])
    train_here(run)
    assert eval_losses(run).keys() == {0, 4, 8}


@pytest.mark.parametrize("step", [0, 1, 4, 7])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(step: int, short: Run, tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **SHORT), StopAfter(step))
    assert (run.status().state, run.status().step) == (STOPPED, step)
    assert (run.path / "checkpoints" / f"checkpoint-{step}" / "manifest.json").exists() and run.adapter.exists()
    assert_same_end(train_here(run), short)
    assert [event.step for event in said(run, events.Evaluation)] == [0, 4, 8]


def test_a_quantised_run_stopped_twice_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    values = SHORT | {"method": "qlora", "compute_dtype": "bf16", "packing": "off"}
    whole = train_here(make_run(tmp_path / "whole", **values))
    run = train_here(make_run(tmp_path / "stopped", **values), StopAfter(3))
    train_here(run, StopAfter(2))
    assert run.status().step == 5
    assert_same_end(train_here(run), whole)


def test_a_stop_right_after_a_checkpoint_does_not_replace_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, **(SHORT | {"keep_checkpoints": 1}))
    train_here(run, StopAfter(4))
    before = (run.path / "checkpoints" / "checkpoint-4").stat()
    train_here(run, StopAfter(0))
    after = (run.path / "checkpoints" / "checkpoint-4").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_scores_and_evaluations_are_told_once_whatever_happened_between(tmp_path: Path) -> None:
    run = make_run(tmp_path, **SHORT, score="exact", score_rows=3, score_max_new_tokens=4)
    train_here(run, StopAfter(0))
    shutil.rmtree(run.path / "checkpoints")  # as after a kill before the first one
    train_here(run, StopAfter(5))
    train_here(run)
    assert [event.step for event in said(run, events.Score)] == [0, 8]
    assert [event.step for event in said(run, events.Evaluation)] == [0, 4, 8]
    assert len(said(run, events.Step)) == 8
    answers = json.loads((run.path / "answers-8.json").read_text())
    assert [answer["reference"] for answer in answers] == [row["completion"] for row in dataset(5, seed=2)[:3]]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the adapter": lambda folder: flip_a_byte(folder / "adapter.safetensors"),
    "a cut optimizer state": lambda folder: os.truncate(folder / "state.pt", 100),
    "a missing file": lambda folder: (folder / "state.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_by_name(damage: str, short: Run, tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **SHORT), StopAfter(6))
    folder = run.path / "checkpoints"
    (folder / "checkpoint-8.partial").mkdir()
    DAMAGE[damage](folder / "checkpoint-6")
    train_here(run)
    resumed = said(run, events.Resumed)[0]
    assert resumed.from_step == 4
    assert len(resumed.skipped) == 1 and resumed.skipped[0].startswith("checkpoint-6 skipped: ")
    assert not (folder / "checkpoint-8.partial").exists()
    assert_same_end(run, short)


def test_a_damaged_newer_checkpoint_never_crowds_out_a_sound_one(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **(SHORT | {"keep_checkpoints": 1, "eval_steps": 8})), StopAfter(6))
    flip_a_byte(run.path / "checkpoints" / "checkpoint-6" / "adapter.safetensors")
    train_here(run, StopAfter(2))
    assert [path.name for path in checkpoints.list_checkpoints(run.path / "checkpoints")] == ["checkpoint-2"]
    assert train_here(run).status().state == FINISHED
    assert said(run, events.Resumed)[-1].from_step == 2


def test_without_any_sound_checkpoint_it_starts_again(short: Run, tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **SHORT), StopAfter(6))
    for folder in checkpoints.list_checkpoints(run.path / "checkpoints"):
        flip_a_byte(folder / "adapter.safetensors")
    train_here(run)
    resumed = said(run, events.Resumed)[0]
    assert (resumed.from_step, len(resumed.skipped)) == (0, 3)
    assert_same_end(run, short)


# -- a full disk


def no_space(*arguments: Any, **settings: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


REFUSES = {
    "the adapter's file": (checkpoints, "save_file"),
    "the state's file": (torch, "save"),
    "the sync": (checkpoints, "sync"),
}


@pytest.mark.parametrize("where", ["a file that grows too large", *REFUSES])
def test_a_full_disk_fails_with_its_reason_and_leaves_earlier_checkpoints(
    where: str, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = make_run(tmp_path, **SHORT), checkpoints.save

    def save_on_a_full_disk(folder: Path, step: int, **values: Any) -> None:
        if step < 4:
            return save(folder, step, **values)
        if where in REFUSES:
            with monkeypatch.context() as patch:
                patch.setattr(*REFUSES[where], no_space)
                return save(folder, step, **values)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            return save(folder, step, **values)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_on_a_full_disk)
        with pytest.raises(
            TrainingError, match=r"step 4: the checkpoint could not be written .* free disk space, then resume"
        ):
            train_here(run)
    assert run.status().state == FAILED
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["checkpoint-2"]
    train_here(run)
    assert said(run, events.Resumed)[0].from_step == 2
    assert_same_end(run, short)
