"""Any text as Markdown, YAML and Python that nothing in it can break out of. Knows no run."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

MOST_CHARACTERS = 200
MOST_PROSE = 20_000  # of a text that a person wrote; longer ones are refused where they are kept
# What Markdown of the Hub's kind (CommonMark, GitHub's tables and links, TeX) reads as more than itself.
_ACTIVE = re.compile(r"([\\`*_\[\]<>#|~&!${}@^])")
_LINE_START = re.compile(r"^([-+=]|\d+[.)])(?=\s|$|[-+=])")
# Words that a YAML 1.1 and a YAML 1.2 reader both take for a text; all others are quoted.
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*")


def plain(value: object, most: int = MOST_CHARACTERS) -> str:
    """One line without control, format and bidirectional characters, shortened."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def code(value: object) -> str:
    """A code span of one line, for a table too; a dash for an empty text, which has no span."""
    text = plain(value).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else "–"


def prose(text: str) -> str:
    """What a person wrote, as paragraphs and "- " lists that read exactly so; no mark-up of theirs is followed.
    A bare address stays one, which the Hub links."""
    blocks = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    shown = ["\n".join(filter(None, map(_line, block.split("\n")))) for block in blocks]
    return "\n\n".join(filter(None, shown))


def _line(line: str) -> str:
    text = plain(line, most=MOST_PROSE)
    bullet = "- " if text.startswith("- ") and len(text) > 2 else ""
    escaped = _ACTIVE.sub(r"\\\1", text.removeprefix(bullet))
    # A figure and its dot: the backslash must stand before the dot.
    return bullet + _LINE_START.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", escaped)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already: words of ours, or made by `code`."""
    lines = [header, ["-" for _ in header], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def folded(title: str, content: str) -> str:
    """Opens by a click; `title` is ours."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def literal(value: str) -> str:
    """A Python string literal."""
    return f'"{value}"' if re.fullmatch(r"[\w./@: -]*", value, re.ASCII) else ascii(value)


def yaml_of(values: dict[str, Any]) -> str:
    """Values as they are: what a terminal or a page would not show as itself is escaped."""
    texts = "".join(_texts(values)).replace("\n", "").replace("\t", "")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=texts.isprintable(), width=math.inf)


def front_matter(values: dict[str, Any]) -> str:
    """The block that begins a card; every text in it is one line."""
    return f"---\n{yaml_of(_one_line(values))}---"


class _Dumper(yaml.SafeDumper):
    """PyYAML leaves bare what YAML 1.2, and so the Hub, reads as a number: 1e3."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = None if _BARE.fullmatch(text) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.yaml_representers = yaml.SafeDumper.yaml_representers | {str: _Dumper.represent_text}


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, content in value.items():
            yield str(name)
            yield from _texts(content)
    elif isinstance(value, (list, tuple)):
        for content in value:
            yield from _texts(content)


def _one_line(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _one_line(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_one_line(content) for content in value]
    return plain(value) if isinstance(value, str) else value
