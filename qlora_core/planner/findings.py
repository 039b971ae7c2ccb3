"""What we warn of before a run, each with why and a remedy where a setting mends it. Facts in, findings out."""

import math
from dataclasses import dataclass, field
from typing import Any

from qlora_core import targets
from qlora_core.data.rows import counted
from qlora_core.memory import GIB
from qlora_core.planner.facts import Facts, learning_rate_for, length_for, rank_for
from qlora_core.planner.fitting import planned, rank_for_memory, usable_bytes, with_settings
from qlora_core.scores import wilson_interval
from qlora_core.selectors import as_list

STOP, WARN, NOTE = "stop", "warn", "note"
FEW_ROWS, MANY_EPOCHS, FEW_EVAL_ROWS = 5_000, 5, 30
USUAL_LEARNING_RATES = (1e-5, 1e-3)
# Licences by SPDX id that forbid commercial use by name; others may too, in their own words.
NON_COMMERCIAL = tuple(
    f"cc-by-nc{variant}-{version}" for variant in ("", "-sa", "-nd") for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
)
LISTED = 10


@dataclass(frozen=True)
class Finding:
    """Something to know before Start. `remedy` are settings that mend it, empty where only the data can."""

    severity: str
    title: str
    why: str
    remedy: dict[str, Any] = field(default_factory=dict)
    remedy_label: str = ""


def findings(facts: Facts) -> list[Finding]:
    """Everything worth a word, the worst first."""
    found = [
        *_rows(facts),
        *_evaluation(facts),
        *_adapter(facts),
        *_training(facts),
        *_machine(facts),
        *_licence(facts),
    ]
    return sorted(found, key=lambda finding: (STOP, WARN, NOTE).index(finding.severity))


def _adapter(facts: Facts) -> list[Finding]:
    config, found = facts.config, []
    fits = rank_for(facts.train_rows)
    if facts.train_rows and config.rank > fits:
        found.append(Finding(
            WARN, f"Rank {config.rank} is high for {facts.train_rows:,} rows",
            f"Rank {fits} is enough for so few; a higher one learns them by heart and costs memory and time.",
            {"rank": fits}, f"Set rank to {fits}",
        ))  # fmt: skip
    scale = config.adapter_scale
    if not 1 <= scale <= 2:
        root = config.use_rslora
        alpha = math.floor(20 * math.sqrt(config.rank)) / 10 if root else 2.0 * config.rank
        divisor = f"√{config.rank}" if root else f"{config.rank}"
        found.append(Finding(
            NOTE if config.lora_alpha is None else WARN, f"The update is scaled by {scale:.3g}",
            f"lora_alpha {config.alpha:g} / {divisor} = {scale:.3g}; usual is 1 to 2, and more acts as a higher learning rate.",
            {"lora_alpha": alpha}, f"Set alpha to {alpha:g}",
        ))  # fmt: skip
    if config.lora_dropout > 0.1:
        found.append(Finding(
            WARN, f"LoRA dropout is {config.lora_dropout:g}",
            "Above 0.1 it mostly slows learning: an adapter is small already. QLoRA used 0.1 up to 13B, 0.05 above.",
            {"lora_dropout": 0.05}, "Set dropout to 0.05",
        ))  # fmt: skip
    if facts.targeted and targets.misses_query_or_value(facts.architecture.layers, facts.targeted):
        found.append(Finding(
            WARN, "Query and value layers are not both adapted",
            "Attention learns most through these two; an adapter on all linear layers comes closest to full fine-tuning.",
            {"target_modules": "all-linear"}, "Target all linear layers",
        ))  # fmt: skip
    if facts.architecture and (fused := targets.not_apart(facts.architecture.layers, config.target_modules)):
        found.append(Finding(
            NOTE, f"Query, key and value are one matrix here, {fused}",
            f"They cannot be adapted apart: {', '.join(as_list(config.target_modules))} adapts all three.",
        ))  # fmt: skip
    return found


def _training(facts: Facts) -> list[Finding]:
    config, found = facts.config, []
    low, high = USUAL_LEARNING_RATES
    if not low <= config.learning_rate <= high:
        rate = learning_rate_for(facts.architecture)[0]
        what = "diverge" if config.learning_rate > high else "learn next to nothing"
        found.append(Finding(
            WARN, f"Learning rate {config.learning_rate:g} is unusual",
            f"LoRA trains at {low:g} to {high:g}; at {config.learning_rate:g} a run will likely {what}.",
            {"learning_rate": rate}, f"Set it to {rate:g}",
        ))  # fmt: skip
    if facts.epochs > MANY_EPOCHS and 0 < facts.train_rows < FEW_ROWS:
        found.append(Finding(
            WARN, f"{facts.epochs:.3g} passes over {facts.train_rows:,} rows",
            f"After about {MANY_EPOCHS} passes a model repeats few rows rather than learning from them; watch the evaluation loss.",
            {"num_epochs": 3.0, "max_steps": None}, "Set 3 epochs",
        ))  # fmt: skip
    device = facts.device
    if config.compute_dtype == "fp32" and (device.is_gpu or device.has_bf16):
        found.append(Finding(
            WARN, "Computing in fp32",
            f"{device.name} multiplies {'bf16' if device.has_bf16 else 'fp16'} several times faster, and in half the memory.",
            {"compute_dtype": "auto"}, "Choose the number type by device",
        ))  # fmt: skip
    if device.is_gpu and not device.has_bf16 and config.compute_dtype in ("auto", "fp16"):
        found.append(Finding(
            NOTE, "This GPU has no bf16",
            f"{device.name} will compute in fp16 with loss scaling: its numbers end at 65,504, so a step may be skipped.",
        ))  # fmt: skip
    return found


