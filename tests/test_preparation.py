"""Preparation: every row that goes in comes out or is listed, the same input gives the same set, and a set says what it is."""

import csv
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import CHATML, FUZZED, alpaca, config_in, model_folder, settings_in, tokenizer_folder, write_rows
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_core import token_cache
from qlora_core.config import replace
from qlora_core.data.card import code, data_card
from qlora_core.data.formats import read_rows
from qlora_core.data.locate import LINEAGE
from qlora_core.data.preparation import Preparation, public_name, shares_of
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.data.preparing import prepare
from qlora_core.data.rows import Example, Message
from qlora_core.data.selection import held_out
from qlora_core.data.sources import origins
from qlora_core.data.steps import Ledger, Row, normalise
from qlora_core.data.stored import read_stored
from qlora_core.errors import ConfigError, DatasetError
from qlora_core.model_card import validate
from qlora_core.runs import RunStore, lock
from qlora_core.tokens import load_tokenizer

# Every row stays where it is, whole and unchanged; tests switch on what they are about.
PLAIN = Preparation(normalise=False, duplicates="keep", eval_fraction=0, shuffle=False)


def prepared(folder: Path, *data: Any, **options: Any) -> PreparedSet:
    """Each of `data` is a list of rows, or the path of a file."""
    folder.mkdir(exist_ok=True)
    named = [str(write_rows(folder / f"file{n}.jsonl", d) if isinstance(d, list) else d) for n, d in enumerate(data)]
    return prepare(named, folder / "set", replace(PLAIN, **options), settings_in(folder))


def rows_of(made: PreparedSet) -> list[dict[str, Any]]:
    return [json.loads(line) for path in (made.train, made.eval) if path for line in path.read_text().splitlines()]


