"""What a dataset consists of: records, examples, problems, blank lines. Knows no file, no format and no model."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

ROLES = ("system", "user", "assistant", "tool")
# The one message of a row that is plain text, not a conversation: all of it is learnt.
TEXT_ROLE = "text"
LINE, ROW = "line", "row"


@dataclass(frozen=True, slots=True)
class Record:
    """One row as columns and values, and about how many bytes they were. `is_clean`: no text in it can hold control
    characters or half characters."""

    line: int
    values: dict[str, Any]
    size: int
    is_clean: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` is the JSON text of [{"name", "arguments"}], empty without any."""

    role: str
    content: str
    tool_calls: str = ""

    def to_json(self) -> dict[str, Any]:
        values = {"role": self.role, "content": self.content}
        return values | {"tool_calls": self.tool_calls} if self.tool_calls else values


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, or one plain text. `input` is Alpaca's second column, kept apart since the Alpaca template has a
    heading for it. `tools` is the JSON text of the tools that the conversation may call. `columns` holds the values of
    columns that no token is made of. `line` tells the row from all others of its file."""

    line: int
    messages: tuple[Message, ...]
    input: str = ""
    form: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)
    tools: str = ""

    @property
    def is_text(self) -> bool:
        return self.messages[0].role == TEXT_ROLE

    @property
    def reference(self) -> str:
        """The last response: what a generated answer is scored against. Of a plain text, the text."""
        return next(message.content for message in reversed(self.messages) if message.role in ("assistant", TEXT_ROLE))

    @property
    def asked(self) -> str:
        """What the last response answers, for a person to read: the turns before it, each with its role where there are several."""
        last = max(i for i, message in enumerate(self.messages) if message.role in ("assistant", TEXT_ROLE))
        texts = [message.content for message in self.messages[:last]]
        if self.input and texts:
            texts[0] += f"\n\n{self.input}"
        if len(texts) < 2:
            return "".join(texts)
        return "\n\n".join(f"{m.role}: {text}" for m, text in zip(self.messages[:last], texts, strict=True))

    @property
    def text(self) -> str:
        """All that a person wrote in it, one part a line."""
        parts = [message.content for message in self.messages]
        return "\n".join([parts[0], self.input, *parts[1:]] if self.input else parts)

    def mapped(self, change: Callable[[str], str]) -> "Example":
        """The example with every text of its conversation changed; itself where nothing is."""
        messages = tuple(
            message if (text := change(message.content)) == message.content else replace(message, content=text)
            for message in self.messages
        )
        extra = change(self.input) if self.input else ""
        if extra == self.input and all(new is old for new, old in zip(messages, self.messages, strict=True)):
            return self
        return replace(self, messages=messages, input=extra)

    def mapped_whole(self, change: Callable[[str], str]) -> "Example":
        """As `mapped`, with the texts in tool calls, tools and all other columns too."""
        example = self.mapped(change)
        messages = tuple(
            replace(message, tool_calls=_changed_json(message.tool_calls, change)) if message.tool_calls else message
            for message in example.messages
        )
        tools = _changed_json(self.tools, change) if self.tools else ""
        columns = _changed(self.columns, change) if self.columns else self.columns
        if (messages, tools, columns) == (example.messages, self.tools, self.columns):
            return example
        return replace(example, messages=messages, tools=tools, columns=columns)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"line": self.line, "messages": [message.to_json() for message in self.messages]}
        values["input"] = self.input
        return values | {"tools": self.tools} if self.tools else values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Example":
        messages = tuple(Message(**message) for message in values["messages"])
        return cls(values["line"], messages, values["input"], tools=values.get("tools", ""))

    def digest(self) -> bytes:
        """SHA-256 of the canonical row, without its line number: equal content, equal digest."""
        content = [[m.role, m.content, m.tool_calls] for m in self.messages]
        return hashlib.sha256(orjson.dumps([content, self.input, self.tools])).digest()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one row cannot be used; `kind` groups equal reasons. Where a file has no lines, `unit` says so."""

    line: int
    kind: str
    message: str
    unit: str = LINE

    def __str__(self) -> str:
        return f"{self.unit} {self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class BlankLine:
    line: int


Records = Iterator[Record | Problem | BlankLine]


class Unusable(Exception):
    """Carries (kind, message) of a Problem from the depth of a check to the row it belongs to."""


def counted(number: int, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def json_type(value: Any) -> str:
    names = {bool: "boolean", str: "string", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def shown(value: Any) -> str:
    """A value in a message, at most 40 characters of it."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:  # what could just be read may be too deep to write
        return f"a deeply nested {json_type(value)}"
    return text if len(text) <= 40 else text[:37] + "…"


def _changed_json(text: str, change: Callable[[str], str]) -> str:
    changed = _changed(found := json.loads(text), change)
    return text if changed == found else json.dumps(changed, ensure_ascii=False)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, int) and not isinstance(value, bool):  # a card number may be written as one
        changed = change(str(value))
        return value if changed == str(value) else changed
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list) else value
