"""Records -> examples and back, by the form they have: what a row says, and what is wrong with its values. Decides on no form."""

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_core.data.detection import ALPACA, BY_HAND, READ_NAMES, Detection, detect, form_of
from qlora_core.data.files import Watch, kind_of, read_records
from qlora_core.data.json_rows import FORMS_HELP
from qlora_core.data.limits import DEFAULT_LIMITS, Limits
from qlora_core.data.rows import (
    ROLES,
    TEXT_ROLE,
    BlankLine,
    Example,
    Message,
    Problem,
    Record,
    Unusable,
    json_type,
    shown,
)

# Looked at before the form of a file is decided.
LOOKED_AT, MOST_LOOKED_AT = 200, 50_000  # rows, and entries with those that are blank or damaged
LOOKED_AT_BYTES = 2_000_000
# What the speakers of ShareGPT conversations are called -> role.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Control characters other than tab, newline and carriage return; and halves of surrogate pairs, which no UTF-8 can hold.
# How deep a value may nest that nothing is made of: more would exhaust the stack of whoever writes it.
MOST_LEVELS = 100
UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_HALVES = re.compile("[\ud800-\udfff]")


def read_rows(
    path: Path, *, limits: Limits = DEFAULT_LIMITS, columns: str = "", watch: Watch | None = None
) -> tuple[Detection, Iterator[Example | Problem | BlankLine]]:
    """(how the file is read, every row of it in order as what it is). Rows of another form than the file's are problems.

    Raises DatasetError as `read_records` and `detect` do.
    """
    unit = kind_of(path).unit
    records = read_records(path, limits, watch=watch)
    looked: deque[Record | Problem | BlankLine] = deque()
    found: list[dict[str, Any]] = []
    size = 0
    while len(found) < LOOKED_AT and size < LOOKED_AT_BYTES and (record := next(records, None)):
        looked.append(record)
        if isinstance(record, Record):
            found.append(record.values)
            size += record.size
        elif len(looked) >= MOST_LOOKED_AT:
            break
    detection = detect(found, columns=columns)
    found.clear()
    return detection, (
        _row(record, detection, unit) if isinstance(record, Record) else record
        for record in chain(_taken(looked), records)
    )


def detection_of(path: Path, limits: Limits = DEFAULT_LIMITS) -> Detection:
    """How the file would be read, by its first rows. Raises DatasetError as `read_rows` does."""
    return read_rows(path, limits=limits)[0]


def _taken(entries: deque[Any]) -> Iterator[Any]:
    """Each entry once; what has been read is not held any longer."""
    while entries:
        yield entries.popleft()


def _row(record: Record, detection: Detection, unit: str) -> Example | Problem:
    try:
        return _example(record, detection)
    except Unusable as problem:
        return Problem(record.line, *problem.args, unit=unit)


def _example(record: Record, detection: Detection) -> Example:
    values = record.values
    if detection.form != BY_HAND:
        found = form_of(values)
        if found is None:
            keys = ", ".join(repr(key) for key in list(values)[:6]) or "none"
            raise Unusable("unknown columns", f"has the keys {keys}; {FORMS_HELP}")
        if found != detection.form:
            raise Unusable(
                "mixed formats",
                f"has {found}, but the file's rows have {detection.form}; keep one form a file (several files may differ)",
            )
    used: list[str] = []

    def column(role: str) -> str | None:
        name = next((name for name in detection.columns.get(role, ()) if name in values), None)
        if name is not None:
            used.append(name)
        return name

    reader = _Reader(values, record.is_clean)
    if "text" in detection.columns:
        messages, extra, tools = reader.plain_text(column("text") or detection.columns["text"][0]), "", ""
    elif "messages" in detection.columns:
        messages = reader.conversation(column("messages") or detection.columns["messages"][0])
        extra, tools = "", reader.tools(column("tools"))
    else:
        prompt = column("prompt") or detection.columns["prompt"][0]
        answer = column("response")
        if answer is None:
            names = " and no ".join(map(repr, detection.columns["response"]))
            raise Unusable("no response", f"has no {names}; each row needs the answer to learn")
        messages, extra, tools = reader.turn(prompt, answer), reader.text(column("input"), needed=False), ""
    if (system := column("system")) and (text := reader.text(system, needed=False)).strip():
        if messages[0].role == "system":
            raise Unusable("two system prompts", f"has {system!r} and a system message; keep one")
        messages = (Message("system", text), *messages)
    rest = {name: value for name, value in values.items() if name not in used} if len(values) > len(used) else {}
    rest |= reader.unread
    if too_deep(rest):
        raise Unusable(
            "nested too deeply", f"a column that is not read nests more than {MOST_LEVELS} levels; flatten it"
        )
    if rest and not reader.is_clean and _HALVES.search(json.dumps(rest, ensure_ascii=False, default=str)):
        raise Unusable("control character", "a column that is not read holds half of a surrogate pair; remove it")
    return Example(record.line, messages, extra, detection.form or "", rest, tools)


