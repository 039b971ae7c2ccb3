"""An example -> token ids and loss mask. The preview, the training batches and generation call the same functions.

Must not import torch: the web process renders too, with the tokenizer as `PreTrainedTokenizerFast`.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qlora_core.data.rows import Example
from qlora_core.errors import DatasetError, ModelError

ALPACA_TEMPLATE = "Alpaca template"
CHAT_TEMPLATE = "the model's chat template"
# The prompt of Stanford Alpaca (Taori et al. 2023) as a chat template, later turns appended. As such it is saved
# with the adapter, so that inference uses what training used.
ALPACA = (
    "{{ bos_token or '' }}Below is an instruction that describes a task"
    "{% if messages[0].input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request."
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' }}{{ message.content }}"
    "{% if message.input %}{{ '\\n\\n### Input:\\n' }}{{ message.input }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    "{% else %}{{ '\\n\\n' }}{{ message.content }}{% endif %}"
    "{% endfor %}"
)

# transformers imports its parts when they are named, and two threads of the page naming one at once make it fail.
_IMPORTING = threading.Lock()


@dataclass(frozen=True)
class RenderedExample:
    """One row as the model sees it. `token_ids` and `supervised` are the whole row; training takes `[:cut_at]` of both.

    `spans` are the character offsets (start, end) of each token in `text`. `end_supervised`: the last response's end
    token is learnt, so that the model learns to stop (False where the cut takes it away).
    """

    line: int
    text: str
    token_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    spans: tuple[tuple[int, int], ...]
    cut_at: int
    end_supervised: bool

    @property
    def is_cut(self) -> bool:
        return self.cut_at < len(self.token_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that the loss counts. The first token of a row is never predicted."""
        return sum(self.supervised[1 : self.cut_at])


@lru_cache(maxsize=4)
def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as the fast tokenizer its tokenizer.json describes. Raises ModelError."""
    with _IMPORTING:
        from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ModelError(
            f"{folder}: has no tokenizer.json, only fast tokenizers are supported; on a machine with the model, "
            "`AutoTokenizer.from_pretrained(…).save_pretrained(…)` writes one"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelError(f"{folder}/tokenizer.json: cannot be read: {error}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"{folder}: its tokenizer names no end token (eos_token); responses could never end")
    if not tokenizer.chat_template:
        tokenizer.chat_template = ALPACA
    return tokenizer


def template_name(tokenizer: Any) -> str:
    return ALPACA_TEMPLATE if tokenizer.chat_template == ALPACA else CHAT_TEMPLATE


def render(example: Example, tokenizer: Any, *, max_seq_length: int) -> RenderedExample:
    """Tokens of a whole conversation with every response supervised, its end token included.

    A token is supervised when it begins inside a response, so that a prompt has the same tokens here and at
    generation. Raises DatasetError where the template refuses the conversation.
    """
    text, responses = _text_and_responses(example, tokenizer)
    ids, spans = _encode(text, [begin for begin, _ in responses], tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    supervised, end_position = [False] * len(ids), -1
    for begin, end in responses:
        # Where a tokenizer trims white space from its offsets, a token of white space has none left, at its end.
        inside = [
            i
            for i, (start, stop) in enumerate(spans)
            if begin <= start and stop <= end and (stop > start or start > begin)
        ]
        ends = [i for i in inside if ids[i] in special]
        # What a template writes after the end token (often a newline) is never generated, so it is not learnt.
        if ends and not text[spans[ends[-1]][1] : end].strip():
            inside = [i for i in inside if i <= ends[-1]]
            end_position = ends[-1]
        for i in inside:
            supervised[i] = True
    cut_at = min(len(ids), max_seq_length)
    return RenderedExample(
        example.line, text, tuple(ids), tuple(supervised), tuple(spans), cut_at, 0 <= end_position < cut_at
    )


def _encode(text: str, begins: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and spans of the text. Where a token would reach from a prompt into its response (both white space,
    mostly), the text is encoded in pieces, since at generation the prompt stands alone."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    crossed = [begin for begin in begins if any(start < begin < stop for start, stop in spans)]
    if not crossed:
        return ids, spans
    ids, spans = [], []
    for begin, end in pairwise([0, *crossed, len(text)]):
        piece = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += piece["input_ids"]
        spans += [(begin + start, begin + stop) for start, stop in piece["offset_mapping"]]
    return ids, spans


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Tokens of everything before the last response: what generation continues."""
    last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
    text = _chat(example, last, tokenizer, True)
    earlier = [begin for begin, _ in _text_and_responses(example, tokenizer)[1] if begin < len(text)]
    return _encode(text, earlier, tokenizer)[0]


def _text_and_responses(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and the (start, end) characters of each response, its end token included."""
    text = _chat(example, len(example.messages), tokenizer, False)
    responses = []
    for i, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        before, after = _chat(example, i, tokenizer, True), _chat(example, i + 1, tokenizer, False)
        # Some templates write earlier turns another way once more follow; those turns cannot be told apart and are
        # not learnt. The last response always can, or the template is unusable for training.
        if text.startswith(after) and after.startswith(before):
            responses.append((len(before), len(after)))
    last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
    if not responses or (responses[-1][1] < len(text.rstrip()) and last == len(example.messages) - 1):
        raise DatasetError(
            f"line {example.line}: the model's chat template does not show where a response begins; "
            "choose a base model with another template"
        )
    begin, end = responses[-1]
    if last == len(example.messages) - 1 and not _ends_with_special(text[begin:end], tokenizer):
        text = text[:end] + tokenizer.eos_token
        responses[-1] = (begin, len(text))
    return text, responses


def _ends_with_special(text: str, tokenizer: Any) -> bool:
    tail = text.rstrip()
    return any(tail.endswith(str(token)) for token in tokenizer.added_tokens_decoder.values())


def _chat(example: Example, count: int, tokenizer: Any, generation_prompt: bool) -> str:
    """The first `count` messages through the model's chat template."""
    messages = [{"role": message.role, "content": message.content} for message in example.messages[:count]]
    if example.input and messages:
        if tokenizer.chat_template == ALPACA:
            messages[0]["input"] = example.input
        else:
            messages[0]["content"] += f"\n\n{example.input}"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DatasetError(f"line {example.line}: the model's chat template refuses the row: {error}") from None