def changes(made: PreparedSet) -> list[dict[str, str]]:
    with (made.folder / "changes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def counts(made: PreparedSet, step: str) -> dict[str, Any]:
    return made.lineage["steps"][step]


# --- steps -------------------------------------------------------------------------------------------------------------


def test_line_ends_and_trailing_space_are_normalised_counted_and_listed(tmp_path: Path) -> None:
    made = prepared(tmp_path, [alpaca(1), alpaca(2, output="a \r\nb\rc\t\n  d  \n\n")], normalise=True)
    assert [row["output"] for row in rows_of(made)] == ["Answer 1.", "a\nb\nc\n  d"]
    assert counts(made, "normalise") == {"rows changed": 1, "line ends": 2, "white space at an end": 4}
    assert changes(made) == [
        {"step": "normalise", "source": "file0.jsonl", "line": "2", "what": "line ends x 2, white space at an end x 4"}
    ]


def normalised(text: str) -> str:
    row = Row(Example(1, (Message("user", "a"), Message("assistant", text))), 0)
    with Ledger(Path(os.devnull), ["file"]) as ledger:
        (changed,) = normalise(iter([row]), ledger)
    return changed.example.reference


@given(st.text("a \t\n\r\u00a0\u3000\u2028"))
def test_what_is_normalised_stays_as_it_is(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once and once.split() == text.split() and once == once.rstrip(" \n")
    assert normalised("abc \n \n") == "abc"


@pytest.mark.parametrize("unit", [" ", " \n", "\n", "\r", "a "])
def test_a_megabyte_of_white_space_takes_no_time(unit: str) -> None:
    begun = time.process_time()
    normalised(unit * (1_000_000 // len(unit)) + ("x" if unit == " " else ""))
    assert time.process_time() - begun < 5  # it was quadratic: an hour


def test_equal_rows_are_dropped_across_files_and_the_first_is_named(tmp_path: Path) -> None:
    made = prepared(tmp_path, [alpaca(1), alpaca(2)], [alpaca(3), alpaca(1)], duplicates="drop")
    assert [row["instruction"] for row in rows_of(made)] == ["Question 1?", "Question 2?", "Question 3?"]
    assert changes(made)[0]["what"] == "dropped: equal to file0.jsonl 1" and changes(made)[0]["source"] == "file1.jsonl"


def test_near_duplicates_are_dropped(tmp_path: Path) -> None:
    text = "The parcel that I ordered on the first of March has still not arrived at my house in the old town. " * 3
    rows = [
        alpaca(1, output=text),
        alpaca(1, output=text + "Please help."),
        alpaca(3, output="Something else entirely."),
    ]
    made = prepared(tmp_path, rows, near_duplicates=0.8)
    assert made.lineage["rows"]["train"] == 2 and counts(made, "near duplicates")["rows dropped"] == 1
    assert "like file0.jsonl 1" in changes(made)[0]["what"]


@pytest.mark.parametrize("what", ["find", "mask"])
def test_personal_data_are_found_and_masked_in_texts_and_columns(tmp_path: Path, what: str) -> None:
    rows = [alpaca(1, output="Write to anna@example.com.", author="bob@example.org"), alpaca(2)]
    made = prepared(tmp_path, rows, personal_data=what)
    first = rows_of(made)[0]
    masked = what == "mask"
    assert (first["output"] == "Write to [EMAIL].") == masked and (first["author"] == "[EMAIL]") == masked
    assert counts(made, "personal data")["rows"] == 1 and counts(made, "personal data")["email"] == 2
    card = (made.folder / "README.md").read_text()
    assert "found in 1 rows and " + ("masked" if masked else "left as it is") in card


@pytest.mark.parametrize("what", ["drop", "cut"])
def test_long_rows_are_dropped_or_cut_to_what_training_counts(tmp_path: Path, what: str) -> None:
    base = model_folder(tokenizer_folder(tmp_path / "base", chat_template=CHATML))
    chat = [{"role": role, "content": text} for role, text in
            (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "fox " * 60))]  # fmt: skip
    rows = [
        {"messages": m} for m in (chat, chat[:2], [chat[0], chat[3]], [{"role": "user", "content": "x" * 900}, chat[1]])
    ]
    made = prepared(tmp_path, rows, long_rows=what, max_tokens=64, base_model=str(base))
    found = [[message["content"] for message in row["messages"]] for row in rows_of(made)]
    if what == "drop":
        assert found == [["a", "b"]] and counts(made, "long rows")["dropped"] == 3
    else:
        assert found[:2] == [["a", "b"], ["a", "b"]], "later turns go first"
        assert found[2][0] == "a" and found[2][1].startswith("fox fox") and len(found) == 3
        tokenizer = load_tokenizer(base)
        table = token_cache.make_table(read_rows(made.train)[1], tokenizer)
        assert max(table.lengths) <= 64 and (table.end_positions >= 0).all(), "every row still ends"
        assert table.lengths[2] > 60, "no more is cut than must be"
        told = [change["what"] for change in changes(made)]
        lengths = table.lengths.tolist()
        assert re.fullmatch(rf"\d+ tokens: later turns left out, {lengths[0]} tokens are left", told[0])
        assert re.fullmatch(rf"\d+ tokens: last response cut, {lengths[2]} tokens are left", told[1])
    assert len(changes(made)) == 3


def test_columns_are_derived_and_those_of_the_data_stay(tmp_path: Path) -> None:
    made = prepared(tmp_path, [alpaca(1), alpaca(2, words="mine")], derive=("words", "characters"))
    assert [row["words"] for row in rows_of(made)] == [4, "mine"]
    assert counts(made, "derived columns")["words, kept as it was"] == 1


def test_balance_keeps_as_many_rows_as_have_the_shares(tmp_path: Path) -> None:
    rows = [alpaca(n, source=("human", "synthetic", "logs", "other")[n % 4]) for n in range(200)]
    options = {"balance_by": "source", "balance_shares": "human=30, synthetic=40, logs=30"}
    made = prepared(tmp_path, rows, **options)
    assert Counter(row["source"] for row in rows_of(made)) == {"human": 37, "synthetic": 50, "logs": 37}
    assert counts(made, "balance")["rows left out"] == 200 - 124 == len(changes(made))
    there = {int(row["instruction"].split()[1][:-1]) + 1 for row in rows_of(made)}
    assert {int(change["line"]) for change in changes(made)} == set(range(1, 201)) - there
    with pytest.raises(DatasetError, match="no row has the value 'robot'; there are 'human' \\(50\\)"):
        prepared(tmp_path / "b", rows, balance_by="source", balance_shares="human=50, robot=50")
    with pytest.raises(DatasetError, match="no row has a column 'sauce'"):
        prepared(tmp_path / "c", rows, balance_by="sauce", balance_shares="human=100")


def test_a_stratified_split_holds_out_the_same_share_of_every_value(tmp_path: Path) -> None:
    rows = [alpaca(n, kind="rare" if n % 10 == 0 else "common") for n in range(200)]
    made = prepared(tmp_path, rows, eval_fraction=0.1, stratify_by="kind", shuffle=True)
    assert made.lineage["rows"] == {"train": 180, "eval": 20}
    held_out = [json.loads(line)["kind"] for line in made.eval.read_text().splitlines()]
    assert Counter(held_out) == {"rare": 2, "common": 18}
    by_length = prepared(tmp_path / "b", rows, eval_fraction=0.1, stratify_by="characters")
    assert by_length.lineage["rows"]["eval"] == 20 and "characters" in rows_of(by_length)[0]


def test_equal_rows_are_never_on_both_sides(tmp_path: Path) -> None:
    made = prepared(tmp_path, [alpaca(n % 10) for n in range(40)], eval_fraction=0.2)
    train, held_out = ({row.digest() for row in read_rows(path)[1]} for path in (made.train, made.eval))
    assert held_out and not train & held_out


def test_limit_draws_rows_and_shuffle_follows_the_seed(tmp_path: Path) -> None:
    rows = [alpaca(n) for n in range(50)]
    first = rows_of(prepared(tmp_path / "1", rows, limit=20, shuffle=True))
    again = rows_of(prepared(tmp_path / "2", rows, limit=20, shuffle=True))
    other = rows_of(prepared(tmp_path / "3", rows, limit=20, shuffle=True, seed=1))
    assert first == again != other and len(first) == 20
    listed = changes(PreparedSet.load(tmp_path / "1" / "set"))
    assert len(listed) == 30 and {change["what"] for change in listed} == {"left out: not drawn"}
    kept = [row["instruction"] for row in rows_of(prepared(tmp_path / "4", rows, limit=20))]
    assert kept == sorted(kept, key=lambda text: int(text.split()[1][:-1])), "without shuffle the order stays"


def test_rows_with_problems_are_refused_or_left_out_and_listed(tmp_path: Path) -> None:
    rows = [alpaca(1), {"instruction": "x"}, alpaca(3)]
    with pytest.raises(DatasetError, match="file0.jsonl: 1 row cannot be used") as error:
        prepared(tmp_path, rows)
    assert "line 2" in error.value.problems[1] and not (tmp_path / "set").exists()
    made = prepared(tmp_path, rows, skip_bad_rows=True)
    assert made.lineage["sources"][0]["left_out"] == 1 and changes(made)[0]["line"] == "2"


def test_nothing_that_is_masked_is_quoted_in_what_is_published(tmp_path: Path) -> None:
    rows = [
        alpaca(1),
        alpaca(2, output=["john.doe@example.com"]),
        alpaca(3, output=["4111 1111 1111 1111 is my card, ok?"]),
    ]
    made = prepared(tmp_path, rows, skip_bad_rows=True, personal_data="mask")
    assert [change["line"] for change in changes(made)] == ["2", "3"]
    published = "".join((made.folder / name).read_text() for name in ("changes.csv", "lineage.json", "README.md"))
    assert "john" not in published and "4111" not in published and "wrong type" in published
    ledger = Ledger(tmp_path / "list.csv", ["file"], mask=True)
    with ledger:
        ledger.change("long rows", 0, 1, "left out: no template takes john.doe@example.com")
    assert "[EMAIL]" in (tmp_path / "list.csv").read_text()


def test_no_folder_of_this_machine_is_published(tmp_path: Path) -> None:
    base = model_folder(tokenizer_folder(tmp_path / "tiny", chat_template=CHATML))
    made = prepared(tmp_path, [alpaca(1)], long_rows="drop", base_model=str(base))
    assert made.lineage["preparation"]["base_model"] == "tiny"
    assert not any(str(tmp_path) in (made.folder / name).read_text() for name in ("lineage.json", "README.md"))
    assert public_name("owner/model@main") == "owner/model@main" and public_name("bundled") == "bundled"
    assert public_name("~/models/rater") == "rater" and public_name(None) is None


def test_every_source_is_checked_before_the_work_begins(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        prepared(tmp_path, [alpaca(1), {}], [{"q": "a", "a": "b"}], [alpaca(2), {"instruction": "x"}])
    told = "\n".join(error.value.problems)
    assert "file0.jsonl: 1 row cannot be used" in told and "file2.jsonl: 1 row cannot be used" in told
    assert "file1.jsonl: the columns 'q', 'a' are none of the known forms" in told


def test_other_columns_never_become_part_of_the_conversation(tmp_path: Path) -> None:
    rows = [
        {"q": "ask", "a": "say", "messages": [{"role": "user", "content": "old"}], "text": "t", "tools": "x", "id": 1}
    ]
    made = prepared(tmp_path, rows, columns="prompt=q, response=a")
    (row,) = rows_of(made)
    assert [message["content"] for message in row["messages"]] == ["ask", "say"]
    assert row["original_messages"][0]["content"] == "old" and row["original_text"] == "t" and row["id"] == 1
    assert counts(made, "read")["column messages is now original_messages"] == 1
    (text,) = rows_of(prepared(tmp_path / "b", [{"body": "all", "text": "old"}], columns="text=body"))
    assert (text["text"], text["original_text"]) == ("all", "old")


def test_what_stands_in_messages_and_is_not_read_is_counted_and_left_out(tmp_path: Path) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
    ]
    made = prepared(tmp_path, [{"messages": messages}])
    assert set(rows_of(made)[0]) == {"messages"}
    read = counts(made, "read")
    assert read["left out: weight of messages"] == read["left out: id of tool calls"] == 1


def test_a_card_that_is_written_as_a_number_is_masked(tmp_path: Path) -> None:
    (row,) = rows_of(prepared(tmp_path, [alpaca(1, card=4111111111111111, n=5)], personal_data="mask"))
    assert (row["card"], row["n"]) == ("[CARD]", 5)


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [write_rows(tmp_path / folder / "rows.jsonl", [alpaca(n)]) for n, folder in enumerate("ab")]
    assert [row["source"] for row in rows_of(prepared(tmp_path, *paths))] == ["rows.jsonl", "rows.jsonl (2)"]


def test_a_column_without_a_value_is_a_stratum_of_its_own(tmp_path: Path) -> None:
    rows = [alpaca(n, score=n) if n % 2 else alpaca(n) for n in range(100)]
    made = prepared(tmp_path, rows, eval_fraction=0.2, stratify_by="score")
    held_out = [json.loads(line) for line in made.eval.read_text().splitlines()]
    assert sum("score" not in row for row in held_out) == 10


def test_a_split_by_a_column_of_many_values_takes_no_more_than_seconds(tmp_path: Path) -> None:
    digests, strata = np.arange(200_000, dtype=np.uint64), [f"user{n % 60_000}" for n in range(200_000)]
    begun = time.process_time()
    assert held_out(digests, strata, 0.1, np.random.default_rng(1)).sum() == 20_000
    assert time.process_time() - begun < 20  # it was quadratic once: minutes


# --- the set -----------------------------------------------------------------------------------------------------------


def test_files_of_several_forms_become_one_set_that_knows_its_sources(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "table.csv").write_text("prompt,completion,source\na,b,elsewhere\n")
    made = prepared(tmp_path, [alpaca(1, input="x")], [chat], tmp_path / "table.csv")
    rows = rows_of(made)
    assert [row["source"] for row in rows] == ["file0.jsonl", "file1.jsonl", "elsewhere"]
    assert rows[0]["messages"][0]["content"] == "Question 1?\n\nx" and made.lineage["form"] == "chat messages"
    assert [source["form"] for source in made.lineage["sources"]] == [
        "Alpaca columns",
        "chat messages",
        "prompt/completion",
    ]
    with pytest.raises(DatasetError, match="plain text and some are conversations"):
        prepared(tmp_path / "b", [alpaca(1)], [{"text": "a"}])


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": call}],
         "n": 1, "mixed": "x", "deep": {"a": [1]}, "big": 2**70, "f": 1.5},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
         "n": None, "mixed": 2, "deep": None, "big": 1, "f": 2},
    ]  # fmt: skip
    made = prepared(tmp_path, rows, eval_fraction=0.5)
    digests = {row.digest() for path in (made.train, made.eval) for row in read_rows(path)[1]}
    files = [made.folder / "data" / name for name in ("train.parquet", "validation.parquet")]
    found = [row for path in files for row in read_rows(path)[1]]
    assert {row.digest() for row in found} == digests
    assert {row.columns["big"] for row in found} == {str(2**70), "1"}, "what 64 bits do not hold is text"
    assert sum(pq.read_metadata(path).num_rows for path in files) == 2
    assert pq.read_schema(files[0]).equals(pq.read_schema(files[1])), "datasets refuses splits with other columns"