class _Reader:
    """Takes the values of one row apart. `unread` collects what stands in messages and is not made into tokens."""

    def __init__(self, values: dict[str, Any], is_clean: bool) -> None:
        self.values, self.is_clean = values, is_clean
        self.unread: dict[str, Any] = {}

    def text(self, name: str | None, *, needed: bool = True) -> str:
        if name is None or (not needed and self.values.get(name) is None):
            return ""
        if name not in self.values:
            raise Unusable("wrong type", f"{name!r} is missing; expected text")
        return self._checked(self.values[name], repr(name), needed=needed)

    def plain_text(self, name: str) -> tuple[Message, ...]:
        return (Message(TEXT_ROLE, self.text(name)),)

    def turn(self, prompt: str, answer: str) -> tuple[Message, ...]:
        """One question and one answer; each may also be a list of messages, as TRL has it."""
        if isinstance(self.values.get(prompt), list) and isinstance(self.values.get(answer), list):
            return self._conversation([*self.values[prompt], *self.values[answer]], f"{prompt}, {answer}")
        return Message("user", self.text(prompt)), Message("assistant", self._response(answer))

    def _response(self, name: str) -> str:
        value = self.values[name]
        if isinstance(value, str) and not value.strip():
            raise Unusable("empty response", f"{name!r} is empty; write the text or remove the row")
        return self.text(name)

    def _checked(self, value: Any, what: str, *, needed: bool = True) -> str:
        if not isinstance(value, str):
            raise Unusable("wrong type", f"{what} is {shown(value)}; expected text")
        if needed and not value.strip():
            raise Unusable("empty text", f"{what} is empty; write the text or remove the row")
        if not self.is_clean and (found := UNUSABLE.search(value)):
            code = ord(found[0])
            kind = "half of a surrogate pair" if code >= 0xD800 else "a control character"
            raise Unusable(
                "control character", f"{what} holds {kind} (U+{code:04X}) at character {found.start() + 1}; remove it"
            )
        return value

    def tools(self, name: str | None) -> str:
        """The tools that the conversation may call, as JSON text; empty without any."""
        value = self.values.get(name) if name else None
        if isinstance(value, str) and value.strip():
            value = self._json(value, what=repr(name))
        if value in (None, "", []) or (isinstance(value, str) and not value.strip()):
            return ""
        if too_deep(value):
            raise Unusable("nested too deeply", f"{name!r} nests more than {MOST_LEVELS} levels; flatten it")
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise Unusable("wrong type", f"{name!r} is {shown(value)}; expected a list of tools as JSON objects")
        return self._checked(json.dumps(value, ensure_ascii=False), repr(name))

    def conversation(self, name: str) -> tuple[Message, ...]:
        value = self.values.get(name)
        # Tables and Parquet files often hold the conversation as JSON text.
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = self._json(value, what=repr(name))
        return self._conversation(value, name)

    def _json(self, text: str, *, what: str = "") -> Any:
        """What the text says as JSON. Where it says nothing so: None, or Unusable with `what` it is."""
        # What is escaped in the text was hidden when the row was found to be clean.
        self.is_clean = self.is_clean and "\\" not in text
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if not what:
                return None
            raise Unusable(
                "not JSON", f"{what} is the text {shown(text)}, which is not JSON; write it as JSON"
            ) from None

    def _conversation(self, value: Any, name: str) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            raise Unusable("no messages", f"{name!r} is {shown(value)}; expected a list of {{'role', 'content'}}")
        messages = tuple(self._message(number, item) for number, item in enumerate(value, 1))
        if not any(message.role == "assistant" for message in messages):
            raise Unusable(
                "no response", "no message has the role 'assistant'; each conversation needs a reply to learn"
            )
        if messages[0].role == "assistant":
            raise Unusable("no prompt", "the first message is the assistant's; a reply needs something to reply to")
        return messages

    def _message(self, number: int, item: Any) -> Message:
        if not isinstance(item, dict):
            raise Unusable(
                "wrong type", f"message {number} is a JSON {json_type(item)}; expected {{'role', 'content'}}"
            )
        speaker, text = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
        said = item.get(speaker)
        role = said if said in ROLES else _SPEAKERS.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None or (speaker == "role" and said not in (*ROLES, "function")):
            allowed = ROLES if speaker == "role" else tuple(_SPEAKERS)
            raise Unusable(
                "unknown role", f"message {number} has the {speaker} {shown(said)}; use {', '.join(allowed)}"
            )
        where, content = f"message {number}: {text!r}", item.get(text)
        calls = self._calls(number, item.get("tool_calls") or item.get("function_call"))
        if item.get("tool_calls") and item.get("function_call"):
            self.unread.setdefault("function_call of messages", item["function_call"])
        if said == "function_call" and isinstance(content, str) and (call := self._json(content)) is not None:
            calls, content = self._calls(number, call), None
        if isinstance(content, list):
            content = self._parts(number, content)
        for key, value in item.items():
            if key not in (speaker, text, "tool_calls", "function_call") and value is not None:
                self.unread.setdefault(f"{key} of messages", value)
        if calls and content in (None, ""):
            return Message(role, "", calls)
        if text not in item:
            raise Unusable("wrong type", f"{where} is missing; expected text")
        # What a tool answers may be nothing; what a person or the model says may not.
        return Message(role, self._checked(content, where, needed=role != "tool"), calls)

    def _parts(self, number: int, parts: list[Any]) -> str:
        """OpenAI's list of parts, if all of them are text."""
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise Unusable(
                    "not text", f"message {number} holds a part of type {shown(kind)}; only text can be trained on"
                )
        return "\n".join(part["text"] for part in parts)

    def _calls(self, number: int, value: Any) -> str:
        """Tool calls of a message as JSON text: arguments as an object, which is what chat templates expect."""
        if isinstance(value, str) and value.strip():  # as Parquet files hold it
            value = self._json(value, what=f"message {number}: 'tool_calls'")
        if not value or (isinstance(value, str) and not value.strip()):
            return ""
        calls = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise Unusable(
                    "wrong type", f"message {number} has a tool call {shown(call)}; expected a function's name"
                )
            arguments = function.get("arguments", {})
            if isinstance(arguments, str) and isinstance(found := self._json(arguments), dict):
                arguments = found
            for key, part in call.items():
                if key not in ("function", "name", "arguments") and part is not None:
                    self.unread.setdefault(f"{key} of tool calls", part)
            calls.append({"name": function["name"], "arguments": arguments})
        if too_deep(calls):
            raise Unusable("nested too deeply", f"message {number} has a tool call of more than {MOST_LEVELS} levels")
        return self._checked(json.dumps(calls, ensure_ascii=False), f"message {number}: 'tool_calls'")


