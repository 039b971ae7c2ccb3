"""`python -m qlora_core.worker.merging RUN_DIR original|dequantized 16bit|nf4`: adapter + base -> one model folder.

Prints, as JSON, the peak of its own host memory in bytes.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from qlora_core.config import replace
from qlora_core.data.rows import Example, Message
from qlora_core.errors import DatasetError
from qlora_core.merging import SHARD_BYTES, folder_of, is_current
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.tokens import end_token, load_tokenizer
from qlora_core.worker.hardware import DTYPES, MemoryMeter
from qlora_core.worker.loading import load_base
from qlora_core.worker.merged_weights import merged_state

CPU = torch.device("cpu")


def merge_onto(run: Run, onto: str, *, folder: Path | None = None) -> Path:
    """Writes `merged-<onto>` in safetensors shards, with the tokenizer that training used. Runs on the CPU.

    Onto "dequantized": the base is quantised as training quantised it and then dequantised; merged into that, the
    model keeps the behaviour that was trained. Adding into the quantised weights would round the update away.

    Added up in the number type that the run computed in, and rounded once: to fp16 for an fp16 run, else to bf16. In memory are
    the base as it was loaded (mapped from its files, or in 4 bits) and one shard.
    """
    config, base = run.config(), run.base_model()
    dtype = computed_in(run)
    model = load_base(base.folder, config, device=CPU, dtype=dtype, four_bit=onto == "dequantized")
    stored = torch.float16 if dtype == "fp16" else torch.bfloat16
    merged, state = merged_state(model, run.adapter, compute=DTYPES[dtype], stored=stored)
    return _save(run, merged, folder or folder_of(run, onto, "16bit"), state)


def computed_in(run: Run) -> str:
    """The number type of the run's products: bf16, fp16 or fp32."""
    return (run.result() or {"run_info": {"compute_dtype": "bf16"}})["run_info"]["compute_dtype"]


def export_nf4(run: Run, onto: str) -> Path:
    """Writes `merged-<onto>-nf4`: the merged model with its linear layers in NF4, which loads as such anywhere."""
    folder, merged = folder_of(run, onto, "nf4"), folder_of(run, onto, "16bit")
    temporary = folder.with_name(f"{folder.name}.16bit")
    if not is_current(run, merged):
        merged = merge_onto(run, onto, folder=temporary)
    _save(run, load_in_nf4(run, merged, device=CPU), folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_in_nf4(run: Run, merged: Path, *, device: torch.device, dtype: str = "bf16") -> Any:
    """A merged model of the run, quantised as its export in NF4 is."""
    config = replace(run.config(), quant_type="nf4", double_quant=True, quantize_modules="all", int8_modules=())
    return load_base(merged, config, device=device, dtype=dtype, four_bit=True)


def _save(run: Run, model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """The folder is replaced as a whole."""
    model.config.use_cache = True
    tokenizer = load_tokenizer(run.adapter)
    _teach_end(model, tokenizer)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state, safe_serialization=True, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _teach_end(model: Any, tokenizer: Any) -> None:
    """Generation stops at what ends a response in the template that was trained with, and at what ended it before."""
    try:
        taught = end_token(Example(1, (Message("user", "a"), Message("assistant", "b"))), tokenizer)
    except DatasetError:  # a template for conversations of another kind
        return
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if taught is not None and taught not in ends:
        model.generation_config.eos_token_id = [taught, *ends]


if __name__ == "__main__":
    _, run_directory, onto, export = sys.argv
    make = export_nf4 if export == "nf4" else merge_onto
    make(Run(Path(run_directory), Settings.from_environment()), onto)
    print(json.dumps({"peak_host_bytes": MemoryMeter(CPU).host()}))
