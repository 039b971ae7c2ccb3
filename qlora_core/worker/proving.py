"""`python -m qlora_core.worker.proving RUN adapter|merged DOWNLOADED LOCAL float32|auto`: are the logits equal? Prints JSON."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_core.data.stored import read_stored
from qlora_core.errors import DatasetError
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.tokens import load_tokenizer, render

ROWS = 3
TOKENS = 256
SENTENCE = "What was sent is what arrived, if each number of this sentence is the same."


def prove(run: Run, what: str, downloaded: Path, local: Path, dtype: str = "float32") -> dict[str, Any]:
    """Loads each as its card says to, but on the CPU, and compares logits and token ids on held-out rows.

    `dtype`: "float32", or "auto", that of the stored weights, which takes half the memory."""
    theirs, ours = _rows(run, downloaded), _rows(run, local)
    same_tokens = [row.tolist() for row in theirs] == [row.tolist() for row in ours]
    found = {"rows": len(ours), "tokens": sum(map(len, ours)), "same_tokens": same_tokens, "dtype": dtype}
    if not same_tokens:
        return found | {"same": False, "largest_difference": None}
    here, there = (_logits(run, what, folder, ours, dtype) for folder in (local, downloaded))
    difference = max(float((a - b).abs().max()) for a, b in zip(here, there, strict=True))
    equal = all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    return found | {"same": equal, "largest_difference": difference}


def _rows(run: Run, folder: Path) -> list[torch.Tensor]:
    tokenizer, found = load_tokenizer(folder), []
    for example in islice(read_stored(run.path / "dataset" / "eval.jsonl"), 10 * ROWS):
        try:
            ids = render(example, tokenizer).token_ids[: min(TOKENS, run.config().max_seq_length)]
        except DatasetError:  # the template refuses the row, as it did in training
            continue
        found.append(torch.tensor(ids, dtype=torch.long))
        if len(found) == ROWS:
            break
    # Held-out rows may be none, or none that the template takes.
    return found or [torch.tensor(tokenizer(SENTENCE)["input_ids"], dtype=torch.long)]


@torch.inference_mode()
def _logits(run: Run, what: str, folder: Path, rows: list[torch.Tensor], dtype: str) -> list[torch.Tensor]:
    base = run.base_model().folder if what == "adapter" else folder
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    if what == "adapter":
        model = PeftModel.from_pretrained(model, str(folder))
    model.eval()
    return [model(input_ids=row[None]).logits[0].float() for row in rows]


if __name__ == "__main__":
    _, run_directory, what, downloaded, local, dtype = sys.argv
    verdict = prove(Run(Path(run_directory), Settings.from_environment()), what, Path(downloaded), Path(local), dtype)
    print(json.dumps(verdict))