def test_numbers_that_no_column_holds_become_text(tmp_path: Path) -> None:
    rows = [alpaca(1, n=2**53 + 1, m=2**53 + 1), alpaca(2, n=0.5, m=1)]
    made = prepared(tmp_path, rows)
    table = pq.read_table(made.folder / "data" / "train.parquet").to_pydict()
    assert table["n"] == [str(2**53 + 1), "0.5"] and table["m"] == [2**53 + 1, 1]


def test_what_arrow_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.data.prepared_set._cell", lambda value, field: object())
    with pytest.raises(DatasetError, match="train.parquet: the rows cannot be written as Parquet"):
        prepared(tmp_path, [alpaca(1)])
    assert not (tmp_path / "set").exists()


def test_a_row_that_is_too_large_once_written_is_left_out_and_listed(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), max_row_bytes=10_000)
    path = tmp_path / "rows.csv"  # in which a new line is one byte, which JSON writes as two
    path.write_text('prompt,completion\na,b\nc,"' + "x\n" * 4000 + 'x"\n')
    made = prepare([str(path)], tmp_path / "set", PLAIN, settings)
    assert made.lineage["rows"]["train"] == 1 and counts(made, "large rows") == {"rows left out": 1}
    assert changes(made)[0]["what"] == "left out: larger than QLORA_LAB_MAX_ROW_BYTES once written"
    run = RunStore(settings).create(config_in(tmp_path, data=str(path), skip_bad_rows=True, eval_data=str(made.train)))
    assert run.dataset().train_rows == 2


