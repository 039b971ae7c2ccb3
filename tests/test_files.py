"""Every kind of file that people bring: read whole, or told row by row what is wrong; a bomb stops at its limit."""

import csv
import gzip
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import FUZZED, ROOT, alpaca
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data import inspection, tables
from qlora_core.data.files import kind_of
from qlora_core.data.formats import read_rows
from qlora_core.data.inspection import DatasetReport, inspect
from qlora_core.data.limits import Limits
from qlora_core.data.rows import Example, Problem
from qlora_core.errors import DatasetError
from qlora_core.settings import Settings

ROWS = [alpaca(1, input='é😀, "quoted"\nsecond line'), alpaca(2), alpaca(3, output="  = spaced  ")]


def as_table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS = {
    "rows.jsonl": as_lines,
    "rows.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "small.json": lambda rows: json.dumps(rows, separators=(",", ":")).encode(),
    "rows.csv": lambda rows: as_table(rows, ","),
    "excel.csv": lambda rows: b"\xef\xbb\xbf" + as_table(rows, ";"),
    "rows.tsv": lambda rows: as_table(rows, "\t"),
    "rows.parquet": as_parquet,
}


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def examples(path: Path, **options: Any) -> list[Example]:
    rows = list(read_rows(path, **options)[1])
    assert all(isinstance(row, Example) for row in rows), rows
    return rows


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, name: str, packed: bool) -> None:
    content = WRITERS[name](ROWS)
    path = written(tmp_path, name + (".gz" if packed else ""), gzip.compress(content) if packed else content)
    plain = examples(written(tmp_path, "plain.jsonl", as_lines(ROWS)))
    assert [row.digest() for row in examples(path)] == [row.digest() for row in plain]
    assert str(kind_of(path)).endswith(", gzip") == packed


def test_kind_goes_by_content_before_the_name(tmp_path: Path) -> None:
    for name, content, kind in (
        ("a.csv", as_lines(ROWS), "JSONL"),
        ("a.txt", as_parquet(ROWS), "Parquet"),
        ("a.jsonl", json.dumps(ROWS).encode(), "JSON array"),
        ("a.json", as_lines(ROWS), "JSONL"),
        ("b.csv", as_table(ROWS, "|"), "CSV, bars"),
        ("a.zip", gzip.compress(as_lines(ROWS)), "JSONL, gzip"),
    ):
        assert str(kind_of(written(tmp_path, name, content))) == kind


# --- JSON arrays -------------------------------------------------------------------------------------------------------


def array_report(folder: Path, content: bytes, limits: Limits = Limits()) -> DatasetReport:  # noqa: B008
    return inspect(written(folder, "rows.json", content), limits=limits)


def test_a_damaged_element_of_an_array_costs_no_other(tmp_path: Path) -> None:
    good = json.dumps(alpaca(1))
    report = array_report(tmp_path, f'[{good}, {{"instruction": nope}}, {good}, 17, "a, [b]", , {good}]'.encode())
    assert report.rows == 3 and report.unit == "row"
    assert [(p.line, p.kind) for p in report.problems] == [
        (2, "not JSON"), (4, "not an object"), (5, "not an object"), (6, "not JSON"),
    ]  # fmt: skip
    assert str(report.problems[0]).startswith("row 2: ")


@pytest.mark.parametrize(
    ("content", "rows", "kinds"),
    [
        (b"[]", 0, []),
        (b"[%s]", 1, []),
        (b"[%s,]", 1, ["not JSON"]),
        (b"[%s", 1, ["truncated JSON"]),
        (b'[%s, {"instruction": "a', 1, ["truncated JSON"]),
        (b'[%s, {"instruction": "a\\', 1, ["truncated JSON"]),
        (b"[%s] trailing", 1, ["not JSON"]),
        (b"[%s}, %s]", 1, ["not JSON"]),
    ],
)
def test_an_array_that_ends_wrongly_says_so(tmp_path: Path, content: bytes, rows: int, kinds: list[str]) -> None:
    report = array_report(tmp_path, content.replace(b"%s", json.dumps(alpaca(1)).encode()))
    assert (report.rows, [problem.kind for problem in report.problems]) == (rows, kinds)


@pytest.mark.parametrize("filler", ["x", "\\\\", '\\"', "[", "é"])
def test_large_elements_are_counted_and_passed_over_in_little_memory(tmp_path: Path, filler: str) -> None:
    large = '{"instruction": "a", "output": "' + filler * (4_000_000 // len(filler)) + '"}'
    nested = '{"instruction": "a", "output": [' + "1," * 2_000_000 + "1]}"
    good = json.dumps(alpaca(1))
    report = array_report(tmp_path, f"[{good},{nested},{good}]".encode(), Limits(1000))
    assert (report.rows, [problem.kind for problem in report.problems]) == (2, ["row too large"])
    report = array_report(tmp_path, f"[{good},{large}]".encode(), Limits(9_000_000))
    assert (report.rows, report.bad_rows) == (2, 0)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(JSON_VALUES, max_size=6), indent=st.sampled_from([None, 1]))
