"""Datasets: what a person uploads is counted to the last line, and nothing is dropped without a word."""

import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from helpers import FUZZED, alpaca, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config import TrainConfig
from qlora_core.data.detection import form_of
from qlora_core.data.formats import read_rows
from qlora_core.data.inspection import DatasetReport, inspect
from qlora_core.data.limits import Limits
from qlora_core.data.locate import locate
from qlora_core.data.rows import Example, Message
from qlora_core.data.stored import StoredDataset, read_stored, store
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings

LIMIT = 1_000_000
GOOD = b'{"instruction": "Say hi", "output": "hi"}'
CHAT = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}'


def inspected(folder: Path, content: bytes, *, limit: int = LIMIT) -> DatasetReport:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return inspect(path, limits=Limits(limit))


def lines_in(content: bytes) -> int:
    return content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


def stored_in(folder: Path, data: Path, **settings_: object) -> StoredDataset:
    located = locate(TrainConfig(data=str(data), **settings_), Settings())
    return store(located, folder, limits=Limits(LIMIT), max_rows=1000)


# --- the three forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages", "extra"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, [("user", "a"), ("assistant", "c")], "b"),
        ({"instruction": "a", "response": "c"}, [("user", "a"), ("assistant", "c")], ""),
        ({"instruction": "a", "input": None, "output": "c", "id": 7}, [("user", "a"), ("assistant", "c")], ""),
        ({"prompt": "a", "completion": "c"}, [("user", "a"), ("assistant", "c")], ""),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "c"))]},
            [("system", "s"), ("user", "a"), ("assistant", "c")],
            "",
        ),
    ],
)
def test_each_form_becomes_one_conversation(
    tmp_path: Path, row: dict[str, object], messages: list[tuple[str, str]], extra: str
) -> None:
    (example,) = read_rows(write_rows(tmp_path / "rows.jsonl", [row]))[1]
    assert isinstance(example, Example)
    assert example.messages == tuple(Message(*message) for message in messages)
    assert (example.input, example.form, example.reference) == (extra, form_of(row), "c")


def test_report_counts_rows_turns_blank_lines_and_duplicates(tmp_path: Path) -> None:
    spaced = GOOD.replace(b": ", b":   ")
    report = inspected(
        tmp_path, b"\n".join([GOOD, b"", b'{"instruction": "x", "output": "y"}', spaced, b"  ", b"nope"])
    )
    assert (report.rows, report.turns, report.blank_lines, report.duplicates) == (3, 3, 2, ((4, 1),))
    assert report.summary() == "rows.jsonl · 3 usable rows · Alpaca columns · 1 problem · 1 duplicate · 2 blank lines"
    assert json.loads(json.dumps(report.to_json()))["problem_counts"] == {"not JSON": 1}