def test_the_fingerprint_follows_all_columns_and_the_order(tmp_path: Path) -> None:
    rows = [alpaca(n, author=f"{n}@example.com") for n in range(4)]
    first = prepared(tmp_path, rows)
    second = prepared(tmp_path, rows, personal_data="mask")
    since = second.lineage["since_last_version"]
    assert (since["rows_added"], since["rows_removed"]) == (4, 4)
    assert first.lineage["fingerprint"] != second.lineage["fingerprint"]
    assert first.lineage["fingerprints"] == second.lineage["fingerprints"], "the conversations are the same"
    third = prepared(tmp_path, rows, shuffle=True, eval_fraction=0.5)
    since = third.lineage["since_last_version"]
    assert (since["rows_added"], since["rows_removed"]) == (4, 4) and third.lineage["rows"]["eval"] == 2
    printed = subprocess.run(
        "sha256sum train.jsonl eval.jsonl | sha256sum", shell=True, cwd=third.folder, capture_output=True, check=True
    ).stdout.decode()
    assert printed.split()[0] == third.lineage["fingerprint"]
    (third.folder / "row_digests.npy").unlink()
    fourth = prepared(tmp_path, rows[1:], shuffle=True, eval_fraction=0.5)
    assert fourth.lineage["since_last_version"]["rows_removed"] == 1, "they are counted again where the list is gone"


