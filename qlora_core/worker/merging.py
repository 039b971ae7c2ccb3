"""`python -m qlora_core.worker.merging RUN_DIR original|dequantized`: adapter + base -> one 16-bit model folder."""

import os
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel

from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.tokens import load_tokenizer
from qlora_core.worker.loading import load_base


def merge_onto(run: Run, onto: str) -> Path:
    """Writes `merged-<onto>` in safetensors shards, with the tokenizer that training used. Runs on the CPU.

    Onto "dequantized": the base is quantised as training quantised it and then dequantised; merged into that, the
    model keeps the behaviour that was trained. Adding into the 4-bit weights
    would round the update away, so that is not offered.
    """
    config, base = run.config(), run.base_model()
    dtype = torch.bfloat16
    model = load_base(base.folder, config, device=torch.device("cpu"), dtype="bf16", four_bit=onto == "dequantized")
    if onto == "dequantized":
        model = model.dequantize().to(dtype)
    merged = PeftModel.from_pretrained(model, str(run.adapter)).merge_and_unload()
    merged.config.use_cache = True
    folder = run.path / f"merged-{onto}"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial, safe_serialization=True, max_shard_size="4GB")
    load_tokenizer(run.adapter).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


if __name__ == "__main__":
    merge_onto(Run(Path(sys.argv[1]), Settings.from_environment()), sys.argv[2])
