"""How alike two models answer: their tokens, and the meaning of their answers as a third model sees it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

RESAMPLES, SEED = 2000, 0


@torch.no_grad()
def embeddings(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    device: torch.device,
    check_stop: Callable[[], None],
) -> torch.Tensor:
    """[rows, hidden] in fp32: the mean of the last hidden states over the tokens of each answer, read after its prompt. Zeros for
    an answer without tokens."""
    found = []
    inner = model.base_model  # without the head, whose logits over all tokens would be the largest tensor by far
    for prompt, answer in zip(prompts, answers, strict=True):
        check_stop()
        ids = torch.tensor([[*prompt, *answer]], device=device)
        hidden = inner(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) :].float()
        found.append(hidden.mean(dim=0) if len(answer) else hidden.new_zeros(hidden.shape[-1]))
    return torch.stack(found).cpu() if found else torch.zeros(0, 1)


def agreement(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    first_embeddings: torch.Tensor,
    second_embeddings: torch.Tensor,
) -> dict[str, Any]:
    """Means over rows, each with a 95 % interval from resampled rows. `token_match`: see token_match. `embedding_cosine`: of
    the embeddings of both answers; 1 where both are empty, 0 where one is."""
    matches = [token_match(one, other) for one, other in zip(first, second, strict=True)]
    cosines = cosine_similarity(first_embeddings, second_embeddings).tolist()
    empty = [(not one, not other) for one, other in zip(first, second, strict=True)]
    cosines = [1.0 if all(none) else cosine for cosine, none in zip(cosines, empty, strict=True)]
    return {
        "token_match": float(np.mean(matches)),
        "token_match_95": interval_of_mean(matches),
        "embedding_cosine": float(np.mean(cosines)),
        "embedding_cosine_95": interval_of_mean(cosines),
        "rows": len(matches),
    }


def token_match(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of positions, of the longer answer's, at which both have the same token; 1 for two empty answers. After the first
    token that differs, two greedy answers go their own ways, so it is a strict measure."""
    longer = max(len(first), len(second))
    return sum(one == other for one, other in zip(first, second, strict=False)) / longer if longer else 1.0


def interval_of_mean(values: Sequence[float]) -> list[float]:
    """95 % percentile bootstrap (Efron 1979): [low, high]."""
    drawn = np.random.default_rng(SEED).choice(np.asarray(values, float), (RESAMPLES, len(values))).mean(axis=1)
    return [float(bound) for bound in np.quantile(drawn, (0.025, 0.975))]
