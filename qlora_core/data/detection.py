"""The form that a file's rows have, by the columns in them: known, chosen by hand, or proposed. Knows no file, makes no example."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_core.errors import DatasetError

ALPACA, PROMPT_COMPLETION, MESSAGES = "Alpaca columns", "prompt/completion", "chat messages"
SHAREGPT, TEXT, BY_HAND = "ShareGPT conversations", "plain text", "columns chosen by hand"
_QUOTED_PART = re.compile(r'\s*+(?P<role>\w*+)\s*+=\s*+"(?P<name>(?:[^"]|"")*+)"\s*+(?:,|\Z)')
# What a column can be for. The first four make a conversation of one turn.
COLUMN_ROLES = ("prompt", "response", "input", "system", "messages", "tools", "text")
# Names that other datasets have for the same; proposed, never taken without a word.
_PROMPTS = (
    "question",
    "query",
    "instruction",
    "prompt",
    "input",
    "user",
    "human",
    "problem",
    "source",
    "request",
    "en",
)
_RESPONSES = (
    "answer",
    "response",
    "output",
    "completion",
    "target",
    "assistant",
    "solution",
    "reply",
    "label",
    "summary",
)
_CONVERSATIONS = ("conversation", "dialogue", "dialog", "chat", "turns", "history")
_TEXTS = ("content", "body", "document", "article", "passage", "story")


@dataclass(frozen=True)
class Detection:
    """How the rows of a file are read. `columns`: what each role's column may be called; a row has the first that is there.
    Without a form the rows cannot be read, and `proposal` is what a person may confirm, role -> column."""

    form: str | None
    reason: str
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    proposal: dict[str, str] = field(default_factory=dict)
    seen: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Detection":
        columns = {role: tuple(names) for role, names in values["columns"].items()}
        return cls(values["form"], values["reason"], columns, values["proposal"], tuple(values["seen"]))


_KNOWN = {
    MESSAGES: {"messages": ("messages",), "tools": ("tools",)},
    SHAREGPT: {"messages": ("conversations",), "system": ("system",), "tools": ("tools",)},
    PROMPT_COMPLETION: {"prompt": ("prompt",), "response": ("completion", "response"), "system": ("system",)},
    ALPACA: {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "response": ("output", "response"),
        "system": ("system",),
    },
    TEXT: {"text": ("text",)},
}
# All names that are read as part of a conversation.
READ_NAMES = frozenset(name for columns in _KNOWN.values() for names in columns.values() for name in names)


def form_of(values: dict[str, Any]) -> str | None:
    """The form that the row's keys belong to, or None."""
    if "messages" in values:
        return MESSAGES
    if "conversations" in values:
        return SHAREGPT
    if "prompt" in values and ("completion" in values or "response" in values):
        return PROMPT_COMPLETION
    if "instruction" in values:
        return ALPACA
    return TEXT if "text" in values else None


def detect(rows: Sequence[dict[str, Any]], *, columns: str = "") -> Detection:
    """The form that most of the rows have; `columns` ("prompt=question, response=answer") overrules it.

    Raises DatasetError where `columns` cannot be read or names what no row has.
    """
    names = tuple(dict.fromkeys(name for values in rows for name in values))
    if columns:
        return _by_hand(parse_columns(columns), names)
    if not rows:
        return Detection(None, "there is no row in it that can be read")
    counts = Counter(form for values in rows if (form := form_of(values)))
    if not counts:
        listed = ", ".join(map(repr, names[:8])) or "none"
        proposal = _proposal(rows, names)
        return Detection(None, f"the columns {listed} are none of the known forms", {}, proposal, names)
    form, count = counts.most_common(1)[0]
    known = _KNOWN[form]
    there = [next((name for name in known[role] if name in names), None) for role in known]
    listed = ", ".join(f"'{name}'" for name in there if name)
    whose = "every row" if count == len(rows) else f"{count} of the first {len(rows)} rows"
    return Detection(
        form, f"{whose} looked at {'has' if count in (1, len(rows)) else 'have'} {listed}", known, {}, names
    )