def _rows(facts: Facts) -> list[Finding]:
    rows, cut_at = facts.rows, facts.config.max_seq_length
    if rows is None:
        return []
    if rows.refused:
        title = f"The model's chat template refuses {counted(len(rows.refused), 'row')}"
        why = f"{facts.of_rows}{rows.refused[0]}. Mend the rows, or choose another base model."
        severity = WARN if facts.config.skip_bad_rows and rows.lines else STOP
        return [Finding(severity, title, why)]
    found, total, said = [], len(rows.lines), facts.of_rows
    if not total:
        return []
    longer = _longer(facts)
    cut, bare, endless = rows.cut(cut_at), rows.bare_lines(cut_at), rows.endless_lines(cut_at)
    if bare:
        every = len(bare) == total
        found.append(Finding(
            STOP if every else WARN,
            "No row has a token to learn from" if every else f"{counted(len(bare), 'row')} would teach nothing",
            f"{said}{_lines(bare)}: nothing of the response lies within {cut_at:,} tokens. "
            + ("" if every else "Such rows are left out and listed."),
            *longer,
        ))  # fmt: skip
    if cut:
        found.append(Finding(
            WARN if cut > 0.01 * total else NOTE, f"{counted(cut, 'row')} ({cut / total:.1%}) would be cut",
            f"{said}Longer than {cut_at:,} tokens; what lies beyond is not learnt. The longest has {max(rows.tokens):,}.",
            *longer,
        ))  # fmt: skip
    if endless:
        by_cut = any(length > cut_at for length in rows.tokens)
        found.append(Finding(
            WARN, f"The end of {counted(len(endless), 'response')} is not learnt",
            f"{said}{_lines(endless)}: the model learns to stop only from end tokens that it sees.",
            *(longer if by_cut else ()),
        ))  # fmt: skip
    return found + _marks(facts)


def _longer(facts: Facts) -> tuple[dict[str, Any], str] | tuple[()]:
    """A row length that holds the rows, as remedy and label; nothing where the model can hold no more."""
    wanted = length_for(facts.rows, facts.positions)
    return ({"max_seq_length": wanted}, f"Allow {wanted:,} tokens") if wanted > facts.config.max_seq_length else ()


def _marks(facts: Facts) -> list[Finding]:
    marks = facts.rows.marks
    if not marks:
        return []
    lines = sorted({line for found in marks.values() for line in found})
    kinds = ", ".join(f"{name} in {counted(len(found), 'row')}" for name, found in marks.items())
    if len(marks) > 1:
        title = f"{len(marks)} prompt templates are mixed in the rows"
        why = f"{kinds}. The model would learn several ways to begin and end at once, inside its own template."
    else:
        title = f"{counted(len(lines), 'row')} with marks of a chat template"
        why = f"{kinds}. Each row is put into the model's own template, so it would be wrapped twice."
    remove = " Remove the marks from the text, or split it into messages."
    return [Finding(WARN, title, f"{facts.of_rows}{why} {_lines(lines)}.{remove}")]


