"""What the folder of a run or a study keeps of its publication: each push that was made, a person's words for the card."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qlora_core import hub
from qlora_core.errors import ConfigError
from qlora_core.jobs import Cancelled
from qlora_core.model_card import CardText
from qlora_core.model_card.markdown import MOST_PROSE
from qlora_core.runs import Run, lock
from qlora_core.storage import write_json

PUBLISHED, CARD = "published.json", "card.json"


def published(folder: Path) -> list[dict[str, Any]]:
    """Every push that was made of what the folder of a run or a study holds, oldest first."""
    path = folder / PUBLISHED
    return json.loads(path.read_text()) if path.exists() else []


def shown(folder: Path) -> list[dict[str, Any]]:
    """Those that every visitor may know of: on a Space, which has many, no private repository."""
    return [entry for entry in published(folder) if not (os.environ.get("SPACE_ID") and entry["private"])]


def record(
    folder: Path | None, push: hub.Push, pushed: hub.Pushed, *, proof: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The entry of what is on the Hub now, kept in place of an earlier one of the same commit; nowhere where there is no folder."""
    entry = {**asdict(pushed), "what": push.release.what, "private": push.private, "at": time.time()}
    entry |= {"proof": proof} if proof else {}
    if folder is None:
        return entry
    same = (entry["url"], entry["commit"], entry["what"])
    with lock(folder / "published.lock", wait=True):
        others = [other for other in published(folder) if (other["url"], other["commit"], other["what"]) != same]
        write_json(folder / PUBLISHED, [*others, entry])
    return entry


@contextmanager
def recording(
    folder: Path | None, push: hub.Push, *, proof: dict[str, Any] | None = None
) -> Iterator[Callable[[hub.Pushed], None]]:
    """What a push calls once it is on the Hub: nothing that goes wrong from there on may hide that, nor that somebody ends it."""
    sent: list[hub.Pushed] = []

    def committed(pushed: hub.Pushed) -> None:
        sent.append(pushed)
        record(folder, push, pushed, proof=proof)

    try:
        yield committed
    except Cancelled:
        if not sent:
            raise
        there = f"{sent[-1].url}: is on the Hub, as {sent[-1].version}, commit {sent[-1].commit[:8]}"
        raise Cancelled(f"{there}, and was not checked to the end; push again to check it") from None


def card_text(run: Run) -> CardText:
    """A person's own words for the card of this run; empty ones where none were kept."""
    path = run.path / CARD
    values = json.loads(path.read_text()) if path.exists() else {}
    return CardText(**{name: values[name] for name in CardText.__dataclass_fields__ if name in values})


def read_card_text(file: Path) -> CardText:
    """A person's words from a YAML file of `field: text`. Raises ConfigError naming all that is wrong."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from None
    return as_card_text(values, where=str(file))


def as_card_text(values: Any, *, where: str) -> CardText:
    """Raises ConfigError naming all that is wrong; `where` the values are from begins each sentence."""
    known = list(CardText.__dataclass_fields__)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: is {type(values).__name__}; write `field: text` lines with {', '.join(known)}")
    strange = [name for name in values if name not in known]
    problems = [f"{where}: has a field {name!r}; those of a card are {', '.join(known)}" for name in strange]
    problems += [f"{where}: {name} is no text" for name in known if not isinstance(values.get(name, ""), str)]
    if problems:
        raise ConfigError(*problems)
    return CardText(**values)


def keep_card_text(run: Run, text: CardText) -> None:
    """Raises ConfigError for a text that is too long."""
    long = [name for name, value in asdict(text).items() if len(value) > MOST_PROSE]
    if long:
        raise ConfigError(*(f"{name.replace('_', ' ')}: has more than {MOST_PROSE:,} characters" for name in long))
    write_json(run.path / CARD, asdict(text))
