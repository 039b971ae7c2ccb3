"""Claims on characters of a text, and what the patterns behind them share: how a number begins and ends. Knows no kind of it."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

# Each pattern takes a bounded number of characters or repeats classes that exclude each other, so all of them are linear.
# Those that run on every text begin with a class that is rare in prose and look behind after it: `re` skips to a leading
# class only. ASCII, as a number may touch a script without spaces ("電話03-1234-5678").

Check = Callable[[str], bool]

# Not inside a word, price, path, hash tag, chain of hyphens, time of day or decimal.
START = re.compile(
    r"[0-9+(](?<![A-Za-z_#$€£¥].)(?<![a-z]/.)(?<![0-9][0-9])(?<![0-9]-[0-9])(?<!:[0-9]{2}:.)(?<![^A-Za-z]\.[0-9])"
)
# What START refuses before a number is not refused behind the number before it, or neither of two would be found.
AFTER = r"(?![0-9_%]|(?!x[0-9])[A-Za-z])(?!(?<=[0-9])[.-][0-9]|:[0-9]{2}:)"
CLUSTER = re.compile(r"[0-9](?:[ ().\-/]{0,3}[0-9]){6,}")
# No number, though it is written as one.
DATE = (
    r"(?:(?:19|20)[0-9]{2}([-./ ])[01]?[0-9]\1[0-3]?[0-9]|[0-3]?[0-9]([-./ ])[0-3]?[0-9]\2(?:19|20)[0-9]{2}"
    r"|(?:19|20)[0-9]{2} ?[-/ ] ?(?:19|20)[0-9]{2}|[01]?[0-9]/(?:19|20)[0-9]{2})(?![0-9])"
)


@dataclass(frozen=True)
class Found:
    """Characters start to end (exclusive) of a text."""

    kind: str
    start: int
    end: int


def digits_of(number: str) -> str:
    return re.sub("[^0-9]", "", number)


def any_of(checks: Collection[str]) -> str:
    """One pattern of many: its group n0 is the first of them."""
    return "|".join(f"(?P<n{i}>{shape})" for i, shape in enumerate(checks))


def check_of(checks: dict[str, Check], match: re.Match[str]) -> Check:
    return list(checks.values())[int((match.lastgroup or "n0")[1:])]


def end_of_number(text: str, start: int, end: int, check: Check) -> int | None:
    """Where a number ends that was read too far ("+44 20 7946 0018 12 people"); None where it is none."""
    while end - start > 6:
        number = text[start:end]
        if check(number):
            return end
        end = start + len(re.sub(r"[ /]*[^ /]+\Z", "", number))
    return None