def _evaluation(facts: Facts) -> list[Finding]:
    config, found = facts.config, []
    if facts.eval_rows_also_trained:
        found.append(Finding(
            WARN, f"{counted(facts.eval_rows_also_trained, 'evaluation row')} are also trained on",
            f"That is {facts.eval_rows_also_trained / max(1, facts.eval_rows):.0%} of the evaluation; loss and score will flatter "
            "the model. Remove them from one of the two files.",
        ))  # fmt: skip
    if 0 < facts.eval_rows < FEW_EVAL_ROWS:
        low, high = wilson_interval(facts.eval_rows // 2, facts.eval_rows)
        total = facts.train_rows + facts.eval_rows
        share = math.ceil(100 * FEW_EVAL_ROWS / total) / 100
        remedy = {"eval_fraction": share} if not config.eval_data and share <= 0.3 else {}
        found.append(Finding(
            NOTE, f"Only {counted(facts.eval_rows, 'evaluation row')}",
            f"With half the answers right, the 95 % interval would reach from {low:.0%} to {high:.0%}: small differences between "
            "runs say nothing.",
            remedy, f"Hold out {share:.0%}" if remedy else "",
        ))  # fmt: skip
    return found


def _machine(facts: Facts) -> list[Finding]:
    if facts.architecture is None or not facts.targeted:
        return []
    return [*_memory(facts), *_disk(facts)]


def _memory(facts: Facts) -> list[Finding]:
    plan, layers = planned(facts), facts.architecture.layer_count
    where = f"{usable_bytes(facts) / GIB:.1f} GiB of {facts.device.name} may be used"
    if facts.config.memory_budget_gib is None:
        where = f"{facts.device.name} has {facts.device.memory_bytes / GIB:.1f}"
    if not plan.fits:
        why = f"By estimate the run needs {plan.estimate.needed_bytes / GIB:.1f} GiB at the least, and {where}."
        return [Finding(WARN, "The run does not fit the memory", why, *_fitting(facts))]
    recomputed = plan.plan.checkpointed_layers
    if facts.config.activation_checkpointing == "auto" and 2 * recomputed > layers:
        host = " and keep their inputs in host memory" if plan.plan.offloaded else ""
        why = f"{where[0].upper()}{where[1:]}: to fit, {recomputed} of {layers} layers compute their activations again{host}."
        return [Finding(NOTE, "Steps will be slower, to fit the memory", why, *_roomier(facts))]
    return []


def _fitting(facts: Facts) -> tuple[dict[str, Any], str] | tuple[()]:
    """The smallest change with which the run would fit."""
    config = facts.config
    tried: list[tuple[dict[str, Any], str]] = []
    if config.token_budget is not None:
        tried.append(({"token_budget": None}, "Choose the token budget by memory"))
    if config.activation_checkpointing != "auto":
        tried.append(({"activation_checkpointing": "auto"}, "Recompute activations where they do not fit"))
    rank = rank_for_memory(facts).rank
    if rank is not None and rank < config.rank:
        tried.append(({"rank": rank}, f"Set rank to {rank}"))
    if config.method == "qlora" and (config.quantize_modules != "all" or config.int8_modules):
        tried.append(({"quantize_modules": "all", "int8_modules": ()}, "Hold all layers in 4 bits"))
    if config.method != "qlora" and config.init_lora_weights in ("default", "gaussian"):
        tried.append(({"method": "qlora"}, "Use QLoRA: the base in 4 bits"))
        both = {"method": "qlora", "activation_checkpointing": "auto", "token_budget": None}
        tried.append((both, "Use QLoRA, and plan its passes by memory"))
    return next((found for found in tried if planned(with_settings(facts, **found[0])).fits), ())


def _roomier(facts: Facts) -> tuple[dict[str, Any], str] | tuple[()]:
    if facts.config.method == "qlora" or facts.config.init_lora_weights not in ("default", "gaussian"):
        return ()
    plan = planned(with_settings(facts, method="qlora"))
    fast = plan.fits and not plan.plan.checkpointed_layers
    return ({"method": "qlora"}, "Use QLoRA, which fits without") if fast else ()


def _disk(facts: Facts) -> list[Finding]:
    config, found = facts.config, []
    states = 2 if "8bit" in config.optimizer else 8
    # The newest ones, that of the best evaluation, one that is being written; and the adapter itself.
    checkpoints = facts.trainable * ((config.keep_checkpoints + 2) * (4 + states) + 4)
    merged = round(2.2 * facts.architecture.parameters)
    free = facts.free_disk_bytes
    if free < checkpoints + merged:
        enough = free >= checkpoints
        found.append(Finding(
            WARN if enough else STOP, "The disk is too small" + (" for a merged model" if enough else ""),
            f"{free / GIB:.1f} GiB are free; checkpoints and adapter need about {checkpoints / GIB:.1f}, a merged model "
            f"{merged / GIB:.1f} more. Delete runs or free disk space.",
            *(() if config.keep_checkpoints == 1 else ({"keep_checkpoints": 1}, "Keep one checkpoint")),
        ))  # fmt: skip
    return found


def _licence(facts: Facts) -> list[Finding]:
    licence = (facts.config.dataset_license or "").strip().lower()
    if not licence:
        why = "Whoever uses or publishes the adapter must know it. Name it under Advanced, Licence of the dataset."
        return [Finding(NOTE, "The licence of the dataset is unknown", why)]
    if licence in NON_COMMERCIAL:
        why = "What is trained on it may not be used commercially either, as many read it."
        return [Finding(WARN, f"The dataset is non-commercial ({licence})", why)]
    return []


def _lines(lines: list[int]) -> str:
    more = " …" if len(lines) > LISTED else ""
    return f"line{'' if len(lines) == 1 else 's'} {', '.join(map(str, lines[:LISTED]))}{more}"
