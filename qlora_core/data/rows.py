"""Lines of a JSONL file -> examples or problems, one at a time. Knows no model, and holds no more than one row."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import DatasetError

ALPACA, PROMPT_COMPLETION, MESSAGES = "Alpaca columns", "prompt/completion", "chat messages"
ROLES = ("system", "user", "assistant", "tool")
FORMS_HELP = (
    'expected {"instruction", "input", "output" or "response"}, {"prompt", "completion"} '
    'or {"messages": [{"role", "content"}]}'
)
# What other kinds of file start with, and what to do with them.
MAGIC = {
    b"PK\x03\x04": "a zip archive or spreadsheet; unpack it, or save the sheet as JSONL",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PAR1": "a Parquet file; save it as JSONL, one JSON object a line",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}
# Control characters other than tab, newline and carriage return; and halves of surrogate pairs, which no UTF-8 can hold.
UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation. `input` is Alpaca's second column, kept apart since the Alpaca template has a heading for it. `ignored` are
    columns that nothing is made of."""

    line: int
    messages: tuple[Message, ...]
    input: str = ""
    form: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The last response: what a generated answer is scored against."""
        return next(message.content for message in reversed(self.messages) if message.role == "assistant")

    def to_json(self) -> dict[str, Any]:
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return {"line": self.line, "messages": messages, "input": self.input}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Example":
        return cls(values["line"], tuple(Message(**message) for message in values["messages"]), values["input"])

    def digest(self) -> bytes:
        """SHA-256 of the canonical row, without its line number: equal content, equal digest."""
        content = {name: value for name, value in self.to_json().items() if name != "line"}
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Problem:
    """Why one line cannot be used; `kind` groups equal reasons."""

    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class BlankLine:
    line: int


class _Unusable(Exception):
    """Carries (kind, message) of a Problem from the depth of a check to the line it belongs to."""


class _DuplicateKey(Exception):
    pass


def check_readable(path: Path) -> None:
    """Raises DatasetError where no line of the file can be read: it is missing, empty or not text."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise DatasetError(f"{path.name}: is a folder; name the JSONL file in it")
        with path.open("rb") as file:
            head = file.read(8192)
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    if size <= len(head) and not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DatasetError(f"{path.name}: is empty; {FORMS_HELP}, one JSON object a line")
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise DatasetError(f"{path.name}: is {what}; expected text with one JSON object a line")
    if b"\x00" in head and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        raise DatasetError(f"{path.name}: is a binary file; expected text with one JSON object a line")
    if path.suffix.lower() in (".csv", ".tsv") and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        raise DatasetError(
            f"{path.name}: is a table, not JSONL; convert it: "
            f"`python -c \"import pandas; pandas.read_csv('{path.name}').to_json('rows.jsonl', orient='records', lines=True)\"`"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise DatasetError(
            f"{path.name}: is one JSON array; write one object a line instead (JSONL): `jq -c '.[]' {path.name} > rows.jsonl`"
        )


def read_rows(path: Path, *, max_row_bytes: int) -> Iterator[Example | Problem | BlankLine]:
    """Every line of the file in order, as what it is. Rows of another form than the first good one are problems.

    Raises DatasetError as `check_readable` does.
    """
    check_readable(path)
    form = None
    with path.open("rb") as file:
        line = 0
        while raw := file.readline(max_row_bytes + 2):
            line += 1
            if len(raw.removesuffix(b"\n").removesuffix(b"\r")) > max_row_bytes:
                yield Problem(line, "row too large", _too_large(file, raw, max_row_bytes))
                continue
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                yield BlankLine(line)
                continue
            try:
                values = _object(raw)
                found = _form(values)
                if form is not None and found != form:
                    raise _Unusable(
                        "mixed formats", f"has {found}, but the rows before it have {form}; keep one form a file"
                    )
                example = _example(line, values, found)
                form = found
                yield example
            except _Unusable as problem:
                yield Problem(line, *problem.args)


def form_of(values: dict[str, Any]) -> str | None:
    """The form that the row's keys belong to, or None."""
    if "messages" in values:
        return MESSAGES
    if "prompt" in values and "completion" in values:
        return PROMPT_COMPLETION
    if "instruction" in values:
        return ALPACA
    return None


def _too_large(file: Any, raw: bytes, limit: int) -> str:
    size = len(raw)
    while not raw.endswith(b"\n") and (raw := file.readline(1 << 20)):
        size += len(raw)
    return f"the row has {size:,} bytes, the limit is {limit:,}; split the row, or raise QLORA_LAB_MAX_ROW_BYTES if it is meant"


def _object(raw: bytes) -> dict[str, Any]:
    """The line as a JSON object. Raises _Unusable."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _Unusable(
            "invalid UTF-8", f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    if "\x00" in text:
        raise _Unusable("control character", f"holds a NUL byte at character {text.index(chr(0)) + 1}; remove it")
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateKey as error:
        raise _Unusable("duplicate key", f"the key {str(error)!r} occurs twice; keep one") from None
    except RecursionError:
        raise _Unusable("not JSON", "is nested too deeply; expected one flat object") from None
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            raise _Unusable(
                "truncated JSON", f"the JSON ends too early, after character {len(text.rstrip())}"
            ) from None
        raise _Unusable(
            "not JSON", f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
        ) from None
    except ValueError as error:
        raise _Unusable("not JSON", f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _Unusable("not an object", f"is a JSON {_json_type(values)}; {FORMS_HELP}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _json_type(value: Any) -> str:
    names = {bool: "boolean", str: "string", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def _form(values: dict[str, Any]) -> str:
    form = form_of(values)
    if form is None:
        keys = ", ".join(repr(key) for key in list(values)[:6]) or "none"
        raise _Unusable("unknown columns", f"has the keys {keys}; {FORMS_HELP}")
    return form


def _example(line: int, values: dict[str, Any], form: str) -> Example:
    extra = ""
    if form == MESSAGES:
        used, messages = ("messages",), _messages(values["messages"])
    elif form == PROMPT_COMPLETION:
        used = ("prompt", "completion")
        messages = (Message("user", _text(values, "prompt")), Message("assistant", _text(values, "completion")))
    else:
        answer = next((name for name in ("output", "response") if name in values), None)
        if answer is None:
            raise _Unusable("no response", "has no 'output' and no 'response'; each row needs the answer to learn")
        used = ("instruction", "input", answer)
        extra = _text(values, "input", needed=False)
        messages = (Message("user", _text(values, "instruction")), Message("assistant", _text(values, answer)))
    return Example(line, messages, extra, form, tuple(name for name in values if name not in used))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Unusable("no messages", f"'messages' is {_shown(value)}; expected a list of {{'role', 'content'}}")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise _Unusable(
                "wrong type", f"message {number} is a JSON {_json_type(item)}; expected {{'role', 'content'}}"
            )
        if item.get("role") not in ROLES:
            raise _Unusable(
                "unknown role", f"message {number} has the role {_shown(item.get('role'))}; use {', '.join(ROLES)}"
            )
        messages.append(Message(item["role"], _text(item, "content", where=f"message {number}: ")))
    if not any(message.role == "assistant" for message in messages):
        raise _Unusable("no response", "no message has the role 'assistant'; each conversation needs a reply to learn")
    if messages[0].role == "assistant":
        raise _Unusable("no prompt", "the first message is the assistant's; a reply needs something to reply to")
    return tuple(messages)


def _text(values: dict[str, Any], name: str, *, needed: bool = True, where: str = "") -> str:
    value = values.get(name)
    if not needed and value is None:
        return ""
    if not isinstance(value, str):
        missing = f"{where}{name!r} is missing" if name not in values else f"{where}{name!r} is {_shown(value)}"
        raise _Unusable("wrong type", f"{missing}; expected text")
    if needed and not value.strip():
        raise _Unusable(
            "empty response" if name in ("output", "response", "completion") else "empty text",
            f"{where}{name!r} is empty; write the text or remove the row",
        )
    if found := UNUSABLE.search(value):
        code = ord(found[0])
        what = "half of a surrogate pair" if code >= 0xD800 else "a control character"
        raise _Unusable(
            "control character",
            f"{where}{name!r} holds {what} (U+{code:04X}) at character {found.start() + 1}; remove it",
        )
    return value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:  # what could just be read may be too deep to write
        return f"a deeply nested {_json_type(value)}"
    return text if len(text) <= 40 else text[:37] + "…"