# --- files that are not JSONL at all -----------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n \r\n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00", "binary file"),
        (gzip.compress(gzip.compress(GOOD)), "gzip twice"),
        (zipped(), "zip archive"),
        (b"PAR1\x15\x04\x15", "cannot be read as Parquet"),
        ("{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_another_kind_of_file_is_named_with_its_remedy(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as error:
        inspected(tmp_path, content)
    assert "rows.jsonl" in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        inspect(tmp_path / "missing.jsonl")
    with pytest.raises(DatasetError, match="is a folder"):
        inspect(tmp_path)


def test_rows_after_many_blank_lines_are_found(tmp_path: Path) -> None:
    report = inspected(tmp_path, b"\n" * 20_000 + GOOD)
    assert (report.rows, report.blank_lines) == (1, 20_000)


# --- lines that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (b"plain text", "not JSON", "is not JSON"),
        (GOOD + GOOD, "not JSON", "Extra data"),
        (b"\xef\xbb\xbf" + GOOD, "not JSON", "BOM"),
        (b"x", "not JSON", "is not JSON: Expecting value at character 1"),
        (b"x\xff", "invalid UTF-8", "byte 2"),
        (b"x\x00", "control character", "NUL byte at character 2"),
        (GOOD[:-1], "truncated JSON", "ends too early"),
        (GOOD[:-4], "truncated JSON", "ends too early"),
        (b'{"instruction"', "truncated JSON", "ends too early"),
        (b'{"instruction": NaN, "output": "x"}', "not JSON", "NaN is not a JSON value"),
        (b'{"instruction": "a", "output": "x", "score": -Infinity}', "not JSON", "-Infinity"),
        (b"[1, 2]", "not an object", "JSON array"),
        (b'"text"', "not an object", "JSON string"),
        (b"null", "not an object", "JSON null"),
        (b"17", "not an object", "JSON number"),
        (b"9" * 5000, "not JSON", "digits"),
        (b"{}", "unknown columns", "none"),
        (b'{"words": "a", "\\ud800": 1}', "unknown columns", "'words'"),
        (b'{"prompt": "a"}', "unknown columns", "'prompt'"),
        (b'{"instruction": "a"}', "no response", "'output'"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', "duplicate key", "'output'"),
        (b'{"instruction": "a", "output": "b", "meta": {"x": 1, "x": 2}}', "duplicate key", "'x'"),
        (b'{"instruction": "a", "output": ""}', "empty response", "'output' is empty"),
        (b'{"instruction": "a", "output": " \\n"}', "empty response", "'output' is empty"),
        (b'{"instruction": "", "output": "b"}', "empty text", "'instruction' is empty"),
        (b'{"instruction": ["a"], "output": "b"}', "wrong type", '["a"]'),
        (b'{"instruction": "a", "output": null}', "wrong type", "null"),
        (b'{"instruction": "a", "output": 3.5}', "wrong type", "3.5"),
        (b'{"instruction": "a", "output": "b", "input": {"c": 1}}', "wrong type", "'input'"),
        (b'{"instruction": "a\x00", "output": "b"}', "control character", "NUL"),
        (b'{"instruction": "a\\u0000", "output": "b"}', "control character", "U+0000"),
        (b'{"instruction": "a", "output": "b\\u0007"}', "control character", "U+0007"),
        (b'{"instruction": "a", "output": "b\x07"}', "not JSON", "Invalid control character at character"),
        (b'{"instruction": "a", "output": "\\ud83d"}', "control character", "surrogate"),
        (b'{"instruction": "\xff", "output": "b"}', "invalid UTF-8", "byte 18 (0xff)"),
        (b'{"instruction": "a", "output": ' + b"[" * 100_000, "not JSON", "nested too deeply"),
    ],
)
def test_bad_line_is_listed_with_its_number_and_the_others_stay(
    tmp_path: Path, line: bytes, kind: str, says: str
) -> None:
    report = inspected(tmp_path, b"\n".join([GOOD, line, GOOD]) + b"\n")
    (problem,) = report.problems
    assert (problem.line, problem.kind, report.rows) == (2, kind, 2)
    assert says in problem.message
    assert "at at" not in problem.message
    assert len(problem.message) < 400, "a message that nobody reads"


@pytest.mark.parametrize(
    ("messages", "kind", "says"),
    [
        ([], "no messages", "[]"),
        ("hi", "no messages", "hi"),
        (None, "no messages", "null"),
        (["hi"], "wrong type", "message 1 is a JSON string"),
        ([{"role": "human", "content": "a"}], "unknown role", '"human"'),
        ([{"role": ["user"], "content": "a"}], "unknown role", '["user"]'),
        ([{"content": "a"}], "unknown role", "null"),
        ([{"role": "user"}], "wrong type", "message 1: 'content' is missing"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "empty text", "message 2"),
        ([{"role": "user", "content": "a"}], "no response", "assistant"),
        ([{"role": "assistant", "content": "a"}], "no prompt", "first message"),
    ],
)
def test_bad_conversation_says_which_message(tmp_path: Path, messages: object, kind: str, says: str) -> None:
    report = inspected(tmp_path, CHAT + b"\n" + json.dumps({"messages": messages}).encode())
    (problem,) = report.problems
    assert (problem.line, problem.kind, report.rows) == (2, kind, 1)
    assert says in problem.message


def test_nesting_of_any_depth_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    lines = [b'{"instruction": ' + b"[" * depth + b"]" * depth + b', "output": "x"}' for depth in range(700, 1010)]
    report = inspected(tmp_path, b"\n".join([GOOD, *lines]))
    assert (report.rows, len(report.problems)) == (1, len(lines))


def test_rows_of_another_form_are_problems(tmp_path: Path) -> None:
    report = inspected(tmp_path, b"\n".join([b"bad", GOOD, CHAT, GOOD]))
    assert report.form == "Alpaca columns"
    assert report.rows == 2
    assert [(problem.line, problem.kind) for problem in report.problems] == [(1, "not JSON"), (3, "mixed formats")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_row_at_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path, end: bytes) -> None:
    assert inspected(tmp_path, GOOD + end, limit=len(GOOD)).rows == 1
    report = inspected(tmp_path, GOOD + end, limit=len(GOOD) - 1)
    assert [problem.kind for problem in report.problems] == ["row too large"]
    assert f"{len(GOOD + end)}" in report.problems[0].message


