"""Checks on the example dataset: shape, labels, balance and no train/held-out leakage."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAIN = EXAMPLES / "support_tickets.jsonl"
HELDOUT = EXAMPLES / "support_tickets_heldout.jsonl"

INSTRUCTION = "Triage this support ticket."
CATEGORIES = {"billing", "delivery", "account", "bug", "feature"}
PRIORITIES = {"low", "normal", "urgent"}
BALANCE_TOLERANCE = 0.10  # each category within 10 % of an equal share

# A reworded template (a name or an amount swapped in a 25-word ticket) keeps more than a third of
# its word triples, and a shuffled or lightly edited copy keeps most of its words. Independent
# tickets stay far below both: they share only function words such as "I", "the" and "my".
MAX_TRIGRAM_JACCARD = 0.35
MAX_WORD_JACCARD = 0.60


def load(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def near_duplicate(a: str, b: str) -> bool:
    return (
        words(a) == words(b)
        or jaccard(trigrams(a), trigrams(b)) >= MAX_TRIGRAM_JACCARD
        or jaccard(set(words(a)), set(words(b))) >= MAX_WORD_JACCARD
    )


@pytest.mark.parametrize(("path", "minimum"), [(TRAIN, 240), (HELDOUT, 32)])
def test_enough_unique_rows(path: Path, minimum: int) -> None:
    rows = load(path)
    assert len(rows) >= minimum
    assert len({row["input"] for row in rows}) == len(rows)


@pytest.mark.parametrize("path", [TRAIN, HELDOUT])
def test_rows_have_the_documented_shape(path: Path) -> None:
    for row in load(path):
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == INSTRUCTION
        assert 12 <= len(row["input"].split()) <= 45, row["input"]

        answer = json.loads(row["output"])
        assert list(answer) == ["category", "priority", "summary"]
        assert json.dumps(answer) == row["output"]
        assert answer["category"] in CATEGORIES
        assert answer["priority"] in PRIORITIES
        assert 5 <= len(answer["summary"].split()) <= 11, answer["summary"]


@pytest.mark.parametrize("path", [TRAIN, HELDOUT])
def test_labels_are_balanced(path: Path) -> None:
    answers = [json.loads(row["output"]) for row in load(path)]
    share = len(answers) / len(CATEGORIES)
    counts = Counter(answer["category"] for answer in answers)
    assert set(counts) == CATEGORIES
    for category, count in counts.items():
        assert abs(count - share) <= BALANCE_TOLERANCE * share, (category, count)
    assert {answer["priority"] for answer in answers} == PRIORITIES


def test_near_duplicate_check_catches_a_swapped_word() -> None:
    ticket = load(HELDOUT)[0]["input"]
    assert near_duplicate(ticket, ticket.upper())
    assert near_duplicate(ticket, " ".join(["Hello", *ticket.split()[1:]]))
    assert not near_duplicate(ticket, load(HELDOUT)[1]["input"])


def test_heldout_rows_are_not_in_the_training_file() -> None:
    train_inputs = [row["input"] for row in load(TRAIN)]
    for row in load(HELDOUT):
        copies = [text for text in train_inputs if near_duplicate(row["input"], text)]
        assert not copies, (row["input"], copies)
