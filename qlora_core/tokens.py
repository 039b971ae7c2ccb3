"""An example -> token ids and loss mask. The preview, the training batches and generation call the same functions.

Must not import torch: the web process renders too, with the tokenizer as `PreTrainedTokenizerFast`.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core import templates
from qlora_core.data.rows import Example, Message
from qlora_core.errors import DatasetError, ModelError

ALL_RESPONSES, LAST_RESPONSE, EVERYTHING = "all_responses", "last_response", "everything"
# Rows that the tokenizer's own threads share; more gain nothing and hold more text in memory.
BATCH = 512

# transformers imports its parts when they are named, and two threads of the page naming one at once make it fail.
_IMPORTING = threading.Lock()


@dataclass(frozen=True)
class RenderedExample:
    """One row as the model sees it. `token_ids` [tokens] and `supervised` [tokens] are the whole row, before any cut.

    `spans` [tokens, 2] are the character offsets (start, end) of each token in `text`. `end_position`: the token that ends
    the last response, which the model learns to stop with; -1 where there is none.
    """

    line: int
    text: str
    token_ids: np.ndarray
    supervised: np.ndarray
    spans: np.ndarray
    end_position: int

    def supervised_tokens(self, max_seq_length: int) -> int:
        """Tokens that the loss counts, cut to that length. The first token of a row is never predicted."""
        return int(self.supervised[1:max_seq_length].sum())

    def end_supervised(self, max_seq_length: int) -> bool:
        """Whether the model learns to stop here: the end token is learnt, and not cut away."""
        return 0 <= self.end_position < max_seq_length


@dataclass(frozen=True)
class Refused:
    """A row that the template refuses, and why."""

    line: int
    problem: str


@lru_cache(maxsize=8)
def load_tokenizer(folder: Path, template: str = templates.MODEL) -> Any:
    """The tokenizer of a model folder, as the fast tokenizer its tokenizer.json describes, with the chosen template.

    Raises ModelError, and ConfigError for a typed-in template that does not parse.
    """
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
    tokenizer.chat_template = templates.template_text(template, tokenizer)
    return tokenizer


def template_name(tokenizer: Any, template: str = templates.MODEL) -> str:
    """What a person calls the template that rows are written with."""
    if template == templates.MODEL:
        is_alpaca = tokenizer.chat_template == templates.ALPACA
        return templates.NAMES["alpaca"] if is_alpaca else "the model's chat template"
    return templates.NAMES.get(template, "a chat template of your own")


def render(example: Example, tokenizer: Any, *, loss_on: str = ALL_RESPONSES) -> RenderedExample:
    """Tokens of a whole conversation with what is learnt, end tokens included.

    A token is supervised when it begins inside a response, so that a prompt has the same tokens here and at
    generation. Raises DatasetError where the template refuses the conversation.
    """
    (rendered,) = render_many([example], tokenizer, loss_on=loss_on)
    if isinstance(rendered, Refused):
        raise DatasetError(rendered.problem)
    return rendered


def render_many(
    examples: Iterable[Example], tokenizer: Any, *, loss_on: str = ALL_RESPONSES
) -> Iterator[RenderedExample | Refused]:
    """`render` of each, in order, with the tokenizer's own threads."""
    special = np.array(sorted(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)))
    waiting = iter(examples)
    while batch := list(islice(waiting, BATCH)):
        written = [_written(example, tokenizer) for example in batch]
        texts = [entry[0] for entry in written if not isinstance(entry, Refused)]
        encodings = iter(_encode_batch(texts, tokenizer))
        for example, entry in zip(batch, written, strict=True):
            if isinstance(entry, Refused):
                yield entry
                continue
            text, responses = entry
            ids, spans = _split_at_responses(text, [begin for begin, _ in responses], next(encodings), tokenizer)
            learnt = responses[-1:] if loss_on == LAST_RESPONSE else responses
            supervised, end = _learnt(text, ids, spans, learnt, special)
            if loss_on == EVERYTHING:
                supervised[:] = True
            yield RenderedExample(example.line, text, ids, supervised, spans, end)


def _learnt(
    text: str, ids: np.ndarray, spans: np.ndarray, responses: Sequence[tuple[int, int]], special: np.ndarray
) -> tuple[np.ndarray, int]:
    """(supervised [tokens], position of the last end token that is learnt, or -1)."""
    supervised, end_position = np.zeros(len(ids), bool), -1
    starts, stops = spans[:, 0], spans[:, 1]
    is_special = np.isin(ids, special)
    for begin, end in responses:
        # Where a tokenizer trims white space from its offsets, a token of white space has none left, at its end.
        inside = (begin <= starts) & (stops <= end) & ((stops > starts) | (starts > begin))
        ends = np.flatnonzero(inside & is_special)
        # What a template writes after the end token (often a newline) is never generated, so it is not learnt.
        if len(ends) and not text[stops[ends[-1]] : end].strip():
            inside[ends[-1] + 1 :] = False
            end_position = int(ends[-1])
        supervised |= inside
    return supervised, end_position


def _encode_batch(texts: list[str], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [tokens], spans [tokens, 2]) of each text."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
        (np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2))
        for encoding in encodings
    ]


