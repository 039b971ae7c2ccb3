"""A push from the page: what is missing told at once, the plan before, the proof after, and a licence that must be looked at."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from helpers import wait_for
from hub_server import Hub, hub
from tiny_models import make_run, train_here

from qlora_core.runs import Run
from qlora_core.ui.push_part import PushPart

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
ALICE = "hf_SECRETMARKERalice"


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio() -> Iterator[None]:
    """gradio leaves event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("run"), max_steps=2, eval_steps=2))


@pytest.fixture
def served(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(tmp_path / "hub") as found:
        found.add_user("alice")
        found.add_token("alice", text=ALICE)
        for name, value in {
            "HF_ENDPOINT": found.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


@pytest.fixture
def part(run: Run) -> PushPart:
    with gr.Blocks(analytics_enabled=False):
        return PushPart(run.settings)


def told_at_the_end(part: PushPart, started: tuple[Any, ...]) -> str:
    job_id, _, first = started
    assert job_id, first
    ended: list[str] = []

    def has_ended() -> bool:
        timer, text = part.tick(job_id)
        ended[:] = [text]
        return not timer.active

    wait_for(has_ended, seconds=120)
    return ended[0]


def test_a_model_is_planned_pushed_and_proven(run: Run, served: Hub, part: PushPart) -> None:
    shown, name, warning, confirm, earlier = part.show(run.run_id)
    assert shown.visible and confirm.visible and "licence of the dataset is unknown" in warning
    assert name.placeholder.startswith("owner/") and "Not pushed yet" in earlier
    asked = (run.run_id, "adapter", "alice/page", False, ALICE)
    plan = told_at_the_end(part, part.plan(*asked, False))
    assert "alice/page: is made, private" in plan and "alice/page" not in [name for _, name in served.repos]
    refused = part.begin(*asked, False)
    assert not refused[0] and "Publish all the same" in refused[2]
    done = told_at_the_end(part, part.begin(*asked, True))
    assert "✓ Downloaded again and loaded: the logits are equal." in done and "version v1" in done
    assert served.repo("alice/page", "models").private
    assert "alice/page v1" in part.show(run.run_id)[4]
    kept = [path for path in run.settings.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if ALICE.encode() in path.read_bytes()], "the token is nowhere"


def test_all_that_is_missing_is_told_at_once(run: Run, served: Hub, part: PushPart) -> None:
    job, _, told = part.begin(run.run_id, "adapter", " ", False, "", False)
    assert not job
    for words in (
        "licence of the dataset is unknown",
        "no token; type one in",
        "no repository is named; write owner/name",
    ):
        assert words in told
    failed = told_at_the_end(part, part.begin(run.run_id, "adapter", "bob/page", False, ALICE, True))
    assert "Not pushed" in failed and "bob" in failed
    assert part.show("nothing")[0].visible is False


def test_on_a_space_nobody_pushes_as_its_owner(run: Run, part: PushPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ALICE)
    monkeypatch.setenv("SPACE_ID", "alice/lab")
    assert "no token; type one in" in part.begin(run.run_id, "adapter", "alice/page", False, "", True)[2]