def parse_columns(text: str) -> dict[str, str]:
    """ "prompt=question, response=answer" -> role: column. A name with a comma in it stands in double quotes, which are
    doubled where they are part of it. Raises DatasetError naming all that is wrong."""
    columns, problems, place = {}, [], 0
    while place < len(text):
        if quoted := _QUOTED_PART.match(text, place):
            part, place = quoted[0], quoted.end()
            role, found, name = quoted["role"], "=", quoted["name"].replace('""', '"')
        else:
            part, _, _ = text[place:].partition(",")
            place += len(part) + 1
            role, found, name = (piece.strip() for piece in part.partition("="))
        if not (part := part.strip(" \t\r\n,")):
            continue
        if not found or not (name or quoted) or role not in COLUMN_ROLES:
            problems.append(f"columns: {part!r} is no role=column; roles are {', '.join(COLUMN_ROLES)}")
        elif role in columns:
            problems.append(f"columns: {role} is given twice")
        columns[role] = name
    # Each of these makes a row by itself; what goes with it follows.
    whole = [{"prompt", "response", "input", "system"}, {"messages", "tools", "system"}, {"text"}]
    needed = [{"prompt", "response"}, {"messages"}, {"text"}]
    makes_rows = any(least <= columns.keys() <= most for least, most in zip(needed, whole, strict=True))
    if not problems and makes_rows and len(set(columns.values())) < len(columns):
        problems.append(f"columns: {text!r} reads one column twice; each role needs a column of its own")
    if not problems and not makes_rows:
        problems.append(
            f"columns: {text!r} makes no row; name prompt and response (and input, system), or messages (and system, tools), "
            "or text alone: prompt=question, response=answer"
        )
    if problems:
        raise DatasetError(*problems)
    return columns


def columns_text(columns: dict[str, str]) -> str:
    """What `parse_columns` reads as these columns."""

    def written(name: str) -> str:
        is_plain = name == name.strip() and name and "," not in name and not name.startswith('"')
        return name if is_plain else '"' + name.replace('"', '""') + '"'

    return ", ".join(f"{role}={written(name)}" for role, name in columns.items())


def mapping_for(detection: Detection, columns: str) -> str:
    """Of several choices of columns, parted by semicolons, the first whose columns the file has; empty without one."""
    for choice in filter(None, (part.strip() for part in columns.split(";"))):
        if set(parse_columns(choice).values()) <= set(detection.seen):
            return choice
    return ""


def _by_hand(chosen: dict[str, str], names: tuple[str, ...]) -> Detection:
    if missing := [name for name in chosen.values() if name not in names]:
        there = ", ".join(map(repr, names[:12])) or "none"
        raise DatasetError(*(f"columns: no row has a column {name!r}; there are {there}" for name in missing))
    told = ", ".join(f"{role} = {name!r}" for role, name in chosen.items())
    return Detection(BY_HAND, f"as chosen: {told}", {role: (name,) for role, name in chosen.items()}, {}, names)


def _proposal(rows: Sequence[dict[str, Any]], names: tuple[str, ...]) -> dict[str, str]:
    """The likeliest columns by their names and what they hold."""
    by_name = {name.lower(): name for name in names}

    def first(wanted: tuple[str, ...], holds: type) -> str | None:
        matches = (by_name[name] for name in wanted if name in by_name)
        return next((n for n in matches if any(isinstance(values.get(n), holds) for values in rows)), None)

    if conversation := first(_CONVERSATIONS, list):
        return {"messages": conversation}
    prompt, response = first(_PROMPTS, str), first(_RESPONSES, str)
    if prompt and response and prompt != response:
        system = first(("system", "system_prompt"), str)
        return {"prompt": prompt, "response": response} | ({"system": system} if system else {})
    if text := first(_TEXTS, str):
        return {"text": text}
    return {}