def test_every_element_of_any_array_is_a_row_or_a_problem(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None
) -> None:
    report = array_report(tmp_path_factory.getbasetemp(), json.dumps(values, indent=indent).encode())
    assert report.rows + report.bad_rows == len(values)


# --- tables ------------------------------------------------------------------------------------------------------------


def table_report(folder: Path, text: str | bytes, limits: Limits = Limits()) -> DatasetReport:  # noqa: B008
    return inspect(written(folder, "rows.csv", text.encode() if isinstance(text, str) else text), limits=limits)


def test_rows_of_a_table_that_do_not_fit_are_told_with_their_line(tmp_path: Path) -> None:
    report = table_report(
        tmp_path,
        b'prompt,completion\na,b\n"two\nlines",c\nonly one\na,b,c\n\n,empty\n\xff,x\n"'
        + b"y" * 500
        + b'",z\nlast,row\n',
        Limits(200),
    )
    assert report.rows == 3
    assert [(problem.line, problem.kind) for problem in report.problems] == [
        (5, "wrong number of cells"),
        (6, "wrong number of cells"),
        (8, "empty text"),
        (9, "invalid UTF-8"),
        (10, "row too large"),
    ]
    assert report.blank_lines == 1


@pytest.mark.parametrize(
    "text",
    [
        'prompt,completion\na,b\n"c,d\n' + "e,f\n" * 100,
        'prompt,completion\na,b\nc,"d\n' + "e,f\n" * 100,
        'prompt,completion\na,b\nc,"d\n' + 'e,"f"\n' * 100,
    ],
)
def test_a_quote_that_is_never_closed_swallows_nothing_unsaid(tmp_path: Path, text: str) -> None:
    for limits in (Limits(200), Limits()):
        report = table_report(tmp_path, text, limits)
        assert report.rows >= 1 and "quote" in report.problems[0].message and report.problems[0].line == 3
        assert report.rows + report.bad_rows == len(text.splitlines()) - 1, "each line is a row or a problem"
        lines = list(report.problem_lines)
        assert lines == list(range(3, 3 + len(lines))) and len(report.problem_counts) == 1


def test_a_row_of_a_table_that_does_not_end_is_held_up_to_the_limit(tmp_path: Path) -> None:
    content = b"prompt,completion\n" + (b"," * 900_000 + b'"\n"') * 200 + b"\n"
    path = written(tmp_path, "bomb.csv.gz", gzip.compress(content))
    assert path.stat().st_size < 1_000_000
    rows, bad_rows, peak_bytes = measured(path)
    assert rows == 0 and bad_rows > 100 and peak_bytes < 300_000_000


def test_a_header_in_another_encoding_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="header cannot be read: byte 2 .0xe9. is not UTF-8"):
        table_report(tmp_path, "xé,completion\na,b\n".encode("latin-1"))


def test_a_delimiter_inside_quotes_is_none(tmp_path: Path) -> None:
    assert str(kind_of(written(tmp_path, "a.csv", b'"prompt, or question, or ask";completion\n'))) == "CSV, semicolons"