@pytest.mark.parametrize("filler", [b"x", b"\r", b" "])
def test_lines_after_a_row_that_is_too_large_keep_their_numbers(tmp_path: Path, filler: bytes) -> None:
    report = inspected(tmp_path, b"\n".join([GOOD, filler * 3_000_000, b"bad", GOOD]), limit=1000)
    assert [(problem.line, problem.kind) for problem in report.problems] == [(2, "row too large"), (3, "not JSON")]
    assert report.rows == 2


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    report = inspected(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD + b"\r\n")
    assert (report.rows, report.problems, report.blank_lines, report.byte_order_mark) == (2, (), 1, True)
    assert "byte-order mark skipped" in report.summary()


SEEDS = (
    GOOD,
    CHAT,
    b'{"prompt": "a", "completion": "b"}',
    b"",
    b"  \r",
    '{"instruction": "é😀", "input": "\\u00e9", "output": [1, {"a": null}]}'.encode(),
    b"\xef\xbb\xbf" + GOOD,
)
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 400), st.integers(0, 4), st.binary(max_size=4) | st.sampled_from([b"\n", b"\r", b'"', b"{"])
    ),
    max_size=6,
)


@settings(max_examples=FUZZED, deadline=None)
@given(rows=st.lists(st.sampled_from(SEEDS), max_size=6), mutations=MUTATIONS, limit=st.sampled_from([20, 60, 1000]))
def test_every_line_is_a_row_a_problem_or_blank(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], mutations: list[tuple[int, int, bytes]], limit: int
) -> None:
    content = b"\n".join(rows)
    for place, removed, added in mutations:
        place %= len(content) + 1
        content = content[:place] + added + content[place + removed :]
    try:
        report = inspected(tmp_path_factory.getbasetemp(), content, limit=limit)
    except DatasetError:
        return
    if report.kind == "JSONL":  # the elements of an array are not its lines
        assert report.rows + report.bad_rows + report.blank_lines == lines_in(content)
    assert all(str(problem).encode() for problem in report.problems)


@pytest.mark.parametrize("rows", [1, 75])
def test_memory_stays_far_below_the_size_of_the_file(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        for number in range(rows):
            row = b'{"instruction": "%d", "output": "' % number
            file.write(row + b"x" * (60_000_000 // rows - 100) + b'"}\n')
        file.write(GOOD + b"\n")
    tracemalloc.start()
    try:
        report = inspect(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.rows + len(report.problems) == rows + 1
    # A few copies of the largest row that may be; what it grows with is the row, not the file.
    assert peak_bytes < 16 * LIMIT < path.stat().st_size


# --- a run's own copy --------------------------------------------------------------------------------------------------


def test_split_has_its_size_loses_nothing_and_depends_on_the_seed_only(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(number) for number in range(50)])
    first = stored_in(tmp_path / "first", data, eval_fraction=0.2)
    again = stored_in(tmp_path / "again", data, eval_fraction=0.2)
    other = stored_in(tmp_path / "other", data, eval_fraction=0.2, seed=7)
    assert (first.train_rows, first.eval_rows) == (40, 10)
    train, held_out = (list(read_stored(tmp_path / "first" / name)) for name in ("train.jsonl", "eval.jsonl"))
    assert len(train) == 40
    assert sorted(example.line for example in [*train, *held_out]) == list(range(1, 51))
    assert first == again == StoredDataset.load(tmp_path / "first")
    assert other.eval_fingerprint != first.eval_fingerprint


def test_stored_rows_are_the_rows_of_the_file(tmp_path: Path) -> None:
    rows = [alpaca(1, input="é😀\u2028", output="a\r\nb\u0085c"), alpaca(2)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    stored_in(tmp_path / "run", data, eval_data=str(data))
    for name in ("train.jsonl", "eval.jsonl"):
        first, second = read_stored(tmp_path / "run" / name)
        assert (first.input, first.reference, second.line) == ("é😀\u2028", "a\r\nb\u0085c", 2)


def test_fingerprint_follows_the_content_and_not_the_layout(tmp_path: Path) -> None:
    def fingerprint(name: str, text: str) -> str:
        (tmp_path / f"{name}.jsonl").write_text(text)
        held_out = write_rows(tmp_path / "held_out.jsonl", [alpaca(0)])
        return stored_in(tmp_path / name, tmp_path / f"{name}.jsonl", eval_data=str(held_out)).train_fingerprint

    one, two = json.dumps(alpaca(1)), json.dumps(alpaca(2))
    plain = fingerprint("plain", f"{one}\n{two}\n")
    assert fingerprint("blank", f"\n\n{one}\r\n\n{two}") == plain
    assert fingerprint("changed", f"{one}\n{two.replace('Answer', 'answer')}\n") != plain
    assert fingerprint("swapped", f"{two}\n{one}\n") != plain


def test_rows_with_problems_are_refused_unless_asked_and_then_listed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1), [], alpaca(3), {"words": "x"}, alpaca(5)])
    with pytest.raises(DatasetError) as error:
        stored_in(tmp_path / "run", data)
    assert error.value.problems[0].startswith("rows.jsonl: 2 of 5 rows have problems")
    assert "line 2" in error.value.problems[1]
    assert "line 4" in error.value.problems[2]
    stored = stored_in(tmp_path / "run", data, skip_bad_rows=True)
    assert stored.left_out_lines == (2, 4)
    assert stored.train_rows + stored.eval_rows == 3


def test_long_list_of_problems_is_cut_and_says_how_many_more(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1), *([{}] * 30)])
    with pytest.raises(DatasetError, match="and 10 more"):
        stored_in(tmp_path / "run", data)


