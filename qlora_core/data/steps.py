"""The steps of a preparation over a stream of rows; each counts what it changed and lists it in the ledger."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import tee
from operator import ne
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_core import architecture
from qlora_core.data.inspection import short_digest
from qlora_core.data.listing import Listing
from qlora_core.data.preparation import Preparation, public_name
from qlora_core.data.rows import Example
from qlora_core.settings import Settings
from qlora_core.tokens import Refused, RenderedExample, load_tokenizer, render_many

# A chain of generators begins at its end, so the order in which steps begin is not theirs.
ORDER = (
    "read", "normalise", "personal data", "duplicates", "toxicity", "long rows", "derived columns", "large rows",
    "near duplicates", "balance", "limit", "shuffle", "split",
)  # fmt: skip
_LINE_ENDS = re.compile(r"\r\n?|\u2028|\u2029")
_SPACES = " \t\u00a0\u3000"


@dataclass(frozen=True, slots=True)
class Row:
    """An example on its way, and the number of the source it came from."""

    example: Example
    source: int


class Ledger:
    """What each step did: counts by step, and one line of changes.csv for every row that it changed or left out.

    `mask`: no personal data that a message quotes stand in changes.csv, which is published with the rows.
    """

    def __init__(self, path: Path, names: list[str], *, mask: bool = False) -> None:
        self.names, self.mask = names, mask
        self._steps: dict[str, dict[str, Any]] = {}
        self._listing = Listing(path, ("step", "source", "line", "what"))

    def step(self, name: str, counts: dict[str, Any]) -> dict[str, Any]:
        """Begin a step; the counts that are returned are its own to fill."""
        self._steps[name] = counts
        return counts

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """The counts of every step that was taken, in the order of the steps."""
        return {name: dict(self._steps[name]) for name in ORDER if name in self._steps}

    def change(self, step: str, source: int, line: int, what: str) -> None:
        if self.mask:
            from qlora_core.data import personal

            what = personal.mask(what)[0]
        self._listing.add(step, self.names[source], line, what)

    def told(self) -> list[str]:
        return [
            f"{name}: {', '.join(f'{value} {what}' for what, value in counts.items())}"
            for name, counts in self.steps.items()
            if counts
        ]

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listing.__exit__(kind, error, trace)


def normalise(rows: Iterator[Row], ledger: Ledger) -> Iterator[Row]:
    """Line ends of other systems become newlines; white space before a line end and at the end of a text goes."""
    counts = ledger.step("normalise", {"rows changed": 0, "line ends": 0, "white space at an end": 0})
    for row in rows:
        found = Counter[str]()

        def tidy(text: str, found: Counter[str] = found) -> str:
            text, ends = _LINE_ENDS.subn("\n", text) if not text.isprintable() else (text, 0)
            lines = text.split("\n")
            stripped = [line.rstrip(_SPACES) for line in lines]
            trailing = sum(map(ne, lines, stripped))
            while len(stripped) > 1 and not stripped[-1]:
                stripped.pop()
            found.update({"line ends": ends, "white space at an end": trailing + (len(stripped) < len(lines))})
            return "\n".join(stripped)

        example = row.example.mapped(tidy)
        if example is not row.example:
            counts["rows changed"] += 1
            for what, number in found.items():
                counts[what] += number
            ledger.change("normalise", row.source, row.example.line, _words(found))
            row = replace(row, example=example)
        yield row


def mask_personal(rows: Iterator[Row], ledger: Ledger, *, mask: bool) -> Iterator[Row]:
    """Find personal data, and replace it where `mask` says so."""
    from qlora_core.data import personal

    counts = ledger.step("personal data", {"rows": 0, "found by": personal.engine_name(), "masked": mask})
    for row in rows:
        found = Counter[str]()

        def masked(text: str, found: Counter[str] = found) -> str:
            changed, kinds = personal.mask(text)
            found.update(kinds)
            return changed

        example = row.example.mapped_whole(masked)
        if found:
            counts["rows"] += 1
            for kind, number in found.items():
                counts[kind] = counts.get(kind, 0) + number
            done = "masked" if mask else "found"
            ledger.change("personal data", row.source, row.example.line, f"{done}: {_words(found)}")
        yield replace(row, example=example) if mask and found else row


def drop_duplicates(rows: Iterator[Row], ledger: Ledger) -> Iterator[Row]:
    counts = ledger.step("duplicates", {"rows dropped": 0})
    seen: dict[int, int] = {}
    for row in rows:
        digest = short_digest(row.example)
        place = row.source << 40 | row.example.line
        first = seen.setdefault(digest, place)
        if first != place:
            counts["rows dropped"] += 1
            equal = f"{ledger.names[first >> 40]} {first & (1 << 40) - 1}"
            ledger.change("duplicates", row.source, row.example.line, f"dropped: equal to {equal}")
        else:
            yield row


def mark_toxic(rows: Iterator[Row], ledger: Ledger, preparation: Preparation, settings: Settings) -> Iterator[Row]:
    """Rate every row with a text-classification model; list, or drop, those at or above the threshold."""
    from qlora_core import toxicity

    model, threshold = preparation.toxicity_model, preparation.toxicity_threshold
    counts = ledger.step("toxicity", {"rows": 0, "dropped": 0, "model": public_name(model), "threshold": threshold})
    kept, texts = tee(rows)
    with toxicity.scores((row.example.text for row in texts), model=model or "", settings=settings) as verdicts:
        for row, verdict in zip(kept, verdicts, strict=True):
            counts["rated by their beginning"] = verdicts.cut
            if verdict.score < threshold:
                yield row
                continue
            counts["rows"] += 1
            drop = preparation.toxic_rows == "drop"
            counts["dropped"] += drop
            told = f"{'dropped: ' if drop else ''}{verdict.label} {verdict.score:.2f}"
            ledger.change("toxicity", row.source, row.example.line, told)
            if not drop:
                yield row


def fit(rows: Iterator[Row], ledger: Ledger, preparation: Preparation, settings: Settings) -> Iterator[Row]:
    """Drop or shorten rows of more than max_tokens, counted as training counts them."""
    most, cut = preparation.max_tokens, preparation.long_rows == "cut"
    tokenizer = load_tokenizer(architecture.tokenizer_folder(preparation.base_model, settings), preparation.template)
    counts = ledger.step("long rows", {"rows longer": 0, "dropped": 0, "cut": 0, "tokens": most})
    kept, counted = tee(rows)
    for row, rendered in zip(kept, render_many((row.example for row in counted), tokenizer), strict=True):
        if isinstance(rendered, Refused):
            counts["refused by the template"] = counts.get("refused by the template", 0) + 1
            ledger.change("long rows", row.source, row.example.line, f"left out: {rendered.problem}")
            continue
        length = len(rendered.token_ids)
        if length <= most:
            yield row
            continue
        counts["rows longer"] += 1
        shorter = shortened(row.example, rendered, tokenizer, most) if cut else None
        counts["cut" if shorter else "dropped"] += 1
        told = f"{length:,} tokens: {shorter.told}" if shorter else f"dropped: {length:,} tokens"
        ledger.change("long rows", row.source, row.example.line, told)
        if shorter:
            yield replace(row, example=shorter.example)


@dataclass(frozen=True, slots=True)
class Shortened:
    """`told` is what was done, such as "later turns left out, 40 tokens are left"."""

    example: Example
    told: str


def shortened(example: Example, rendered: RenderedExample, tokenizer: Any, most: int) -> Shortened | None:
    """The conversation without later turns, and then with less of its last response, as it fits; None where the prompt
    alone does not."""
    done: dict[str, None] = {}  # a set in its order
    while len(rendered.token_ids) > most:
        turns = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
        if len(turns) > 1:
            example = replace(example, messages=example.messages[: turns[-2] + 1])
            done["later turns left out"] = None
        else:
            last = len(example.messages) - 1 if example.is_text else turns[-1]
            message = example.messages[last]
            text = message.content
            # Characters that the tokens which are too many stand for; at least one token's worth.
            excess = len(rendered.token_ids) - most
            begin = rendered.text.rfind(text.strip())
            inside = rendered.spans[(rendered.spans[:, 0] >= begin) & (rendered.spans[:, 1] <= begin + len(text))]
            if begin < 0 or len(inside) <= excess:
                return None
            content = text.strip()[: int(inside[-excess][0]) - begin].rstrip()
            if not content:
                return None
            messages = (*example.messages[:last], replace(message, content=content))
            example = replace(example, messages=messages)
            done["text cut" if example.is_text else "last response cut"] = None
        (again,) = render_many([example], tokenizer)
        if isinstance(again, Refused):
            return None
        rendered = again
    return Shortened(example, f"{', '.join(done)}, {len(rendered.token_ids):,} tokens are left")


def with_columns(rows: Iterator[Row], ledger: Ledger, names: tuple[str, ...]) -> Iterator[Row]:
    """Add derived columns; one that the data have already stays as it is."""
    from qlora_core.data import derived

    counts = ledger.step("derived columns", {name: 0 for name in names})
    for row in rows:
        text = row.example.text
        added = {name: derived.derive(name, text) for name in names if name not in row.example.columns}
        for name in names:
            counts[name if name in added else f"{name}, kept as it was"] = (
                counts.get(name if name in added else f"{name}, kept as it was", 0) + 1
            )
        yield replace(row, example=replace(row.example, columns=row.example.columns | added))


def _words(found: Counter[str]) -> str:
    return ", ".join(f"{what} x {number}" if number > 1 else what for what, number in found.items() if number)
