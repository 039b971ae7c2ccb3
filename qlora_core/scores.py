"""Task scores: a generated answer against its reference, and how sure k of n is. Knows no model."""

import json
import math
from collections.abc import Callable, Sequence

Scorer = Callable[[str, str], bool]


def exact_match(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def json_match(fields: Sequence[str]) -> Scorer:
    """True for an answer that is one JSON object with the reference's keys and equal values in `fields`."""

    def matches(answer: str, reference: str) -> bool:
        try:
            found, wanted = json.loads(answer), json.loads(reference)
        except (ValueError, RecursionError):  # a small model may answer with brackets only
            return False
        if not isinstance(found, dict) or not isinstance(wanted, dict) or found.keys() != wanted.keys():
            return False
        return all(found.get(name) == wanted.get(name) for name in fields)

    return matches


def scorer(score: str, fields: Sequence[str]) -> Scorer:
    return json_match(fields) if score == "json" else exact_match


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): sensible for small n and for 0 of n, unlike p ± 1.96 sd."""
    z = 1.959964
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