def test_another_dataset_is_no_version(tmp_path: Path) -> None:
    prepared(tmp_path, [alpaca(1)])
    other = write_rows(tmp_path / "other.jsonl", [alpaca(2)])
    with pytest.raises(DatasetError, match="holds the dataset prepared from file0.jsonl; name another folder"):
        prepared(tmp_path, other)
    assert prepared(tmp_path, [alpaca(1)], other).lineage["version"] == 2, "with another file it is one"
    of_hub = [{"name": "x.jsonl", "hub": "hub:owner/name:default:train@abc"}, {"name": "y.jsonl"}]
    assert origins(of_hub) == {"owner/name", "y.jsonl"}


def test_two_preparations_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    folders = []
    path, settings = write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(500)]), settings_in(tmp_path)
    begin = threading.Barrier(3)

    def work(seed: int) -> None:
        begin.wait()
        folders.append(prepare([str(path)], tmp_path / "set", replace(PLAIN, seed=seed), settings).lineage)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and sorted({lineage["version"] for lineage in folders}) in ([1, 2], [1, 2, 3])
    assert not list(tmp_path.glob(".*.partial"))


def test_one_that_waits_can_be_ended(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(1)])

    class Ended(Exception):
        pass

    def report(doing: str, *_: Any) -> None:
        if doing.startswith("waiting"):
            raise Ended

    with lock(tmp_path / ".set.lock"), pytest.raises(Ended):
        prepare([str(path)], tmp_path / "set", PLAIN, settings_in(tmp_path), report=report)


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    for name in (".set-77-0123abcd.partial", ".set-2-77-0123abcd.partial"):
        (tmp_path / name).mkdir()
    prepared(tmp_path, [alpaca(1)])
    assert [path.name for path in tmp_path.glob(".*.partial")] == [".set-2-77-0123abcd.partial"], "of this set alone"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1'])
