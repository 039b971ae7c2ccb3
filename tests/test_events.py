"""Events: what a worker said is never lost, never read by halves, and holds until an attempt starts further back."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import ROOT, started, step
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core import events

WRITER = """
import sys
from pathlib import Path
from qlora_core import events
for number in range(300):
    events.append(Path(sys.argv[1]), events.Note(text=f"{number} " + "é" * (number * 37 % 9000)))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_every_kind_of_event_is_read_as_it_was_written(path: Path) -> None:
    written = [
        events.Launched(attempt=1),
        events.Note(text="a\r\nb\u2028c\u0085 😀 é"),
        events.Phase(name="loading", done=1, total=2),
        started(rows_left_out=(3, 4)),
        events.Resumed(from_step=2, skipped=("checkpoint-4 is damaged",)),
        step(3, grad_norm=None),
        events.Evaluation(step=3, loss=1.5, tokens=10, seconds=0.1),
        events.Score(step=3, name="exact", correct=1, total=2, seconds=0.1),
        events.Checkpoint(step=3),
        events.Finished(step=3),
        events.Stopped(step=3),
        events.Failed(step=3, reason="the loss is nan"),
    ]
    assert {type(event) for event in written} == set(events.KINDS.values())
    for event in written:
        events.append(path, event)
    assert events.read(path) == (written, path.stat().st_size)
    assert [events.to_json(event)["event"] for event in written] == list(events.KINDS)


def test_text_of_any_kind_is_one_line(path: Path) -> None:
    """A file name may hold bytes that are no UTF-8; Python reads them as halves of surrogate pairs."""
    events.append(path, events.Failed(step=0, reason="data\udcff.jsonl: is empty"))
    events.append(path, events.Note(text="after"))
    assert [type(event) for event in events.read(path)[0]] == [events.Failed, events.Note]
    assert path.read_bytes().count(b"\n") == 2


def test_file_that_is_not_there_yet_is_no_event(path: Path) -> None:
    assert events.read(path) == ([], 0)


def test_reading_goes_on_where_it_ended(path: Path) -> None:
    events.append(path, step(1))
    first, offset = events.read(path)
    assert events.read(path, offset) == ([], offset)
    events.append(path, step(2))
    second, end = events.read(path, offset)
    assert ([first[0].step, second[0].step], end) == ([1, 2], path.stat().st_size)


@pytest.mark.parametrize("unfinished", [b"{", b'{"event": "step", "st', b'{"event": "note", "text": "' + b"x" * 20_000])
def test_line_of_a_killed_writer_is_left_out_and_cut_by_the_next(path: Path, unfinished: bytes) -> None:
    events.append(path, step(1))
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(unfinished)
    assert len(events.read(path)[0]) == 1
    assert events.read(path)[1] == end
    events.append(path, step(2))
    assert [event.step for event in events.read(path, end)[0]] == [2]
    assert len(path.read_bytes().splitlines()) == 2


def test_file_that_is_only_an_unfinished_line_starts_again(path: Path) -> None:
    path.write_bytes(b'{"event": "lau')
    events.append(path, events.Launched(attempt=2))
    assert [event.attempt for event in events.read(path)[0]] == [2]


def test_number_that_is_not_finite_never_reaches_the_file(path: Path) -> None:
    with pytest.raises(ValueError):
        events.append(path, step(1, loss=float("nan")))
    assert not path.exists()


def test_reader_beside_a_writer_sees_every_line_once_and_whole(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env={"PYTHONPATH": str(ROOT)})
    seen, offset = [], 0
    while writer.poll() is None:
        found, offset = events.read(path, offset)
        seen += found
    seen += events.read(path, offset)[0]
    assert writer.returncode == 0
    assert [int(event.text.partition(" ")[0]) for event in seen] == list(range(300))
    assert all(event.text.count("é") == number * 37 % 9000 for number, event in enumerate(seen))


def test_resumed_run_forgets_what_came_after_its_checkpoint() -> None:
    early = [started(), step(1), step(2), events.Checkpoint(step=2)]
    lost = [step(3), events.Evaluation(step=3, loss=1, tokens=1, seconds=1), events.Failed(step=3, reason="memory")]
    again = [events.Launched(attempt=2), events.Resumed(from_step=2), step(3), events.Finished(step=3)]
    assert events.effective([*early, *lost, *again]) == [*early, *again]
    assert events.effective([*early, *lost]) == [*early, *lost]


def test_resuming_twice_keeps_each_step_once() -> None:
    first = [step(n) for n in range(1, 6)]
    second = [events.Resumed(from_step=4), step(5), step(6)]
    third = [events.Resumed(from_step=2), step(3)]
    kept = [event.step for event in events.effective([*first, *second, *third]) if isinstance(event, events.Step)]
    assert kept == [1, 2, 3]


def test_earlier_end_does_not_count_for_a_resumed_run() -> None:
    for end in (events.Stopped(step=1), events.Failed(step=1, reason="x"), events.Finished(step=1)):
        kept = events.effective([step(1), end, events.Resumed(from_step=1), step(2)])
        assert not any(isinstance(event, events.TERMINAL) for event in kept)


@settings(max_examples=100, deadline=None)
@given(text=st.text(), cut=st.integers(0, 10_000))
def test_file_cut_anywhere_gives_whole_events_only(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    written = [events.Note(text=text), step(1), events.Note(text=text[::-1])]
    for event in written:
        events.append(path, event)
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    found, offset = events.read(path)
    assert [asdict(event) for event in found] == [asdict(event) for event in written[: len(found)]]
    assert offset == len(b"".join(content.splitlines(keepends=True)[: len(found)]))


def test_read_all_sees_what_was_added_since_and_a_file_that_was_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "events.jsonl", tmp_path / "other.jsonl"
    assert events.read_all(path) == []
    for number in (1, 2):
        events.append(path, events.Note(text=f"note {number}"))
        assert [event.text for event in events.read_all(path)] == [f"note {n}" for n in range(1, number + 1)]
    events.append(other, events.Note(text="another run"))
    other.replace(path)
    assert [event.text for event in events.read_all(path)] == ["another run"]


def test_read_all_gives_each_caller_a_list_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events.append(path, events.Note(text="kept"))
    events.read_all(path).clear()
    assert len(events.read_all(path)) == 1
