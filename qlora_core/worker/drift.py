"""`python -m qlora_core.worker.drift RUN_DIR SCRATCH`: how far each merge is from the model that was trained. Writes drift.json.

Prints how far it is, as lines of JSON. SCRATCH is an empty folder for what it needs meanwhile.
"""

import contextlib
import gc
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from qlora_core import drift, merging
from qlora_core.config import replace
from qlora_core.data.stored import read_stored
from qlora_core.errors import LabError, ModelError, RunError
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.storage import file_sha256, write_json
from qlora_core.tokens import Refused, load_tokenizer, render_many
from qlora_core.worker.architecture import causal_language_model
from qlora_core.worker.batches import Row, forward_logits, make_pass
from qlora_core.worker.hardware import DTYPES, MemoryMeter, choose_device, describe
from qlora_core.worker.loading import load_base
from qlora_core.worker.merging import CPU, computed_in, load_in_nf4, merge_onto

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
POSITIONS = 128  # of which log-probabilities are made at once
Say = Callable[[str, int, int], None]


def measure(run: Run, scratch: Path, say: Say = lambda doing, done, total: None) -> dict[str, Any]:
    """Writes and returns what `drift.read_drift` describes. One model is in memory at a time: what the trained one says lies in
    `scratch`. Raises RunError without a held-out row to measure on, ModelError for losses that are no numbers."""
    found = {"adapter_sha256": file_sha256(run.adapter / "adapter_model.safetensors")}
    device, measured = choose_device(replace(run.config(), device="auto")), None
    try:
        measured = _measured(Measurement(run, scratch, say, device))
    except torch.OutOfMemoryError:  # a card that holds the base in 4 bits need not hold a merge in 16
        if device.type != "cuda":
            raise
    if measured is None:  # outside `except`, whose traceback keeps the tensors of the failed attempt alive
        measured = _measured(Measurement(run, scratch, say, CPU))
    write_json(run.path / drift.DRIFT, found | measured)
    return found | measured


def _measured(measurement: "Measurement") -> dict[str, Any]:
    return {
        "trained": measurement.of_trained(),
        "ways": {way: values for onto in merging.ways(measurement.run) for way, values in measurement.of_merge(onto)},
        "rows": len(measurement.rows),
        "tokens": measurement.tokens,
        "held_out_rows": measurement.run.dataset().eval_rows,
        "device": describe(measurement.device),
        "dtype": measurement.dtype,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "measured_at": time.time(),
        "peak_host_bytes": MemoryMeter(CPU).host(),
    }