def test_a_set_that_a_crash_has_damaged_is_told(tmp_path: Path, text: str) -> None:
    made = prepared(tmp_path, [alpaca(1)])
    (made.folder / LINEAGE).write_text(text)
    with pytest.raises(DatasetError, match="its lineage.json cannot be read"):
        prepared(tmp_path, [alpaca(1)])


def test_the_same_preparation_is_found_and_another_becomes_the_next_version(tmp_path: Path) -> None:
    rows = [alpaca(n) for n in range(10)]
    first = prepared(tmp_path, rows)
    stamp = first.train.stat().st_mtime_ns
    assert prepared(tmp_path, rows).train.stat().st_mtime_ns == stamp
    second = prepared(tmp_path, [*rows[2:], alpaca(77)])
    since = second.lineage["since_last_version"]
    assert (second.lineage["version"], since["rows_added"], since["rows_removed"]) == (2, 1, 2)
    assert PreparedSet.load(tmp_path / "set.v1").lineage["fingerprint"] == first.lineage["fingerprint"]
    second.train.unlink()
    assert prepared(tmp_path, [*rows[2:], alpaca(77)]).is_whole(), "a damaged set is made again"


def test_a_version_that_was_deleted_leaves_its_number_free_for_nobody(tmp_path: Path) -> None:
    rows = [alpaca(n) for n in range(10)]
    for count in (10, 9):
        prepared(tmp_path, rows[:count])
    shutil.rmtree(tmp_path / "set")
    third = prepared(tmp_path, rows[:8])
    assert third.lineage["version"] == 2 and third.lineage["since_last_version"]["rows_removed"] == 2
    assert prepared(tmp_path, rows[:7]).lineage["version"] == 3
    assert sorted(path.name for path in tmp_path.glob("set.v*")) == ["set.v1", "set.v2"]


