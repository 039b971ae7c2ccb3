"""StudyResults -> verdicts in words, with the numbers that they rest on and how sure they are. Draws nothing, measures nothing."""

from qlora_core.study_numbers import arms
from qlora_core.study_results import StudyResults
from qlora_core.verdicts.failures import failure_modes, missing
from qlora_core.verdicts.hypotheses import adapters_equal, answers_alike, matrices_differ, minimum_rank
from qlora_core.verdicts.practical import practical
from qlora_core.verdicts.verdict import Verdict as Verdict


def verdicts(results: StudyResults) -> list[Verdict]:
    """The practical one first, then the hypotheses that the study can speak of, what went wrong, and what is missing."""
    found = arms(results)
    return [
        practical(results, found),
        *adapters_equal(results),
        *matrices_differ(results, found),
        *minimum_rank(results, found),
        *answers_alike(results, found),
        *failure_modes(results, found),
        *missing(results),
    ]