def test_evaluation_file_is_used_whole_and_its_problems_count_too(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [alpaca(2), alpaca(3)])
    stored = stored_in(tmp_path / "run", data, eval_data=str(held_out))
    assert (stored.train_rows, stored.eval_rows, stored.eval_source) == (1, 2, "held_out.jsonl")
    write_rows(held_out, [alpaca(2), {}])
    with pytest.raises(DatasetError, match="held_out.jsonl line 2"):
        stored_in(tmp_path / "run", data, eval_data=str(held_out))


def test_dataset_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="one usable row.*eval_data"):
        stored_in(tmp_path / "run", write_rows(tmp_path / "one.jsonl", [alpaca(1)]))
    with pytest.raises(DatasetError, match="no row can be used"):
        stored_in(tmp_path / "run", write_rows(tmp_path / "none.jsonl", [{}, {}]), skip_bad_rows=True)
    with pytest.raises(DatasetError, match="1,001 rows, the limit is 1,000"):
        stored_in(tmp_path / "run", write_rows(tmp_path / "many.jsonl", [alpaca(i) for i in range(1001)]))
    with pytest.raises(DatasetError, match="name a file"):
        locate(TrainConfig(), Settings())


def test_two_rows_give_one_to_train_and_one_to_evaluate(tmp_path: Path) -> None:
    stored = stored_in(tmp_path / "run", write_rows(tmp_path / "two.jsonl", [alpaca(1), alpaca(2)]), eval_fraction=0.01)
    assert (stored.train_rows, stored.eval_rows) == (1, 1)


@pytest.mark.parametrize("seed", range(8))
def test_equal_rows_are_never_on_both_sides_of_the_split(seed: int, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(number % 10) for number in range(40)])
    stored = stored_in(tmp_path / "run", data, seed=seed, eval_fraction=0.2)
    sides = [{row.digest() for row in read_stored(tmp_path / "run" / name)} for name in ("train.jsonl", "eval.jsonl")]
    assert not sides[0] & sides[1]
    assert (stored.train_rows, stored.eval_rows, stored.eval_rows_also_trained) == (32, 8, 0)


def test_rows_that_are_all_equal_cannot_be_split(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1)] * 5)
    with pytest.raises(DatasetError, match="5 rows that are all equal.*eval_data"):
        stored_in(tmp_path / "run", data)


def test_what_a_person_should_know_of_the_rows_is_said(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [alpaca(1), alpaca(2), {}])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{}, alpaca(2), alpaca(3)])
    stored = stored_in(tmp_path / "run", data, eval_data=str(held_out), skip_bad_rows=True)
    remarks = "\n".join(stored.remarks())
    assert "1 bad lines of the training file are left out: 3" in remarks
    assert "1 bad lines of the evaluation file are left out: 1" in remarks
    assert "1 of 2 evaluation rows are also training rows" in remarks


def test_columns_that_training_does_not_use_are_counted(tmp_path: Path) -> None:
    rows = [alpaca(1) | {"id": "Be brief."}, alpaca(2) | {"id": "Be kind.", "response": "x"}, alpaca(3)]
    report = inspect(write_rows(tmp_path / "rows.jsonl", rows))
    assert report.ignored_columns == {"id": 2, "response": 1}
    assert "not used: id, response" in report.summary()