def row_of(example: Example, form: str) -> dict[str, Any]:
    """The example as a row of that form, from which `canonical` of it is read again; its other columns come last.

    All forms but Alpaca columns and plain text become chat messages. Raises ValueError where another column has a name that
    a form reads (see `free_name`).
    """
    if taken := [name for name in example.columns if name != free_name(name)]:
        raise ValueError(f"columns {taken} would be read as part of the conversation")
    example = canonical(example, form)
    if example.is_text:
        return {"text": example.messages[0].content} | example.columns
    if form == ALPACA:
        *system, prompt, answer = example.messages
        row = {"instruction": prompt.content, "input": example.input, "output": answer.content}
        return row | ({"system": system[0].content} if system else {}) | example.columns
    row = {"messages": [_message_row(message) for message in example.messages]}
    return row | ({"tools": json.loads(example.tools)} if example.tools else {}) | example.columns


def canonical(example: Example, form: str) -> Example:
    """The example as rows of that form hold it: outside of Alpaca columns its input stands where chat templates put it."""
    if form == ALPACA or not example.input:
        return example
    asked = next(i for i, message in enumerate(example.messages) if message.role == "user")
    message = example.messages[asked]
    whole = replace(message, content=f"{message.content}\n\n{example.input}")
    return replace(example, messages=(*example.messages[:asked], whole, *example.messages[asked + 1 :]), input="")


def fits_alpaca(example: Example) -> bool:
    """Whether Alpaca columns hold all of it: one question and one answer, after a system prompt or none."""
    roles = [message.role for message in example.messages]
    plain = not example.tools and not any(message.tool_calls for message in example.messages)
    return example.form == ALPACA and plain and roles in (["user", "assistant"], ["system", "user", "assistant"])


def free_name(name: str) -> str:
    """A name for a column that no form reads: its own where that is free."""
    return f"original_{name}" if name in READ_NAMES else name


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [{"type": "function", "function": call} for call in json.loads(message.tool_calls)]
    return row


def too_deep(value: Any) -> bool:
    """Whether lists and objects nest more than MOST_LEVELS deep."""
    level = [value]
    for _ in range(MOST_LEVELS):
        if not (
            level := [
                part
                for inner in level
                for part in (inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
                if isinstance(part, (dict, list))
            ]
        ):
            return False
    return True