def test_a_row_above_the_usual_limit_is_prepared_where_the_limit_is_raised(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), max_row_bytes=3_000_000)
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(1, output="x" * 1_500_000), alpaca(2)])
    assert prepare([str(path)], tmp_path / "set", PLAIN, settings).lineage["rows"]["train"] == 2


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.docx").touch()
    with pytest.raises(DatasetError, match="is no prepared dataset"):
        prepared(tmp_path, [alpaca(1)])


def test_a_run_trains_on_a_prepared_folder_and_knows_its_version(tmp_path: Path) -> None:
    made = prepared(tmp_path, [alpaca(n) for n in range(20)], eval_fraction=0.2, license="cc-by-4.0")
    run = RunStore(settings_in(tmp_path)).create(config_in(tmp_path, data=str(made.folder)))
    dataset = run.dataset()
    assert (dataset.train_rows, dataset.eval_rows, dataset.eval_source) == (16, 4, "eval.jsonl")
    assert dataset.train_fingerprint == made.lineage["fingerprints"]["train"]
    assert dataset.origin["fingerprint"] == made.lineage["fingerprint"] and dataset.origin["license"] == "cc-by-4.0"
    assert [row.reference for row in read_stored(run.path / "dataset" / "eval.jsonl")]


def test_tokens_made_by_a_preparation_serve_the_run(tmp_path: Path) -> None:
    base = model_folder(tokenizer_folder(tmp_path / "tiny", chat_template=CHATML))
    made = prepared(tmp_path, [alpaca(n) for n in range(20)], eval_fraction=0.2, tokenise=True, base_model=str(base))

    def never() -> Any:
        raise AssertionError("the rows are rendered again")

    settings, tokenizer = settings_in(tmp_path), load_tokenizer(base)
    table = token_cache.table(made.lineage["fingerprints"]["train"], never, tokenizer, settings)
    assert len(table) == 16
    for text in ("loss_on", "template"):
        with pytest.raises(AssertionError):
            token_cache.table(
                made.lineage["fingerprints"]["train"], never,
                load_tokenizer(base, "zephyr") if text == "template" else tokenizer, settings,
                loss_on="everything" if text == "loss_on" else "all_responses",
            )  # fmt: skip


