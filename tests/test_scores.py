"""Task scores: what counts as a right answer, and how sure a share of few answers is."""

import pytest

from qlora_core.scores import exact_match, json_match, scorer, wilson_interval

REFERENCE = '{"category": "billing", "priority": "urgent", "reply": "We are on it."}'


def test_exact_ignores_only_the_white_space_around() -> None:
    assert exact_match(" Paris\n", "Paris")
    assert not exact_match("paris", "Paris")
    assert scorer("exact", ()) is exact_match


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (REFERENCE, True),
        ('{"reply": "Other words.", "priority": "urgent", "category": "billing"}', True),
        (REFERENCE.replace("urgent", "low"), False),
        ('{"category": "billing", "priority": "urgent"}', False),
        (REFERENCE[:-1] + ', "more": 1}', False),
        (f"Here it is: {REFERENCE}", False),
        (REFERENCE[:-1], False),
        ("[1]", False),
        ("", False),
        ("[" * 100_000, False),
        ('{"a":' * 5000, False),
    ],
)
def test_json_needs_the_keys_and_the_chosen_values(answer: str, right: bool) -> None:
    assert scorer("json", ("category", "priority"))(answer, REFERENCE) is right


def test_field_that_the_reference_lacks_does_not_end_the_run() -> None:
    assert json_match(("missing",))('{"a": 1}', '{"a": 2}')


def test_reference_that_is_no_object_is_never_matched() -> None:
    assert not json_match(())("[1]", "[1]")


def test_interval_is_wilsons() -> None:
    """Values of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0
