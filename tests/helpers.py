"""What several tests of the pure modules share: small files, a model folder without weights, a stand-in for a worker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora_core import events
from qlora_core.config import TrainConfig
from qlora_core.runs import Run, RunStore
from qlora_core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable  # a test may put a stand-in there
# `make test-all` fuzzes 10,000 examples where `make test` does 500.
FUZZED = int(os.environ.get("FUZZED", "500"))
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nTranslate to French.\n\n### Response:\nle renard brun saute",
    "The quick brown fox jumps over the lazy dog\n\n\nand   runs away, 3.14 times.",
)
# What a worker does as far as the queue can see: says that it started, waits, says how it ended.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from qlora_core import events
from tests_helpers_started import STARTED

run, stopped = Path(sys.argv[3]), []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
(run / "environment.json").write_text(json.dumps(dict(os.environ)))
events.append(run / "events.jsonl", events.Started(**STARTED))
deadline = time.monotonic() + 60
while not (run / "end").exists() and not (run / "stop").exists() and not stopped and time.monotonic() < deadline:
    time.sleep(0.005)
how = (run / "end").read_text() if (run / "end").exists() else "Stopped"
if how == "Failed":
    events.append(run / "events.jsonl", events.Failed(step=0, reason="the loss is not finite; lower learning_rate"))
elif how:
    events.append(run / "events.jsonl", getattr(events, how)(step=3))
sys.exit(0 if how == "Finished" else 1)
"""
STARTED: dict[str, Any] = {
    "total_steps": 10,
    "train_rows": 9,
    "eval_rows": 1,
    "rows_cut": 0,
    "rows_left_out": (),
    "device": "CPU",
    "compute_dtype": "fp32",
    "template": "Alpaca template",
    "packed": True,
    "packed_reason": "rows are packed",
    "fused": False,
    "fused_reason": "transformers' layers: on a CPU",
    "checkpointed_layers": 0,
    "offloaded": False,
    "memory_reason": "passes of up to 1,024 tokens, nothing is recomputed",
    "estimated_peak_bytes": 2 * 1024**3,
    "compiled": False,
    "compiled_reason": "not compiled",
    "token_budget": 512,
    "trainable_parameters": 100,
    "load_peak_host_bytes": None,
    "load_peak_allocated_bytes": None,
}


def alpaca(number: int, **changed: Any) -> dict[str, Any]:
    return {"instruction": f"Question {number}?", "input": "", "output": f"Answer {number}."} | changed


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def wait_for(condition: Callable[[], Any], *, seconds: float = 20) -> Any:
    """The condition's first true value; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.005)
    return value


def step(number: int, **changed: Any) -> events.Step:
    values: dict[str, Any] = {
        "epoch": 0.1 * number,
        "loss": 3.0 / number,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "step_seconds": 0.5,
        "tokens": 100,
        "supervised_tokens": 40,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
        "peak_host_bytes": 1000,
    }
    return events.Step(step=number, **(values | changed))


def started(**changed: Any) -> events.Started:
    return events.Started(**(STARTED | changed))


def tokenizer_folder(folder: Path, *, chat_template: str | None = None, trim_offsets: bool | None = None) -> Path:
    """A byte-level BPE as most model folders hold one, with ChatML's marks as special tokens and <|im_end|> as the end."""
    from tokenizers import processors

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    if chat_template:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def model_folder(folder: Path) -> Path:
    """What `models.resolve` accepts as a base model; there are no weights in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    return folder


def settings_in(folder: Path) -> Settings:
    return Settings(home=folder / "home", locks=folder / "locks")


def config_in(folder: Path, **changed: Any) -> TrainConfig:
    """Settings of a run that `RunStore.create` accepts: ten rows and a model without weights, both below `folder`."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", [alpaca(number) for number in range(10)])
    base = TrainConfig(
        data=str(folder / "rows.jsonl"), base_model=str(model_folder(folder / "tiny")), method="lora", device="cpu"
    )
    return replace(base, **changed)


def run_in(folder: Path, **changed: Any) -> Run:
    return RunStore(settings_in(folder)).create(config_in(folder, **changed))


def say(run: Run, *what: events.Event) -> None:
    for event in what:
        events.append(run.events_path, event)


@contextmanager
def held_by_another_process(path: Path, *, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the `flock` of the file, as a worker does, until the block ends or it is killed."""
    mode = "LOCK_SH" if shared else "LOCK_EX"
    code = f"import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.{mode}); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [PYTHON, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


class StandIn:
    """A real process in the worker's place: it inherits the locks and the environment, and trains nothing."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        folder.mkdir(exist_ok=True)
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "tests_helpers_started.py").write_text(f"STARTED = {STARTED!r}\n")
        self.executable = folder / "python"
        self.executable.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{folder}/stand_in.py" "$@"\n')
        self.executable.chmod(0o755)

    def end(self, run: Run, how: str = "Finished") -> None:
        """Let the run's process end and say `how`; an empty text ends it without a word."""
        (run.path / "end.partial").write_text(how)
        (run.path / "end.partial").rename(run.path / "end")
        wait_for(lambda: not run.is_locked())

    def pid(self, run: Run) -> int:
        return int(wait_for((run.path / "lock").read_text))

    def environment(self, run: Run) -> dict[str, str]:
        wait_for(lambda: any(isinstance(event, events.Started) for event in run.events()[0]))
        return json.loads((run.path / "environment.json").read_text())

    def end_all(self) -> None:
        for run in RunStore(self.settings).list():
            if run.is_locked():
                with suppress(ProcessLookupError, ValueError):
                    os.kill(self.pid(run), signal.SIGKILL)


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *uuids: str, driver: str = "550.54", cuda: int = 12040) -> None:
    """The driver of another machine: GPUs of 80 GiB with these UUIDs; without any, no driver is there."""

    def initialise() -> None:
        if not uuids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    memory = SimpleNamespace(total=80 * 1024**3, used=1024**3)
    for name, function in {
        "nvmlInit": initialise,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(uuids),
        "nvmlDeviceGetHandleByIndex": lambda index: uuids[index],
        "nvmlDeviceGetMemoryInfo": lambda handle: memory,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: [9, 0],
        "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlSystemGetCudaDriverVersion": lambda: cuda,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
