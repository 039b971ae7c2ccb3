"""One measurement of another trainer in this fresh process: `python other_trainers.py CASE.json RESULT.json`.

training.py writes the case and starts it. Plain Trainer runs everywhere; TRL and unsloth run where they are installed.
"""

import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qlora_core import devices
from qlora_core.row_order import step_rows
from qlora_core.worker import hardware

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
ALSO_USED = {"trainer-liger": ("liger_kernel",), "trl": ("trl",), "unsloth": ("unsloth", "trl")}
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 2e-4
# As tutorials write it, and the best that can be had of plain Trainer by settings alone.
PLAIN = {
    "trainer": {"upcast": True, "optim": "paged_adamw_8bit", "rows_per_pass": 4},
    "trainer-lean": {"upcast": False, "optim": "adamw_torch_fused", "rows_per_pass": None},
    "trainer-liger": {"upcast": False, "optim": "adamw_torch_fused", "rows_per_pass": None, "use_liger_kernel": True},
}


def step_clock(device: torch.device) -> Any:
    """A callback that keeps each optimizer step's seconds and memory, and when the first ended.

    Fetching and collating a step's rows is left out: it comes before the trainer says that the step begins.
    """
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.meter, self.steps, self.first_ended = hardware.MemoryMeter(device), [], None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = hardware.clock(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = hardware.clock(device) - self.begun
            self.first_ended = self.first_ended or time.perf_counter()
            peaks = {f"peak_{name}_bytes": getattr(self.meter, name)() for name in ("allocated", "reserved", "host")}
            self.steps.append({"step_seconds": seconds, **peaks})

    return StepClock()


def load_model(case: SimpleNamespace) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = hardware.DTYPES[case.dtype]
    quantization = None
    if case.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        case.model_folder, dtype=dtype, quantization_config=quantization, device_map={"": case.device}
    )


def lora_config(case: SimpleNamespace) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear")


def arguments(case: SimpleNamespace, *, rows_per_pass: int | None, optim: str, checkpointing: bool) -> dict[str, Any]:
    """Of TrainingArguments and what derives from it. Rows keep their order."""
    rows = min(case.rows_per_step, rows_per_pass or case.rows_per_step)
    return {
        "output_dir": tempfile.mkdtemp(dir=Path(case.rows_file).parent),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": case.rows_per_step // rows,
        "max_steps": case.max_steps,
        "learning_rate": LEARNING_RATE,
        "optim": optim,
        "activation_checkpointing": checkpointing,
        "train_sampling_strategy": "sequential",
        "bf16": case.dtype == "bf16",
        "use_cpu": case.device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def tokenizer_of(case: SimpleNamespace) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case.model_folder)


def plain_trainer(case: SimpleNamespace, rows: list[dict], clock: Any) -> tuple[Any, str]:
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    recipe = dict(PLAIN[case.arm])
    upcast = recipe.pop("upcast") and case.method == "qlora"
    model = load_model(case)
    if upcast:
        model = prepare_model_for_kbit_training(model)
    model.config.use_cache = False
    model = get_peft_model(model, lora_config(case))
    case.loaded = time.perf_counter()
    liger = {"use_liger_kernel": recipe.pop("use_liger_kernel", False)}
    settings = arguments(case, **recipe, checkpointing=case.checkpointing) | liger
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer_of(case), padding=True),
        callbacks=[clock],
    )
    path = [
        f"padded, {settings['gradient_accumulation_steps']} x {settings['per_device_train_batch_size']} rows",
        "checkpointing" if case.checkpointing else "no checkpointing",
        recipe["optim"],
        *(["head and norms in fp32"] if upcast else []),
        *(["Liger kernels"] if liger["use_liger_kernel"] else []),
    ]
    return trainer, ", ".join(path)


def trl_trainer(case: SimpleNamespace, rows: list[dict], clock: Any) -> tuple[Any, str]:
    """Runs where TRL is installed. All rows of a step in one padding-free pass."""
    model = load_model(case)
    case.loaded = time.perf_counter()
    return padding_free(case, rows, clock, model=model, peft_config=lora_config(case), checkpointing=case.checkpointing)


def unsloth_trainer(case: SimpleNamespace, rows: list[dict], clock: Any) -> tuple[Any, str]:
    """Runs where unsloth is installed, which main imports before transformers. Its own checkpointing, through TRL."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=case.model_folder,
        max_seq_length=case.max_seq_length,
        load_in_4bit=case.method == "qlora",
        dtype=hardware.DTYPES[case.dtype],
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        lora_alpha=2 * case.rank,
        target_modules=LINEAR_LAYERS,
        use_gradient_checkpointing="unsloth" if case.checkpointing else False,
    )
    case.loaded = time.perf_counter()
    return padding_free(case, rows, clock, model=model, peft_config=None, checkpointing=case.checkpointing)


def padding_free(
    case: SimpleNamespace, rows: list[dict], clock: Any, *, model: Any, peft_config: Any, checkpointing: bool
) -> tuple[Any, str]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = arguments(case, rows_per_pass=None, optim="adamw_torch_fused", checkpointing=checkpointing)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, padding_free=True, max_length=None, dataset_num_proc=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(case),
        peft_config=peft_config,
        callbacks=[clock],
    )
    return trainer, f"padding-free, {'checkpointing' if checkpointing else 'no checkpointing'}, adamw_torch_fused"


def measure(case: SimpleNamespace) -> dict[str, Any]:
    written = json.loads(Path(case.rows_file).read_text())
    # Each step learns from the rows that it has in this project's own worker.
    order = [step_rows(len(written), case.rows_per_step, step, case.seed) for step in range(case.max_steps)]
    rows = [written[i] for chosen in order for i in chosen]
    device = torch.device(case.device)
    clock = step_clock(device)
    make = {"trl": trl_trainer, "unsloth": unsloth_trainer}.get(case.arm, plain_trainer)
    trainer, path = make(case, rows, clock)
    load_peak = clock.meter.allocated()
    clock.meter.reset()
    trainer.train()
    adapters = [tensor for name, tensor in trainer.model.named_parameters() if "lora_B" in name]
    assert adapters and all(tensor.abs().max() > 0 for tensor in adapters), (
        "an adapter that began at zero has not moved"
    )
    for number, step in enumerate(clock.steps):
        inside = rows[number * case.rows_per_step : (number + 1) * case.rows_per_step]
        step["tokens"] = sum(len(row["input_ids"]) for row in inside)
        step["supervised_tokens"] = sum(label >= 0 for row in inside for label in row["labels"][1:])
    return {
        "failed": None,
        "steps": clock.steps,
        "first_step_seconds": clock.first_ended - case.loaded,
        "load_peak_allocated_bytes": load_peak,
        "path": path,
        "dtype": case.dtype,
        "device": hardware.describe(device),
        "packages": {name: importlib.metadata.version(name) for name in (*PACKAGES, *ALSO_USED.get(case.arm, ()))},
        "python": platform.python_version(),
        "driver": devices.driver_versions(),
    }


def main(case_file: str, result_file: str) -> None:
    case = SimpleNamespace(**json.loads(Path(case_file).read_text()))
    if case.arm == "unsloth":
        import unsloth  # noqa: F401  it patches transformers and trl, so it must come first
    try:
        result = measure(case)
    except torch.OutOfMemoryError as error:
        result = {"failed": f"out of memory: {str(error).split('. ')[0]}", "out_of_memory": True}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
