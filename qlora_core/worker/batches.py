"""Rows -> forward passes: which rows share a pass, the tensors of a pass, and the loss of its supervised tokens."""

import inspect
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qlora_core.token_cache import TokenTable


@dataclass(frozen=True)
class Row:
    """One example as the model reads it, cut to max_seq_length. `line` is its line in the person's file.

    Ids and flags are kept as 4 and 1 bytes each: all rows of a run are in memory at once.
    """

    line: int
    token_ids: Sequence[int]
    supervised: Sequence[bool]

    @classmethod
    def all_of(cls, table: TokenTable, max_seq_length: int) -> Iterator["Row"]:
        for number in range(len(table)):
            line, ids, supervised = table.row(number, max_seq_length)
            yield cls(line, array("i", ids.tobytes()), supervised.tobytes())

    @property
    def supervised_tokens(self) -> int:
        return self.supervised[1:].count(True)


@dataclass(frozen=True)
class Pass:
    """Tensors of one forward pass. Packed: [1, tokens] and positions that start at 0 in each row, no attention mask.
    Padded: [rows, longest] with an attention mask. `keep` are the columns whose logits are needed, `targets`
    [rows, len(keep)] the ids they should predict, -100 where nothing is learnt. `lengths` are the rows' own, in tokens."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    keep: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def plan_passes(lengths: Sequence[int], token_budget: int, *, packed: bool) -> list[list[int]]:
    """Divide rows into as few forward passes as hold `token_budget` tokens each (first fit, longest first).

    A row longer than the budget gets a pass of its own. Padded, a pass holds rows x longest row tokens.
    """
    passes: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for place, members in enumerate(passes):
            # Padded passes are filled longest first, so their first row is their longest.
            after = used[place] + lengths[index] if packed else (len(members) + 1) * lengths[members[0]]
            if after <= token_budget:
                members.append(index)
                used[place] += lengths[index]
                break
        else:
            passes.append([index])
            used.append(lengths[index])
    return passes


def make_pass(rows: Sequence[Row], *, packed: bool, device: torch.device) -> Pass:
    lengths = [len(row.token_ids) for row in rows]
    if packed:
        ids = np.concatenate([row.token_ids for row in rows]).astype(np.int64)
        begins = np.cumsum([0, *lengths[:-1]])
        positions = np.arange(len(ids)) - np.repeat(begins, lengths)
        # The logit at position p predicts the token at p + 1; the first token of a row is predicted by nothing.
        learnt = np.concatenate([_flags(row) for row in rows])
        learnt[begins] = False
        aimed = np.flatnonzero(learnt)
        return Pass(
            input_ids=_on(device, ids[None]),
            position_ids=_on(device, positions[None]),
            attention_mask=None,
            keep=_on(device, aimed - 1),
            targets=_on(device, ids[aimed][None]),
            lengths=tuple(lengths),
        )
    width = max(lengths)
    ids = [[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in rows]
    mask = [[1] * len(row.token_ids) + [0] * (width - len(row.token_ids)) for row in rows]
    keep = sorted({i - 1 for row in rows for i, flag in enumerate(row.supervised) if flag and i > 0})
    targets = [
        [row.token_ids[k + 1] if k + 1 < len(row.token_ids) and row.supervised[k + 1] else -100 for k in keep]
        for row in rows
    ]
    return Pass(
        input_ids=torch.tensor(ids, device=device),
        position_ids=None,
        attention_mask=torch.tensor(mask, device=device),
        keep=torch.tensor(keep, device=device, dtype=torch.long),
        targets=torch.tensor(targets, device=device, dtype=torch.long),
        lengths=tuple(lengths),
    )


def _flags(row: Row) -> np.ndarray:
    flags = row.supervised
    return np.frombuffer(flags, np.uint8).astype(bool) if isinstance(flags, bytes) else np.array(flags, bool)


def _on(device: torch.device, values: np.ndarray) -> torch.Tensor:
    """The values on the device; from pinned memory, so that the copy does not wait for what the GPU is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def forward_logits(model: Any, batch: Pass) -> torch.Tensor:
    """Logits [rows, len(keep), vocabulary] at the columns that predict a supervised token.

    The head runs on those columns alone where the architecture allows it: over all tokens, logits are the memory peak.
    """
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(base.forward).parameters
    if "use_cache" not in parameters:
        del inputs["use_cache"]
    if "logits_to_keep" in parameters:
        return model(**inputs, logits_to_keep=batch.keep).logits
    return model(**inputs).logits[:, batch.keep]


