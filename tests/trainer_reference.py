"""The reference: a plain padded transformers.Trainer on a run's rows, written without any of our worker's steps."""

import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny_models import reset_accelerate
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from qlora_core.data.stored import read_stored
from qlora_core.row_order import step_rows
from qlora_core.runs import Run
from qlora_core.token_cache import make_table
from qlora_core.tokens import load_tokenizer
from qlora_core.worker.batches import Row

Trained = tuple[list[float], dict[str, torch.Tensor]]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def rows_of(run: Run, name: str) -> list[Row]:
    """The rows that hold something to learn."""
    tokenizer = load_tokenizer(run.base_model().folder)
    examples = read_stored(run.path / "dataset" / f"{name}.jsonl")
    rows = list(Row.all_of(make_table(examples, tokenizer), run.config().max_seq_length))
    return [row for row in rows if row.supervised_tokens]


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch as any tutorial collates it."""
    width = max(len(row.token_ids) for row in rows)

    def table(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*line, *[fill] * (width - len(line))] for line in values])

    return {
        "input_ids": table([list(row.token_ids) for row in rows], 0),
        "attention_mask": table([[1] * len(row.token_ids) for row in rows], 0),
        "labels": table(
            [[t if s else -100 for t, s in zip(r.token_ids, r.supervised, strict=True)] for r in rows], -100
        ),
    }


def plain_model(run: Run) -> Any:
    config, quantization = run.config(), None
    if config.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        run.base_model().folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    targets = config.target_modules if config.target_modules == "all-linear" else list(config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    torch.manual_seed(config.seed)
    return get_peft_model(model, lora)


def train_with_trainer(run: Run, *, adam_epsilon: float = 1e-8) -> Trained:
    """Losses of every step and the final adapter. Of ours are only the rows' tokens and their order."""
    config, model, rows = run.config(), plain_model(run), rows_of(run, "train")
    steps = config.max_steps
    order = [step_rows(len(rows), config.rows_per_step, step, config.seed) for step in range(steps)]
    # Trainer's batches are all of one size: an item is a whole step's batch, and the collator takes it out.
    items = [[rows[i] for i in chosen] for chosen in order]
    arguments = TrainingArguments(
        output_dir=str(run.path / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule),
        warmup_steps=min(math.ceil(steps * config.warmup_fraction), steps // 2),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        adam_epsilon=adam_epsilon,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
    )
    seen = Losses()
    reset_accelerate()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=items,
        data_collator=lambda batch: padded(batch[0]),
        callbacks=[seen],
    )
    trainer.train()
    return seen.losses, get_peft_model_state_dict(model)
