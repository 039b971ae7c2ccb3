"""A typed template that would take all time or memory is found out in a process of its own, not in the app."""

import time
from pathlib import Path

import pytest
from helpers import CHATML, alpaca, settings_in, tokenizer_folder, write_rows

from qlora_core import template_trial
from qlora_core.data.inspected import Inspected, inspect_into
from qlora_core.errors import ConfigError
from qlora_core.template_trial import check_trial


@pytest.fixture
def rows(tmp_path: Path) -> Inspected:
    return inspect_into(write_rows(tmp_path / "rows.jsonl", [alpaca(n) for n in range(3)]), settings_in(tmp_path))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}",
        "{{ messages }}{{ '%*d' % (10**10, 5) }}",
        "{{ messages | tojson(indent=10**10) }}",
    ],
)
def test_a_template_without_measure_is_refused_in_time(
    tmp_path: Path, rows: Inspected, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "WALL_SECONDS", 15)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="does a loop never end"):
        check_trial(template, tokenizer_folder(tmp_path / "base"), rows)
    assert time.monotonic() - begun < 60


def test_ordinary_templates_pass_and_mistakes_are_left_to_the_page(tmp_path: Path, rows: Inspected) -> None:
    base = tokenizer_folder(tmp_path / "base", chat_template=CHATML)
    for template in ("chatml", CHATML, "{% for m in messages %}", "{{ messages[0].missing + 1 }}"):
        check_trial(template, base, rows)
