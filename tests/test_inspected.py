"""An inspected file: every row by its number, found by its text; lists that no spreadsheet runs."""

import csv
from pathlib import Path

import pytest
from helpers import alpaca, settings_in, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.inspected import Inspected, inspect_into, near_duplicates
from qlora_core.data.inspection import inspect
from qlora_core.data.listing import safe_cell
from qlora_core.data.scripts import scripts_of
from qlora_core.runs import lock


@pytest.fixture
def kept(tmp_path: Path) -> Inspected:
    rows = [
        alpaca(1),
        {"=cmd|' /C calc'!A0": 1},
        alpaca(2, output="Grüße, 東京!\n" * 5),
        alpaca(3, id=2**70),
        alpaca(1),
    ]
    return inspect_into(write_rows(tmp_path / "rows.jsonl", rows), settings_in(tmp_path))


def test_a_row_is_had_by_its_number_with_its_line_and_columns(kept: Inspected) -> None:
    assert [kept.row(n).line for n in range(1, 5)] == [1, 3, 4, 5]
    assert kept.row(3).columns == {"id": 2**70} and kept.row(2).reference.startswith("Grüße")
    assert (kept.longest(), kept.shortest()) == (2, 1)
    for number in (0, 5, -1):
        with pytest.raises(IndexError):
            kept.row(number)


def test_rows_are_found_by_their_text_whatever_its_case_going_round(kept: Inspected) -> None:
    assert kept.search("ANSWER", 1) == 3
    assert kept.search("answer", 4) == 1
    assert kept.search("東京!\ngrüsse", 0) == 2, "as JSON writes it or not"
    assert kept.search("nowhere", 2) is None


def test_the_report_is_read_back_as_it_was(kept: Inspected, tmp_path: Path) -> None:
    again, report = kept.report, inspect(tmp_path / "rows.jsonl")
    for name in report.__dataclass_fields__:
        if name not in ("seconds", "problem_lines"):
            assert getattr(again, name) == getattr(report, name), name
    assert (again.rows, again.bad_rows, again.duplicates) == (4, 1, ((5, 1),))
    assert again.scripts == {"Latin": 4, "Han": 1} and again.empty_fields == {"input": 4}


def test_lists_hold_no_formula(kept: Inspected) -> None:
    with (kept.folder / "problems.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["line"] == "2" and "cmd|" in rows[0]["problem"] and not rows[0]["problem"].startswith("=")
    with (kept.folder / "duplicates.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["5", "1"]


@given(st.text())
def test_no_cell_begins_a_formula(text: str) -> None:
    assert not str(safe_cell(text)).lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert str(safe_cell(text)).removeprefix("'").endswith(text.removeprefix("'"))


def test_near_duplicates_are_a_second_pass_with_its_own_time(tmp_path: Path) -> None:
    text = "The order that I placed on your site last Monday has not been delivered to my address yet. " * 4
    rows = [alpaca(1, output=text), alpaca(1, output=text + "Why?"), alpaca(2)]
    kept = inspect_into(write_rows(tmp_path / "rows.jsonl", rows), settings_in(tmp_path))
    found = near_duplicates(kept, 0.8, lambda done, total: None)
    assert (found["count"], found["pairs"][0]["line"], found["pairs"][0]["first_line"]) == (1, 2, 1)
    assert found["seconds"] >= 0 and (kept.folder / "near_duplicates-0.8.csv").exists()


@pytest.mark.parametrize("text", ["", '{"count": 1'])
def test_near_duplicates_that_a_crash_has_cut_are_looked_for_again(kept: Inspected, text: str) -> None:
    found = near_duplicates(kept, 0.8, lambda done, total: None)
    (kept.folder / "near_duplicates-0.8.json").write_text(text)
    again = near_duplicates(kept, 0.8, lambda done, total: None)
    assert (again["count"], again["pairs"]) == (found["count"], found["pairs"])
    assert not list(kept.folder.glob("*.json.*"))


@pytest.mark.parametrize("name", ["report.json", "digests.npy", "offsets.npy"])
def test_an_inspection_that_a_crash_has_cut_is_made_again(kept: Inspected, tmp_path: Path, name: str) -> None:
    (kept.folder / name).write_bytes(b"")
    again = inspect_into(tmp_path / "rows.jsonl", settings_in(tmp_path))
    assert again.report.rows == len(again) == len(again.digests) == 4


def test_rows_of_an_evaluation_file_are_counted_whatever_is_kept(kept: Inspected, tmp_path: Path) -> None:
    path, home = tmp_path / "rows.jsonl", settings_in(tmp_path)
    for count, rows in ((1, [alpaca(1), alpaca(99)]), (2, [alpaca(3), alpaca(1)]), (0, [alpaca(7)])):
        held_out = write_rows(tmp_path / f"eval{count}.jsonl", rows)
        assert inspect_into(path, home, eval_path=held_out).report.eval_rows_also_here == count
    assert inspect_into(path, home).report.eval_rows_also_here is None
    by_hand = write_rows(tmp_path / "q.jsonl", [{"q": "Question 1?", "a": "Answer 1."}, {"q": "x", "a": "y"}])
    for other in (by_hand, write_rows(tmp_path / "eval.jsonl", [alpaca(1)])):
        found = inspect_into(by_hand, home, columns="prompt=q, response=a", eval_path=other)
        assert found.report.eval_rows_also_here == (2 if other == by_hand else 1)


def test_what_a_killed_inspection_left_is_removed_and_what_is_under_way_is_not(kept: Inspected, tmp_path: Path) -> None:
    parent = kept.folder.parent
    with lock(parent / ".2-0000.lock"):
        for name in (".1-0000.partial", ".2-0000.partial"):
            (parent / name).mkdir()
        inspect_into(write_rows(tmp_path / "other.jsonl", [alpaca(5)]), settings_in(tmp_path))
        assert [path.name for path in parent.glob(".*.partial")] == [".2-0000.partial"]
    inspect_into(write_rows(tmp_path / "third.jsonl", [alpaca(6)]), settings_in(tmp_path))
    assert not list(parent.glob(".*"))


@pytest.mark.parametrize(
    ("text", "scripts"),
    [("plain", {"Latin"}), ("123 !?", set()), ("Привет", {"Cyrillic"}), ("漢字 かな カナ", {"Han", "Hiragana", "Katakana"}),
     ("مرحبا hi", {"Arabic", "Latin"}), ("ﬀ Ａ ª", {"Latin"})],
)  # fmt: skip
def test_scripts_are_those_of_the_letters(text: str, scripts: set[str]) -> None:
    assert scripts_of(text) == scripts


@settings(max_examples=200)
@given(st.text())
def test_every_text_has_its_scripts_counted(text: str) -> None:
    assert all(isinstance(script, str) for script in scripts_of(text))