class Measurement:
    """Rows, device and number type, the same for all models of the run, and where the log-probabilities of the trained one lie."""

    def __init__(self, run: Run, scratch: Path, say: Say, device: torch.device) -> None:
        self.run, self.scratch, self.say, self.device, self.config = run, scratch, say, device, run.config()
        self.base = run.base_model().folder
        self.dtype = computed_in(run)
        if self.device.type == "cpu" and self.dtype == "fp16":
            self.dtype = "fp32"  # CPUs compute fp16 slowly, or not at all
        self.reference = scratch / "log-probabilities"
        vocabulary = causal_language_model(self.base)[1].vocab_size
        self.rows = held_out(run, vocabulary=vocabulary)
        self.tokens = sum(row.supervised_tokens for row in self.rows)
        self.trained_loss = math.nan

    def of_trained(self) -> dict[str, float]:
        """The loss of the adapter on the base as it was trained on. Keeps what it says of every supervised token."""
        model = load_base(self.base, self.config, device=self.device, dtype=self.dtype)
        total = 0.0
        with self.reference.open("wb") as file:
            adapted = PeftModel.from_pretrained(model, str(self.run.adapter))
            for log_p, targets in self.said_by(adapted, "measuring the model that was trained"):
                log_p.cpu().numpy().tofile(file)
                total -= log_p.gather(1, targets[:, None]).double().sum().item()
        del model, adapted
        self.release()
        self.trained_loss = self.finite(total / self.tokens)
        return {"loss": self.trained_loss}

    def of_merge(self, onto: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The merge, and its export in NF4 where it has one, each with its way."""
        folder = merging.folder_of(self.run, onto, "16bit")
        if not merging.is_current(self.run, folder):
            self.say(f"merging onto the {onto} base", 0, 0)
            folder = merge_onto(self.run, onto, folder=self.scratch / "merged")
        plain = load_base(folder, self.config, device=self.device, dtype=self.dtype, four_bit=False)
        found = self.compared(plain, f"measuring the merge onto the {onto} base")
        del plain
        self.release()
        yield onto, found
        if onto not in merging.EXPORTED_IN_NF4:
            return
        quantised = load_in_nf4(self.run, folder, device=self.device, dtype=self.dtype)
        found = self.compared(quantised, f"measuring the merge onto the {onto} base in NF4")
        del quantised
        self.release()
        yield f"{onto}-nf4", found

    def compared(self, model: Any, doing: str) -> dict[str, Any]:
        """Against the trained model, token by token: KL divergence is the sum over the vocabulary of p (log p - log q)."""
        loss = divergence = 0.0
        same = 0
        with self.reference.open("rb") as file:
            for log_q, targets in self.said_by(model, doing):
                log_p = torch.from_numpy(np.fromfile(file, np.float32, log_q.numel())).view_as(log_q).to(self.device)
                loss -= log_q.gather(1, targets[:, None]).double().sum().item()
                divergence += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
                same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        loss = self.finite(loss / self.tokens)
        return {
            "loss": loss,
            "loss_difference": loss - self.trained_loss,
            "kl": max(
                0.0, self.finite(divergence / self.tokens)
            ),  # of equal models rounding may leave less than nothing
            "top1": same / self.tokens,
            "rows": len(self.rows),
            "tokens": self.tokens,
        }

    @torch.no_grad()
    def said_by(self, model: Any, doing: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(log-probabilities [positions, vocabulary] in fp32, the tokens that came [positions]), at most POSITIONS at once, of all
        supervised tokens in the order of the rows. One row a pass, so that all models add up in the same order."""
        model.eval()
        plain = self.dtype == "fp32"
        for number, row in enumerate(self.rows):
            self.say(doing, number, len(self.rows))
            batch = make_pass([row], packed=False, device=self.device)
            with contextlib.nullcontext() if plain else torch.autocast(self.device.type, DTYPES[self.dtype]):
                logits = forward_logits(model, batch)[0]
            for part, targets in zip(logits.split(POSITIONS), batch.targets[0].split(POSITIONS), strict=True):
                yield part.float().log_softmax(-1), targets

    def finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ModelError(
                f"{self.run.run_id}: its loss on held-out rows is {value}; look at its events, and train it again"
            )
        return value

    def release(self) -> None:
        gc.collect()  # modules and hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def held_out(run: Run, *, vocabulary: int) -> list[Row]:
    """Evenly spaced held-out rows with a token to learn, as the run's steps would read them, within the limits of drift.py.

    Raises RunError where there is none.
    """
    config, tokenizer = run.config(), load_tokenizer(run.adapter)
    path = run.path / "dataset" / "eval.jsonl"
    every = max(1, -(-run.dataset().eval_rows // drift.ROWS))
    examples = (example for number, example in enumerate(read_stored(path)) if number % every == 0)
    room, supervised_room = drift.TOKENS, drift.REFERENCE_BYTES // (4 * vocabulary)
    rows: list[Row] = []
    for rendered in render_many(examples, tokenizer, loss_on=config.loss_on):
        if isinstance(rendered, Refused):  # by the template, as in training
            continue
        length = min(drift.ROW_TOKENS, config.max_seq_length, room, len(rendered.token_ids))
        row = Row(rendered.line, rendered.token_ids[:length].tolist(), rendered.supervised[:length].tolist())
        if not row.supervised_tokens or row.supervised_tokens > supervised_room:
            continue
        rows.append(row)
        room, supervised_room = room - length, supervised_room - row.supervised_tokens
        if len(rows) == drift.ROWS or room < 2:
            break
    if not rows:
        raise RunError(
            f"{run.run_id}: none of its held-out rows has a token to learn within {min(drift.ROW_TOKENS, config.max_seq_length):,} "
            "tokens, so its merges cannot be measured; train with evaluation rows whose responses begin earlier"
        )
    return rows


def main(arguments: Sequence[str]) -> int:
    run_directory, scratch = arguments
    run = Run(Path(run_directory), Settings.from_environment())

    def say(doing: str, done: int, total: int) -> None:
        print(json.dumps({"doing": doing, "done": done, "total": total}), flush=True)

    try:
        measure(run, Path(scratch), say)
    except LabError as error:
        print(json.dumps({"problems": error.problems}), flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
