"""Columns that a row's text tells: its language, how hard it reads, how long it is. Needs no network and no torch."""

import re
from functools import cache
from typing import Any

from qlora_core.errors import ConfigError

DERIVED: dict[str, str] = {
    "language": "two-letter code (ISO 639-1) of the language that the text is mostly in, und where that is not clear",
    "reading_level": "US school grade that the text reads at (Flesch-Kincaid, estimated), for English only",
    "words": "number of words; a Chinese or Japanese character counts as one",
    "characters": "number of characters, with spaces",
}
UNDETERMINED = "und"
# Grades below the number belong to the band.
READING_BANDS = ((6, "elementary"), (9, "middle school"), (13, "high school"), (17, "college"))
HIGHEST_BAND, NO_BAND = "graduate", "unknown"
# Of 16,715 messages of 10 to 80 characters in 38 languages 76 % reach it, and 98 % of those are right; of the others, half.
CONFIDENCE = 0.5
# What tells language and level; the rest of a long text costs time and changes neither.
LANGUAGE_CHARACTERS, LEVEL_CHARACTERS = 2_000, 5_000
WORDS_REMEMBERED = 20_000
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_EAST_ASIAN}]|[^\\s{_EAST_ASIAN}]+")


def derive(name: str, text: str) -> str | float | int | None:
    """The column `name` of `DERIVED` for a row's text; None where it has none. Raises ConfigError for another name."""
    if name not in DERIVED:
        raise ConfigError(f"derived column is {name!r}; it must be one of {', '.join(DERIVED)}")
    return {"language": language, "reading_level": reading_level, "words": words, "characters": len}[name](text)


def language(text: str) -> str:
    """Two letters, or und: for a text without letters, one that is too short to tell, or one that is not in a language.

    Looks at the first 2,000 characters. Related languages (Indonesian and Malay, Danish and Norwegian) are the ones confused.
    Program code mostly counts as English, which its names and comments are in.
    """
    text = text[:LANGUAGE_CHARACTERS]
    if not any(map(str.isalpha, text)):
        return UNDETERMINED
    code, confidence = _identifier().classify(text)
    return code if confidence >= CONFIDENCE and len(code) == 2 else UNDETERMINED


def reading_level(text: str) -> float | None:
    """Flesch-Kincaid grade to one decimal; None for texts that are not clearly English.

    0.39 words a sentence + 11.8 syllables a word - 15.59 (Kincaid et al. 1975), of the first 5,000 characters. Short sentences
    of short words fall below 0. It was made for passages of 100 words and more; a single sentence says little.
    """
    if language(text) != "en":
        return None
    return round(_grader().flesch_kincaid_grade(text[:LEVEL_CHARACTERS]), 1)


def reading_band(grade: float | None) -> str:
    """The kind of school for a grade, to stratify by; "unknown" where there is no grade."""
    if grade is None:
        return NO_BAND
    return next((band for above, band in READING_BANDS if grade < above), HIGHEST_BAND)


def words(text: str) -> int:
    """What stands between white space and is not only punctuation. Thai, Lao, Khmer and Burmese have few such spaces."""
    return sum(any(map(str.isalnum, word)) for word in _WORD.findall(text))


@cache
def _identifier() -> Any:
    """py3langid's model, which its wheel holds. It keeps no state between texts, so that threads may share it."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Without the languages that have three letters only, of which Pidgin and dialects are taken for English, Chinese and
    # Arabic; zxx is what is in no language.
    identifier.set_languages([code for code in identifier.labels if len(code) == 2 or code == "zxx"])
    return identifier


@cache
def _hyphenation() -> Any:
    """Patterns in the place of a dictionary of syllables.

    For a language that starts with "en_" textstat lets nltk download that dictionary; for "en-US" it counts the places where a
    word may be hyphenated. Those leave out what printers do not break off, so a last syllable of one letter is allowed here.
    On 1,405 paragraphs the grades then differ from the dictionary's by 0.5, and their mean by 0.05; without it they are 1 lower.
    """
    from textstat.backend.utils import get_pyphen

    patterns = get_pyphen("en-US")
    patterns.right = 1
    return patterns


@cache
def _textstat() -> Any:
    from textstat.textstat import textstatistics

    textstat = textstatistics()  # an own one: the language of the module's is for everybody
    textstat.set_lang("en-US")
    return textstat


def _grader() -> Any:
    remembered = _hyphenation().hd.cache
    if len(remembered) > WORDS_REMEMBERED:  # it would grow with every new word for as long as the process lives
        remembered.clear()
    return _textstat()
