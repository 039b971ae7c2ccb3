"""How good a model is on held-out rows: the loss of supervised tokens, and a task score on generated answers."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch

from qlora_core.data.rows import Example
from qlora_core.errors import TrainingError
from qlora_core.scores import Scorer
from qlora_core.tokens import end_token, prompt_ids
from qlora_core.worker.batches import Pass, Row, loss_sum, make_pass, plan_passes

# Answers generated at once; a decoding step costs about the same for one as for many.
GENERATION_BATCH = 48
REPORT_EVERY = 8


@torch.no_grad()
def evaluation_loss(
    model: Any,
    rows: Sequence[Row],
    *,
    token_budget: int,
    packed: bool,
    device: torch.device,
    between_passes: Callable[[], None] = lambda: None,
    loss_of: Callable[[Pass], torch.Tensor] | None = None,
) -> tuple[float, int]:
    """(mean cross-entropy per supervised token over all rows, number of those tokens): the same for every budget.

    Trainer's own eval_loss averages the means of batches, which depends on how rows fall into batches. Out of memory, it
    starts again with smaller passes; raises TrainingError when the longest row alone does not fit. `between_passes` may
    raise to end it early. `loss_of`: the summed loss of a pass, where another path than the model's own gives it.
    """
    loss_of = loss_of or (lambda batch: loss_sum(model, batch))
    longest = max(rows, key=lambda row: len(row.token_ids))
    was_training = model.training
    model.eval()
    try:
        while (
            total := _loss_of_all(
                loss_of, rows, token_budget, packed=packed, device=device, between_passes=between_passes
            )
        ) is None:
            if token_budget <= len(longest.token_ids):
                raise TrainingError(
                    f"out of memory in the evaluation with one row a pass: the longest row, line {longest.line}, has "
                    f"{len(longest.token_ids)} tokens; lower max_seq_length, choose qlora or a smaller base model"
                )
            if device.type == "cuda":
                torch.cuda.empty_cache()
            token_budget = max(len(longest.token_ids), token_budget // 2)
        tokens = sum(row.supervised_tokens for row in rows)
        return total / tokens, tokens
    finally:
        model.train(was_training)


def _loss_of_all(
    loss_of: Callable[[Pass], torch.Tensor],
    rows: Sequence[Row],
    token_budget: int,
    *,
    packed: bool,
    device: torch.device,
    between_passes: Callable[[], None],
) -> float | None:
    """The losses of all supervised tokens added up; None when a pass does not fit into memory."""
    total = 0.0
    try:
        for members in plan_passes([len(row.token_ids) for row in rows], token_budget, packed=packed):
            between_passes()
            total += loss_of(make_pass([rows[i] for i in members], packed=packed, device=device)).item()
    except torch.OutOfMemoryError:
        return None
    return total


def generate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    device: torch.device,
    report: Callable[[int, int], None],
) -> list[str]:
    """Greedy answers to the last turn of each example, in their order; see `generate_tokens`."""
    found = generate_tokens(model, tokenizer, examples, max_new_tokens=max_new_tokens, device=device, report=report)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]


@torch.no_grad()
def generate_tokens(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    device: torch.device,
    report: Callable[[int, int], None],
) -> list[list[int]]:
    """The tokens of each answer, up to the one that ends it.

    Batched, shortest prompts first, padded left; out of memory, in smaller batches. `report(answered, all)` is called
    every few tokens, a batch under way counting by its share of max_new_tokens; it may raise to end it early.
    """
    prompts = [prompt_ids(example, tokenizer) for example in examples]
    # What ends a response in the template that is trained with need not be the model's own end token.
    taught = {end_token(example, tokenizer) for example in examples[:1]}
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, batch = [[] for _ in prompts], GENERATION_BATCH
    was_training = model.training
    model.eval()
    try:
        while waiting:
            chosen, answered = waiting[:batch], len(prompts) - len(waiting)

            def on_token(number: int, answered: int = answered, chosen: Sequence[int] = chosen) -> None:
                if number % REPORT_EVERY == 0:
                    report(answered + len(chosen) * number // max_new_tokens, len(prompts))

            report(answered, len(prompts))
            try:
                found = _greedy(
                    model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, device, on_token, taught
                )
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                found = None
            if found is None:  # outside `except`, whose traceback keeps the tensors of the failed attempt alive
                torch.cuda.empty_cache()
                batch = len(chosen) // 2
                continue
            for i, answer in zip(chosen, found, strict=True):
                answers[i] = answer
            waiting = waiting[len(chosen) :]
            report(len(prompts) - len(waiting), len(prompts))
        return answers
    finally:
        model.train(was_training)


def _greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    on_token: Callable[[int], None],
    taught: set[int | None],
) -> list[list[int]]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    configured = model.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    ends = ({tokenizer.eos_token_id, *own} | taught) - {None}
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        on_token(ids.shape[1] - width)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    output = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        do_sample=False,
        repetition_penalty=1.0,  # some bases bring one of their own; a score is of the model's first choices
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
        stopping_criteria=[watch],
    )
    return [list(takewhile(lambda token: token not in ends, tokens)) for tokens in output[:, width:].tolist()]


def count_correct(answers: Sequence[str], examples: Sequence[Example], scorer: Scorer) -> int:
    return sum(scorer(answer, example.reference) for answer, example in zip(answers, examples, strict=True))