def test_nothing_of_a_file_or_a_name_breaks_out_of_the_card(tmp_path: Path) -> None:
    evil = "x`|](http://evil)\n---\nlicense: mit\n# <img src=x>"
    lineage = prepared(tmp_path, [alpaca(1, **{evil: 1})]).lineage
    lineage["sources"][0]["name"] = evil
    text = data_card(lineage | {"name": evil, "license": evil, "columns": [evil]})
    # As the Hub finds the front matter (huggingface_hub.repocard).
    front, body = re.fullmatch(r"---\n([\S\s]*?)\n---\n([\S\s]*)", text).groups()
    assert "license" not in yaml.safe_load(front)
    assert body.count(code(evil)) == 4
    rest = body.replace(code(evil), "")
    assert "<img" not in rest and "evil" not in rest and not re.search(r"^license", body, re.MULTILINE)


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("ODC-By-1.0", {"license": "odc-by"}),
        ("OurOwn-1.0", {"license": "other", "license_name": "ourown-1.0"}),
        ("1e3", {"license": "other", "license_name": "1e3"}),
    ],
)
def test_the_card_names_the_licence_as_the_hub_takes_it(tmp_path: Path, named: str, written: dict[str, str]) -> None:
    text = data_card(prepared(tmp_path, [alpaca(1)]).lineage | {"license": named})
    front = yaml.safe_load(text.split("---\n")[1])
    assert {name: value for name, value in front.items() if name.startswith("license")} == written
    assert validate(text) == [] and front["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train.parquet"}
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"derive": ["colour"]}, "derive: 'colour' is unknown"),
        ({"balance_by": "a"}, "go together"),
        ({"balance_by": "a", "balance_shares": "x"}, "no value=share"),
        ({"balance_by": "a", "balance_shares": "x=30, y=40"}, "add up to 70"),
        ({"stratify_by": "a", "eval_fraction": 0}, "nothing is held out"),
        ({"near_duplicates": 0.2}, "near_duplicates is 0.2"),
        ({"license": "ask my boss"}, "write an identifier"),
        ({"template": "chatlm"}, "template is 'chatlm'"),
    ],
)
def test_settings_that_cannot_work_are_told(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Preparation(**options)


def test_missing_files_are_named_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        prepare([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "set", PLAIN, settings_in(tmp_path))
    assert len(error.value.problems) == 2 and "no such file" in error.value.problems[0]


@given(st.text())
def test_any_text_for_shares_is_read_or_refused(text: str) -> None:
    shares, problems = shares_of(text)
    assert problems or not shares or abs(sum(shares.values()) - 1) < 1e-9


# --- whatever comes in -------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(["a@example.com", "x \r\n", "4111 1111 1111 1111", "\ud800", "\x00"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {"instruction": TEXTS, "output": TEXTS}, optional={"input": TEXTS, "k": st.integers(0, 2) | TEXTS}
    )
    | st.fixed_dictionaries({"x": TEXTS}),
    min_size=1,
    max_size=12,
)
OPTIONS = st.fixed_dictionaries(
    {"skip_bad_rows": st.just(True)},
    optional={
        "normalise": st.booleans(),
        "personal_data": st.sampled_from(["keep", "find", "mask"]),
        "duplicates": st.sampled_from(["keep", "drop"]),
        "near_duplicates": st.none() | st.just(0.8),
        "derive": st.just(("words", "characters")),
        "limit": st.none() | st.integers(2, 8),
        "eval_fraction": st.sampled_from([0, 0.3]),
        "shuffle": st.booleans(),
    },
)


@hypothesis_settings(max_examples=FUZZED, deadline=None)
@given(rows=ROWS, options=OPTIONS)
def test_counts_always_add_up(tmp_path_factory: pytest.TempPathFactory, rows: Any, options: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        path = folder / "file.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = prepare([str(path)], folder / "set", replace(PLAIN, **options), settings_in(folder))
    except DatasetError as error:
        assert str(error)
        return
    steps, lineage = made.lineage["steps"], made.lineage
    read = steps["read"].get("usable rows", 0)
    assert read + steps["read"].get("rows left out that have problems", 0) == len(rows)
    dropped = sum(steps.get(step, {}).get("rows dropped", 0) for step in ("duplicates", "near duplicates"))
    dropped += sum(steps.get(step, {}).get("rows left out", 0) for step in ("limit", "large rows"))
    assert lineage["rows"]["train"] + lineage["rows"]["eval"] == read - dropped
    written = [row for path in (made.train, made.eval) if path for row in read_rows(path)[1]]
    assert len(written) == read - dropped and all(isinstance(row, Example) for row in written)
    assert (made.folder / LINEAGE).exists()
