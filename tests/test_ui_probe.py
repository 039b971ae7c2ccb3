"""What the Train tab asks the Hub before a training: all that is in the way at once, and nothing is sent there."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from hub_server import Hub, hub
from test_ui import loops_of_gradio  # noqa: F401 - a fixture

from qlora_core.ui.probe_part import ProbePart

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
ALICE, READER, NARROW = (f"hf_SECRETMARKER{who}" for who in ("alice", "reader", "narrow"))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(tmp_path / "hub") as found:
        found.add_user("alice", organizations={"acme": "write"})
        found.add_token("alice", text=ALICE)
        found.add_token("alice", "read", text=READER)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        yield found


@pytest.fixture
def part() -> ProbePart:
    with gr.Blocks(analytics_enabled=False):
        return ProbePart()


def test_a_push_that_will_work_is_told_with_what_is_known(served: Hub, part: ProbePart) -> None:
    asking, told = part.answer(None, ALICE, "acme/new")
    assert "Asking the Hub" in asking
    assert "✓ A private model can be pushed there" in told and "acme/new: is not there yet" in told
    assert {seen.method for seen in served.requests} == {"GET"} and not served.repos


def test_a_public_push_and_what_goes_with_it_are_asked_about_too(served: Hub, part: ProbePart) -> None:
    served.add_fine_grained_token("alice", {"user:alice": ["repo.write"]}, text=NARROW)
    *_, told = part.answer(None, NARROW, "new", True)
    assert "✓ A public model can be pushed there" in told
    *_, told = part.answer(None, NARROW, "new", False, ["pull request", "collection"])
    assert "there is nothing to make a pull request to" in told and "collection.write" in told and "✓" not in told


@pytest.mark.parametrize(
    ("typed", "name", "words"),
    [
        (ALICE, "bob/new", ["A push would fail", "you may write to: alice, acme"]),
        (READER, "new", ["A push would fail", "may only read"]),
        ("hf_gone", "new", ["A push would fail", "invalid or has expired"]),
        ("", " ", ["nobody is known to the Hub", "no repository is named"]),
    ],
)
def test_all_that_is_in_the_way_is_told_before_a_training(
    served: Hub, part: ProbePart, typed: str, name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.ui.identity.machine_token", lambda: None)
    *_, told = part.answer(None, typed, name)
    assert all(word in told for word in words) and "SECRETMARKER" not in told and "✓" not in told
