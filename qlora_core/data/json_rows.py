"""Bytes -> JSON objects, strictly: no key twice, no NaN, no half characters. Fast where a row is plain, exact where not."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from qlora_core.data.rows import ROW, Problem, Unusable, json_type

FORMS_HELP = (
    'expected {"instruction", "input", "output"}, {"prompt", "completion"}, {"messages": [{"role", "content"}]}, '
    '{"conversations": [{"from", "value"}]} or {"text"}'
)
CHUNK = 1 << 20
# As many as there are keys, and one more for each text that begins with a colon or has `":` in it.
_KEY_ENDS = re.compile(rb'"[ \t\r\n]*+:')
# Letters that no JSON value begins with, nor what `json` takes for one.
_BEGINS_NONE = frozenset(
    bytes([letter]) for letter in range(128) if chr(letter).isalpha() and chr(letter) not in "tfnNI"
)
_LONG_NUMBER = re.compile(rb"\d{19}")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


class _DuplicateKey(Exception):
    pass


def parsed(raw: bytes) -> tuple[dict[str, Any], bool]:
    """(the object, whether its texts are surely free of control and half characters). Raises Unusable.

    orjson reads it; only what it refuses, and rows in which a key might occur twice, are read again by the slower
    `json`, which says what is wrong and where.
    """
    if raw[:1] in _BEGINS_NONE and raw.isascii() and b"\x00" not in raw:
        raise Unusable("not JSON", "is not JSON: Expecting value at character 1")  # without two readers that say so
    try:
        values = orjson.loads(raw)
    except (orjson.JSONDecodeError, RecursionError):
        return _exact(raw), False
    if type(values) is not dict:
        raise Unusable("not an object", f"is a JSON {json_type(values)}; {FORMS_HELP}")
    try:
        may_repeat = len(_KEY_ENDS.findall(raw)) != _keys(values)
    except RecursionError:
        may_repeat = True
    # orjson makes a float of a whole number that 64 bits do not hold.
    if may_repeat or (not all(type(value) is str for value in values.values()) and _LONG_NUMBER.search(raw)):
        values = _exact(raw)
    # Valid JSON writes control characters as escapes; DEL alone may stand as it is.
    unclean = b"\\u00" in raw or b"\\b" in raw or b"\\f" in raw or b"\x7f" in raw
    return values, not unclean


def _keys(value: Any) -> int:
    """How many keys the value has, at all depths."""
    if type(value) is dict:
        return len(value) + sum(_keys(v) for v in value.values() if type(v) is dict or type(v) is list)
    return sum(_keys(v) for v in value if type(v) is dict or type(v) is list)


def _exact(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Unusable(
            "invalid UTF-8", f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    if "\x00" in text:
        raise Unusable("control character", f"holds a NUL byte at character {text.index(chr(0)) + 1}; remove it")
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateKey as error:
        raise Unusable("duplicate key", f"the key {str(error)!r} occurs twice; keep one") from None
    except RecursionError:
        raise Unusable("not JSON", "is nested too deeply; expected one flat object") from None
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            raise Unusable("truncated JSON", f"the JSON ends too early, after character {len(text.rstrip())}") from None
        raise Unusable(
            "not JSON", f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
        ) from None
    except ValueError as error:
        raise Unusable("not JSON", f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Unusable("not an object", f"is a JSON {json_type(values)}; {FORMS_HELP}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKey(next(key for key, count in counts.items() if count > 1))
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def array_elements(file: BinaryIO, row_bytes: int) -> Iterator[tuple[int, bytes | Problem]]:
    """(number from 1, bytes) of each element of a file that is one JSON array; a damaged element costs no other.

    Cuts at the commas and brackets outside of texts, without reading what is between them.
    """
    buffer, position, element, depth, number, ended = b"", 0, -1, 0, 0, False
    skipped = 0  # bytes of an element that is too large, which are read and forgotten
    while True:
        for token in _TOKEN.finditer(buffer, position):
            mark = token[0]
            if token.end() == len(buffer) and mark.startswith(b'"') and not ended:
                break  # the text may go on in the next chunk
            position = token.end()
            if mark == b"[" or mark == b"{":
                depth += 1
                if depth == 1:
                    element = position
            elif mark == b"]" or mark == b"}" or (mark == b"," and depth == 1):
                depth -= mark != b","
                if depth == 0 or mark == b",":
                    raw, more = buffer[element : position - 1], mark == b"," or number or skipped
                    element = position
                    if raw.strip() or more:
                        number += 1
                        yield number, _element(raw, number, skipped, row_bytes)
                    skipped = 0
                if depth == 0:
                    tail = buffer[position:] + file.read(CHUNK)
                    if tail.strip():
                        number += 1
                        text = "something follows the end of the JSON array; it is not read"
                        yield number, Problem(number, "not JSON", text, ROW)
                    return
        begin = max(0, element)
        if position - begin > row_bytes:
            skipped += position - begin
            begin = element = position
        if len(buffer) - begin > row_bytes + CHUNK:
            number += 1
            text = f"a text of more than {row_bytes:,} bytes begins here, and nothing after it can be read; is a quote missing?"
            yield number, Problem(number, "row too large", text, ROW)
            return
        if ended:
            if depth == 1 and buffer[begin:].strip():  # the last row may be whole
                number += 1
                yield number, _element(buffer[begin:], number, skipped, row_bytes)
            number += 1
            text = "the JSON array is not closed" if depth == 1 else "the file ends inside this row"
            yield number, Problem(number, "truncated JSON", text, ROW)
            return
        chunk = file.read(CHUNK)
        ended = not chunk
        buffer, position, element = buffer[begin:] + chunk, position - begin, 0 if element >= 0 else -1


def _element(raw: bytes, number: int, skipped: int, row_bytes: int) -> bytes | Problem:
    size = len(raw) + skipped
    if size > row_bytes:
        text = f"the row has {size:,} bytes, the limit is {row_bytes:,}; split it, or raise QLORA_LAB_MAX_ROW_BYTES if it is meant"
        return Problem(number, "row too large", text, ROW)
    if not raw.strip():
        return Problem(number, "not JSON", "is empty; there is a comma too many", ROW)
    return raw
