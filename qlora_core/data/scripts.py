"""Which writing systems a text uses, at a glance. Knows no language: see derived.py for that."""

import unicodedata
from functools import lru_cache

# First words of Unicode's character names, where they are no name of a script or belong together.
_TOGETHER = {"CJK": "Han", "IDEOGRAPHIC": "Han", "FULLWIDTH": "Latin", "HALFWIDTH": "Katakana", "FEMININE": "Latin"}
_TOGETHER |= {"MASCULINE": "Latin", "MICRO": "Greek", "MODIFIER": "other", "MATHEMATICAL": "mathematical"}


@lru_cache(maxsize=200_000)
def script_of(character: str) -> str | None:
    """ "Latin", "Han", "Cyrillic" …; None for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    first = unicodedata.name(character, "OTHER").split()[0]
    return _TOGETHER.get(first, first.capitalize() if first.isalpha() else "other")


def scripts_of(text: str) -> set[str]:
    """The scripts of all letters of the text."""
    if text.isascii():
        return {"Latin"} if any(map(str.isalpha, text[:200])) or any(map(str.isalpha, text)) else set()
    found = {script_of(character) for character in set(text)}
    return {script for script in found if script}