def loss_sum(model: Any, batch: Pass) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the supervised tokens of the pass."""
    logits = forward_logits(model, batch).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")


def proof_pair(rows: Sequence[Row], *, compared: int, longest: int) -> tuple[Row, Row]:
    """The longest row and one of usual length, cut to `longest` tokens, of which the last `compared` are supervised: whatever
    a model does with far positions or a window shows there."""
    ordered = sorted(rows, key=lambda row: len(row.token_ids))
    lengths = [(row, min(longest, len(row.token_ids))) for row in (ordered[-1], ordered[len(ordered) // 4])]
    first, second = (
        Row(row.line, row.token_ids[:length], tuple(place >= length - compared for place in range(length)))
        for row, length in lengths
    )
    return first, second


@torch.no_grad()
def packing_proof(model: Any, rows: Sequence[Row], *, device: torch.device) -> tuple[bool, str]:
    """Whether rows packed into one pass get the logits that they get alone, and a sentence that says what was seen.

    On several architectures packing trains wrongly without an error (no position ids, state that runs on from row to
    row), so it is proven on two of the run's own rows before it is used: other tokens in the first must leave the logits
    of the second as they were, and each must get the logits that it gets alone.
    """
    accepted = set(inspect.signature(model.get_base_model().forward).parameters)
    if "position_ids" not in accepted:
        return False, "padded: the architecture takes no position ids"
    ordered = sorted(rows, key=lambda row: len(row.token_ids))
    pair = [ordered[len(ordered) // 4], ordered[len(ordered) // 4 - 1]]
    first, second = (Row(row.line, row.token_ids, (True,) * len(row.token_ids)) for row in pair)
    known = sorted({*first.token_ids, *second.token_ids})
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    other = replace(first, token_ids=tuple(following[token] for token in first.token_ids))
    was_training = model.training
    model.eval()
    try:
        alone, together, beside_other = (
            torch.cat(
                [forward_logits(model, make_pass(members, packed=True, device=device)) for members in passes], dim=1
            )
            for passes in ([[first], [second]], [[first, second]], [[other, second]])
        )
    finally:
        model.train(was_training)
    # Measured over 30 architectures: a row that cannot see another keeps its logits to the bit, to 1e-8 among
    # experts; one that can changes by 1e-3 to 1.5. Rounding, packed against alone: 1e-7 in fp32, in bf16 up to 2e-3 in
    # small models and 0.04 in a random one of 32 layers on an H100; positions that do not begin anew (OPT): 0.2 and more.
    spread, begin = alone.float().std(), len(first.token_ids) - 1
    seen = ((beside_other.float() - together.float())[0, begin:].pow(2).mean(dim=-1).sqrt().max() / spread).item()
    if not seen < 1e-5:
        return False, f"padded: packed rows would see each other (logits change by up to {seen:.1e} of their spread)"
    apart = (together.float() - alone.float())[0].abs().tensor_split([begin])
    difference = max((rows_logits.mean() / spread).item() for rows_logits in apart)
    if not difference < (1e-4 if alone.dtype == torch.float32 else 0.1):
        return (
            False,
            f"padded: packed rows get other logits than alone (they differ by {difference:.1e} of their spread)",
        )
    return True, f"packed: two rows in one pass differ from each alone by {difference:.1e} of the logits' spread"
