"""What a verdict is, and the words that all of them use for amounts and for how sure they are."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_core.study_numbers import Arm, floor_differences
from qlora_core.study_results import StudyResults

YES, NO, UNCLEAR = "yes", "no", "unclear"
# So many seeds are many, for runs that take hours.
MANY_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A question of the study, answered by its numbers and no further.

    `holds`: whether what the title claims is so: "yes", "no", or "unclear". `sureness`: "high", "moderate" or "low", and why.
    `numbers`: what it was judged by, as JSON. `rests_on`: which runs and measurements, in words. All texts are plain.
    """

    title: str
    sentence: str
    holds: str
    sureness: str
    numbers: dict[str, Any] = field(default_factory=dict)
    rests_on: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sureness(results: StudyResults, found: Iterable[Arm], *, has_floor: bool | None = None) -> str:
    """How far a difference in loss between these arms can be trusted. `has_floor`: whether what chance changes was measured."""
    found = list(found)
    seeds = min((len(arm.finished) for arm in found if arm.finished), default=0)
    if has_floor is None:
        has_floor = bool(floor_differences(results, found))
    if results.differences:
        return "low: the runs are not quite comparable"
    if seeds >= MANY_SEEDS:
        return f"high: {seeds} seeds"
    if seeds > 1:
        return f"moderate: {seeds} seeds"
    return "moderate: one seed, judged by a noise floor" if has_floor else "low: one seed and no noise floor"


def percent(share: float) -> str:
    """0.047 -> "4.7 %"; whole percents from 10 on."""
    value = 100 * abs(share)
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def signed(loss: float) -> str:
    """A difference in loss with as many digits as it bears."""
    return f"{loss:+.3f}" if abs(loss) < 0.095 else f"{loss:+.2f}"


def between(texts: Iterable[str]) -> str:
    """ "20 % to 22 %" of the first and the last, or one of them where they read the same."""
    first, *_, last = [*texts] * 2
    return first if first == last else f"{first} to {last}"


def listed(names: Iterable[str]) -> str:
    """ "a, b and c" """
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
