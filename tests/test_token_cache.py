"""The token cache: what it keeps is what would be made anew, for these rows, lines, template and loss alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CHATML, alpaca, config_in, run_in, settings_in, tokenizer_folder, write_rows

from qlora_core import token_cache
from qlora_core.data.formats import read_rows
from qlora_core.data.rows import Example, Message
from qlora_core.data.stored import read_stored
from qlora_core.token_cache import TokenTable, make_table, table
from qlora_core.tokens import EVERYTHING, load_tokenizer, render


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "base", chat_template=CHATML)


def examples(path: Path) -> list[Example]:
    return list(read_rows(path)[1])


def same(one: TokenTable, other: TokenTable) -> bool:
    names = ("token_ids", "supervised", "offsets", "lines", "end_positions")
    return one.refused == other.refused and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def test_a_table_holds_what_each_row_is_rendered_to(tmp_path: Path, base: Path) -> None:
    rows, tokenizer = examples(write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(5)])), load_tokenizer(base)
    made = make_table(rows, tokenizer)
    for number, example in enumerate(rows):
        line, ids, supervised = made.row(number, 10**6)
        rendered = render(example, tokenizer)
        assert line == example.line and (ids == rendered.token_ids).all() and (supervised == rendered.supervised).all()
    assert (made.first_supervised() > 0).all()
    assert [len(made.row(number, 7)[1]) for number in range(5)] == [7] * 5


def test_a_row_without_anything_to_learn_has_no_first_token(base: Path) -> None:
    tokenizer = load_tokenizer(base, EMPTY)
    example = Example(1, (Message("user", "a"), Message("assistant", "b")))
    made = make_table([example], tokenizer)
    assert len(made) == 0 and "leaves the response out" in made.refused[0].problem
    assert make_table([], tokenizer).first_supervised().tolist() == []


EMPTY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def test_the_second_time_it_is_read_from_disk_and_equal(tmp_path: Path, base: Path) -> None:
    rows, tokenizer = examples(write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(5)])), load_tokenizer(base)
    asked: list[int] = []

    def give() -> Any:
        asked.append(1)
        return iter(rows)

    first, second = (table("print", give, tokenizer, settings_in(tmp_path)) for _ in range(2))
    assert len(asked) == 1 and same(first, second)
    for changed in ({"loss_on": EVERYTHING}, {"lines": "others"}):
        table("print", give, tokenizer, settings_in(tmp_path), **changed)
    table("print", give, load_tokenizer(base, "zephyr"), settings_in(tmp_path))
    table("other print", give, tokenizer, settings_in(tmp_path))
    assert len(asked) == 5, "each is another table"


@pytest.mark.parametrize("damage", ["token_ids.npy", "offsets.npy", "refused.json"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_entry_is_made_again(tmp_path: Path, base: Path, damage: str, content: bytes | None) -> None:
    rows, tokenizer = examples(write_rows(tmp_path / "rows.jsonl", [alpaca(1)])), load_tokenizer(base)
    first = table("print", lambda: iter(rows), tokenizer, settings_in(tmp_path))
    (path,) = (tmp_path / "home" / "tokens").glob(f"*/{damage}")
    path.unlink() if content is None else path.write_bytes(content)
    assert same(table("print", lambda: iter(rows), tokenizer, settings_in(tmp_path)), first)


def test_rows_that_stand_elsewhere_keep_their_own_line_numbers(tmp_path: Path, base: Path) -> None:
    """Equal rows have one fingerprint wherever they stand; what is said of them names their own lines."""
    tokenizer, settings, lines = load_tokenizer(base), settings_in(tmp_path), []
    write_rows(tmp_path / "held_out.jsonl", [alpaca(9)])
    for name, begin in (("a", ""), ("b", "\n\n\n")):
        path = write_rows(tmp_path / f"{name}.jsonl", [alpaca(n) for n in range(3)])
        path.write_text(begin + path.read_text())
        run = run_in(tmp_path, data=str(path), eval_data=str(tmp_path / "held_out.jsonl"))
        dataset = run.dataset()
        stored = run.path / "dataset" / "train.jsonl"
        made = table(
            dataset.train_fingerprint, lambda s=stored: read_stored(s), tokenizer, settings, lines=dataset.train_lines
        )
        lines.append(made.lines.tolist())
    assert lines == [[1, 2, 3], [4, 5, 6]] and config_in(tmp_path)


def test_a_template_with_a_date_is_another_one_tomorrow(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(base, "{{ strftime_now('%d %b') }}" + CHATML)
    today = token_cache.tokenizer_fingerprint(tokenizer)
    monkeypatch.setattr(token_cache.time, "strftime", lambda form: "2031-01-01")
    assert token_cache.tokenizer_fingerprint(tokenizer) != today