def _split_at_responses(
    text: str, begins: list[int], encoded: tuple[np.ndarray, np.ndarray], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Where a prompt would have other tokens alone than before its response, as it has at generation, the text is encoded in
    pieces: a token reaches into the response (both white space, mostly), or what follows decides how white space is cut."""
    starts, stops = encoded[1][:, 0], encoded[1][:, 1]

    def differs(begin: int) -> bool:
        if ((starts < begin) & (begin < stops)).any():
            return True
        if not text[max(0, begin - 2) : begin].isspace() or begin < 2:
            return False
        alone = _encode_batch([text[:begin]], tokenizer)[0][0]
        return not np.array_equal(alone, encoded[0][: len(alone)])

    crossed = [begin for begin in begins if differs(begin)]
    if not crossed:
        return encoded
    bounds = list(pairwise([0, *crossed, len(text)]))
    pieces = _encode_batch([text[begin:end] for begin, end in bounds], tokenizer)
    spans = [spans + begin for (begin, _), (_, spans) in zip(bounds, pieces, strict=True)]
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate(spans)


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Tokens of everything before the last response: what generation continues. Raises DatasetError for a plain text."""
    if example.is_text:
        raise DatasetError(f"line {example.line}: is plain text, which has no response to score; set score to none")
    last = _last_response(example)
    text = _chat(example, last, tokenizer, True)
    earlier = [begin for begin, _ in _text_and_responses(example, tokenizer)[1] if begin < len(text)]
    return _split_at_responses(text, earlier, _encode_batch([text], tokenizer)[0], tokenizer)[0].tolist()


def end_token(example: Example, tokenizer: Any) -> int | None:
    """The token that ends the example's last response; None where the template ends it with none."""
    rendered = render(example, tokenizer)
    return int(rendered.token_ids[rendered.end_position]) if rendered.end_position >= 0 else None


def _last_response(example: Example) -> int:
    return max(i for i, message in enumerate(example.messages) if message.role == "assistant")


def _written(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]] | Refused:
    try:
        return _text_and_responses(example, tokenizer)
    except DatasetError as error:
        return Refused(example.line, str(error))


def _text_and_responses(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and the (start, end) characters of each response, its end token included."""
    if example.is_text:
        begin = tokenizer.bos_token if _begins_with_bos(tokenizer) else ""
        text = f"{begin}{example.messages[0].content}{tokenizer.eos_token}"
        return text, [(len(begin), len(text))]
    count = len(example.messages)
    text = _chat(example, count, tokenizer, False)
    responses = []
    for i, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        before = _chat(example, i, tokenizer, True)
        after = text if i + 1 == count else _chat(example, i + 1, tokenizer, False)
        # Some templates write earlier turns another way once more follow; those turns cannot be told apart and are
        # not learnt. The last response always can, or the template is unusable for training.
        if text.startswith(after) and after.startswith(before):
            responses.append((len(before), len(after)))
            _check_written(example, message, after[len(before) :], tokenizer)
    last = _last_response(example)
    if not responses or (responses[-1][1] < len(text.rstrip()) and last == count - 1):
        raise DatasetError(
            f"line {example.line}: the chat template does not show where a response begins; choose another template"
        )
    if unsaid := [name for name in _tool_names(example) if name not in text]:
        raise DatasetError(
            f"line {example.line}: the chat template leaves out the tool {unsaid[0]!r}; choose a template that writes tools, or "
            "read the conversation alone (columns: messages=…)"
        )
    begin, end = responses[-1]
    if last == count - 1 and not _ends_with_special(text[begin:end], tokenizer):
        text = text[:end] + tokenizer.eos_token
        responses[-1] = (begin, len(text))
    return text, responses


def _check_written(example: Example, message: Message, response: str, tokenizer: Any) -> None:
    """Raises DatasetError where the template leaves a response, or the calls in it, out of what it writes."""
    called = [call["name"] for call in json.loads(message.tool_calls)] if message.tool_calls else []
    if unsaid := [name for name in called if name not in response]:
        raise DatasetError(
            f"line {example.line}: the chat template leaves out the call of the tool {unsaid[0]!r}; choose a template that "
            "writes tool_calls, or put the call into the content"
        )
    said = message.content
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        response, said = response.replace(token, ""), said.replace(token, "")
    if said.strip() and not response.strip():
        raise DatasetError(
            f"line {example.line}: the chat template leaves the response out, so there is nothing to learn; choose another"
        )


def _tool_names(example: Example) -> list[str]:
    """Names of the tools that the conversation may call, in OpenAI's form or plain."""
    if not example.tools:
        return []
    tools = [tool.get("function", tool) for tool in json.loads(example.tools)]
    return [tool["name"] for tool in tools if isinstance(tool, dict) and isinstance(tool.get("name"), str)]


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the model's texts begin with its bos token: its own encoding of a text says so."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _ends_with_special(text: str, tokenizer: Any) -> bool:
    tail = text.rstrip()
    return any(tail.endswith(str(token)) for token in tokenizer.added_tokens_decoder.values())


def _chat(example: Example, count: int, tokenizer: Any, generation_prompt: bool) -> str:
    """The first `count` messages through the chat template."""
    messages = [_for_template(message) for message in example.messages[:count]]
    if example.input:
        asked = next((message for message in messages if message["role"] == "user"), None)
        if asked is not None and tokenizer.chat_template == templates.ALPACA:
            asked["input"] = messages[0]["input"] = example.input
        elif asked is not None:
            asked["content"] += f"\n\n{example.input}"
    tools = json.loads(example.tools) if example.tools else None
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program that anybody may have written
        raise DatasetError(
            f"line {example.line}: the chat template refuses the row: {templates.error_text(error)}"
        ) from None


def _for_template(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        values["tool_calls"] = [{"type": "function", "function": call} for call in json.loads(message.tool_calls)]
    return values