def test_parquet_values_that_json_has_no_word_for(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array([b"bytes that are text", b"b"], pa.binary()),
            "completion": ["a", "x" * 3000],
            "picture": pa.array([b"\xff\xfe", None], pa.binary()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = written(tmp_path, "rows.parquet", sink.getvalue())
    first, second = examples(path)
    assert first.messages[0].content == "bytes that are text" and first.columns == {"picture": "(2 bytes)"}
    nested = [{"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]}]
    report = inspect(written(tmp_path, "nested.parquet", as_parquet(nested)), limits=Limits(1000))
    assert [problem.kind for problem in report.problems] == ["row too large"]
    overflow = pa.table({"prompt": ["a"], "completion": ["b"], "when": pa.array([2**50], pa.timestamp("ms"))})
    sink = io.BytesIO()
    pq.write_table(overflow, sink)
    report = inspect(written(tmp_path, "when.parquet", sink.getvalue()))
    assert report.rows == 0 and report.problems[0].kind == "damaged file"


@pytest.mark.parametrize(("header", "says"), [("prompt,prompt\na,b", "more than once"), ("\n\n \n", "is empty")])
def test_a_table_without_a_usable_header_is_refused(tmp_path: Path, header: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        table_report(tmp_path, header)


def test_a_conversation_in_a_cell_is_read_from_its_json(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi, you"}, {"role": "assistant", "content": "hello"}]
    path = written(tmp_path, "rows.csv", as_table([{"messages": json.dumps(chat)}], ","))
    assert [message.content for message in examples(path)[0].messages] == ["hi, you", "hello"]


# --- bombs and damage --------------------------------------------------------------------------------------------------


def test_a_gzip_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = b"".join(packer.compress(b" " * 1_000_000) for _ in range(300)) + packer.flush()
    assert len(content) < 1_000_000
    for name in ("rows.jsonl.gz", "rows.csv.gz"):
        with pytest.raises(DatasetError, match="more than 10,000,000 bytes once it is unpacked"):
            inspect(written(tmp_path, name, content), limits=Limits(1_000_000, 10_000_000))


@pytest.mark.parametrize("packed", [False, True])
def test_a_parquet_bomb_stops_at_the_limit(tmp_path: Path, packed: bool) -> None:
    """Its metadata tell little: one large value, repeated by a dictionary, costs next to nothing in the file."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": column}), sink)
    content = sink.getvalue()
    assert len(content) < 1_000_000
    path = written(tmp_path, "rows.parquet", gzip.compress(content) if packed else content)
    with pytest.raises(DatasetError, match="once it is unpacked"):
        inspect(path, limits=Limits(1_000_000, 100_000_000))


def test_a_file_of_more_rows_than_allowed_is_refused_whatever_they_are(tmp_path: Path) -> None:
    assert Settings(max_rows=7).limits.rows == 14
    limits = Limits(rows=9)
    for name, content in (
        ("rows.jsonl", as_lines([alpaca(n) for n in range(10)])),
        ("bad.jsonl", b"x\n" * 10),
        ("blank.jsonl", as_lines(ROWS) + b"\n" * 7),
        ("rows.csv", as_table([alpaca(n) for n in range(10)], ",")),
        ("rows.json", json.dumps([alpaca(n) for n in range(10)]).encode()),
        ("rows.parquet", as_parquet([alpaca(n) for n in range(10)])),
    ):
        path = written(tmp_path, name, content)
        assert inspect(path, limits=Limits(rows=10)).read in (10, len(ROWS))
        with pytest.raises(DatasetError, match=f"{name}: has more than 9 rows.*QLORA_LAB_MAX_ROWS"):
            inspect(path, limits=limits)


def test_of_very_many_problems_all_are_counted_and_the_first_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MOST_PROBLEMS_LISTED", 3)
    listed: list[Problem] = []
    report = inspect(written(tmp_path, "rows.jsonl", as_lines(ROWS) + b"x\n" * 5), on_problem=listed.append)
    assert [problem.line for problem in listed] == [4, 5, 6] and list(report.problem_lines) == [4, 5, 6, 7, 8]
    assert (report.bad_rows, report.problems_listed, report.to_json()["problems_listed"]) == (5, 3, 3)
    assert "5 problems · the first 3 of them are listed" in report.summary()
    report = inspect(written(tmp_path, "rows.jsonl", as_lines(ROWS) + b"x\n" * 3))
    assert report.problems_listed == 3 and "listed" not in report.summary()


MEASURED = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from qlora_core.data.inspection import inspect
report = inspect(Path(sys.argv[1]))
# Not what getrusage tells, which begins with the parent's.
peak_kib = re.search("VmHWM: *[\\t]* *([0-9]+) kB", Path("/proc/self/status").read_text())[1]
print(report.rows, report.bad_rows, int(peak_kib) * 1024)
"""


def measured(path: Path) -> tuple[int, int, int]:
    """(rows, bad rows, peak bytes) of an inspection in a process of its own."""
    found = subprocess.run([sys.executable, "-c", MEASURED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows, bad_rows, peak_bytes = map(int, found.stdout.split())
    return rows, bad_rows, peak_bytes


@pytest.mark.parametrize("in_list", [False, True], ids=["rows", "list"])
def test_a_large_text_that_parquet_repeats_is_unpacked_a_few_times_at_most(tmp_path: Path, in_list: bool) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array(["x" * 4_000_000]))
    if in_list:
        column = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), column)
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    rows, bad_rows, peak_bytes = measured(path)
    assert (rows, bad_rows) == (0, 1 if in_list else 400) and peak_bytes < 600_000_000


def test_a_parquet_column_of_more_values_than_memory_holds_is_refused(tmp_path: Path) -> None:
    numbers = pa.array([7], pa.int8()).take(pa.array(np.zeros(1000, np.int64)))
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a"], "numbers": pa.ListArray.from_arrays([0, 1000], numbers)}), path)
    assert inspect(path).rows == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PARQUET_GROUP_BYTES", 3999)
        with pytest.raises(DatasetError, match="has 1,000 values in one row group; write it in smaller"):
            inspect(path)


def test_parquet_values_are_the_same_whichever_way_they_are_read(tmp_path: Path) -> None:
    words = ["", "é", "x" * 300, None]
    rows = [
        {
            "prompt": f"question {n}",
            "completion": "y" * (4000 if n % 11 == 0 else 1),
            "words": [words[n % 4], words[(n + 1) % 4]] * (n % 3) if n % 5 else None,
            "parts": {"a": {"b": words[n % 3]}, "number": n} if n % 4 else None,
            "truth": bool(n % 2),
        }
        for n in range(3000)
    ]
    table = pa.Table.from_pylist(rows)
    kinds = {"short": pa.binary(3), "view": pa.string_view(), "large": pa.large_string()}
    for name, kind in kinds.items():
        table = table.append_column(name, pa.array([None if n % 3 else "abc" for n in range(3000)]).cast(kind))
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=1000)
    expected = [
        {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items() if k not in ("prompt", "completion")}
        for row in table.to_pylist()
        if len(row["completion"]) == 1
    ]
    for at_once in (64_000_000, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "PARQUET_BYTES", at_once)
            patch.setattr(tables, "SLICE_BYTES", at_once)
            read = list(read_rows(path, limits=Limits(3000))[1])
        found = [row for row in read if isinstance(row, Example)]
        assert [row.columns for row in found] == expected
        assert len(read) == 3000 and {type(row) for row in read} == {Example, Problem}
        large = [row.line for row in read if isinstance(row, Problem)]
        assert large == [n + 1 for n, row in enumerate(rows) if len(row["completion"]) > 1]


EVERY_BYTE = """
import sys
from pathlib import Path
from qlora_core.data.formats import read_rows
from qlora_core.errors import DatasetError
path = Path(sys.argv[1])
content = path.read_bytes()
for place in range(len(content)):
    for value in (content[place] ^ 1, 0):
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        try:
            list(read_rows(path)[1])
        except DatasetError:
            pass
"""


def test_no_damaged_byte_of_a_parquet_file_ends_the_process(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.parquet", as_parquet(ROWS))
    found = subprocess.run([sys.executable, "-c", EVERY_BYTE, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "completion", "prompt"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match="rows.parquet: has more than one column 'prompt'; rename one"):
        inspect(tmp_path / "rows.parquet")


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_truncated_archive_keeps_the_rows_before_and_says_where_it_ends(tmp_path: Path, cut: float) -> None:
    content = gzip.compress(as_lines([alpaca(n, output=str(hash(str(n)))) for n in range(5000)]))
    report = inspect(written(tmp_path, "rows.jsonl.gz", content[: int(len(content) * cut)]))
    assert report.rows > 100
    assert report.problems[-1].kind == "damaged file"


@settings(max_examples=FUZZED, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(WRITERS)), packed=st.booleans())
def test_a_mutated_file_of_any_kind_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, packed: bool
) -> None:
    content = bytearray(WRITERS[name](ROWS * 3))
    if packed:
        content = bytearray(gzip.compress(bytes(content)))
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = written(tmp_path_factory.getbasetemp(), name + (".gz" if packed else ""), bytes(content))
    try:
        rows = list(read_rows(path, limits=Limits(10_000, 1_000_000))[1])
    except DatasetError as error:
        assert path.name in str(error)
        return
    report = inspect(path, limits=Limits(10_000, 1_000_000))
    assert report.rows + report.bad_rows + report.blank_lines == len(rows)


@settings(max_examples=FUZZED, deadline=None)
@given(data=st.data())
def test_a_mutated_real_file_loses_no_row_without_a_word(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = (ROOT / "examples" / "support_tickets.jsonl").read_bytes().splitlines(keepends=True)
    content = bytearray(b"".join(lines[:20]))
    for _ in range(data.draw(st.integers(1, 8))):
        place, removed = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
        content[place : place + removed] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"\n", b'"', b"\\", b"{", b"}"])
        )
    path = written(tmp_path_factory.getbasetemp(), "real.jsonl", bytes(content))
    try:
        report = inspect(path)
    except DatasetError as error:
        assert "real.jsonl" in str(error)
        return
    if report.kind == "JSONL":
        lines_there = content.count(b"\n") + (not content.endswith(b"\n"))
        assert report.rows + report.bad_rows + report.blank_lines == lines_there
