"""A push from the page: what is missing told at once, the plan before, the proof after, and a licence that must be looked at."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from helpers import wait_for
from hub_collections import collections
from hub_server import HOLD, Hub, hub
from study_builders import analysed, study, study_run
from study_folders import lay_down
from tiny_models import make_run, train_here

from qlora_core.errors import HubError
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.study import Study
from qlora_core.ui.identity import Identity
from qlora_core.ui.push_endpoints import add_push_endpoint
from qlora_core.ui.push_part import PushPart
from qlora_core.ui.study_push import StudyPush

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
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)  # of this process, which is the page's
        yield found


@pytest.fixture
def part(run: Run) -> PushPart:
    with gr.Blocks(analytics_enabled=False):
        made, dropdown = PushPart(run.settings), gr.Dropdown([])
        made.connect(dropdown, Identity(), {})
        return made


def asked(
    run: Run, repository: str = "alice/page", what: tuple[str, ...] = ("adapter",), **more: Any
) -> tuple[Any, ...]:
    values = {
        "public": False,
        "version": "",
        "branch": "",
        "collection": "",
        "pull_request": False,
        "force": False,
    } | more
    return run.run_id, list(what), "dequantized", repository, *values.values()


def last(handler: Callable[..., Iterator[Any]], *values: Any) -> Any:
    *_, outputs = handler(*values)
    return outputs


def told_at_the_end(part: PushPart | StudyPush, started: tuple[Any, ...]) -> tuple[str, bool]:
    """(what is told, whether it can be agreed to)"""
    job_id, _, first, *_ = started
    assert job_id, first
    ended: list[Any] = []

    def has_ended() -> bool:
        _, timer, text, _ = part.pushing.view.tick(job_id)
        ended[:] = [text, part.pushing.can_agree(job_id).visible]
        return not timer.active

    wait_for(has_ended, seconds=120)
    return ended[0], ended[1]


def test_a_model_is_planned_agreed_to_pushed_and_proven(run: Run, served: Hub, part: PushPart) -> None:
    shown, name, warning, earlier, *_ = part.show(run.run_id, "")
    assert shown.visible and "licence of the dataset is unknown" in warning
    assert name and "No push of this run so far" in earlier
    wanted = asked(run)
    planned = last(part.pushing.plan, None, ALICE, *wanted)
    plan, can_agree = told_at_the_end(part, planned)
    assert "alice/page: is to be made, private" in plan and "licence of the dataset is unknown" in plan and can_agree
    begun = last(part.pushing.begin, None, ALICE, *wanted)
    assert told_at_the_end(part, begun) == (plan, True) and not served.repos, (
        "what nobody has agreed to is shown instead"
    )
    other, can_agree = told_at_the_end(
        part, last(part.pushing.go_on, None, begun[0], ALICE, *asked(run, "alice/other"))
    )
    assert can_agree and "alice/other: is to be made" in other and not served.repos, "agreed was to another push"
    done, can_agree = told_at_the_end(part, last(part.pushing.go_on, None, begun[0], ALICE, *wanted))
    assert "✓ Downloaded again and loaded: the logits are equal." in done and "version v1" in done and not can_agree
    assert served.repo("alice/page", "models").private
    assert "alice/page v1" in part.show(run.run_id, "")[3] and part.show(run.run_id, "")[1] == "alice/page"
    kept = [path for path in run.settings.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if ALICE.encode() in path.read_bytes()], "the token is nowhere"


def test_adapter_and_merged_model_go_together_into_two_repositories(run: Run, served: Hub, part: PushPart) -> None:
    wanted = asked(run, "alice/both", ("adapter", "merged"))
    begun = last(part.pushing.begin, None, ALICE, *wanted)
    plan, _ = told_at_the_end(part, begun)
    assert "alice/both: is to be made" in plan and "alice/both-merged: is to be made" in plan
    assert "How far this merge is from the model that was trained was not measured" in plan
    done, _ = told_at_the_end(part, last(part.pushing.go_on, None, begun[0], ALICE, *wanted))
    assert done.count("✓ Downloaded again") == 2
    assert "model.safetensors" in served.repo("alice/both-merged", "models").head.files


def test_a_push_that_goes_on_is_followed_again_after_a_reload_and_can_be_cancelled(
    run: Run, served: Hub, part: PushPart
) -> None:
    wanted = asked(run, "alice/slow")
    planned = last(part.pushing.plan, None, ALICE, *wanted)
    told_at_the_end(part, planned)
    served.once.append(("PUT", "/cdn/", HOLD))
    begun = last(part.pushing.go_on, None, planned[0], ALICE, *wanted)
    assert served.holding.wait(60)
    assert last(part.pushing.go_on, None, begun[0], ALICE, *wanted)[-1] == begun[-1], "a second click, which comes late"
    again = part.show(run.run_id, begun[-1])[4:]
    assert again[0] == begun[0] and again[1].active and "Sending" in again[2] and again[3].visible
    assert part.show(run.run_id, "")[4] == "", "it is nobody else's to see or to end"
    part.pushing.view.stop(begun[0])
    told, can_agree = told_at_the_end(part, begun)
    assert "Cancelled" in told and not can_agree
    assert [commit.title for commit in served.repo("alice/slow", "models").commits] == ["initial commit"]
    assert part.show(run.run_id, "")[4] == ""


def test_all_that_is_missing_is_told_at_once(run: Run, served: Hub, part: PushPart) -> None:
    job, _, told, *_ = last(part.pushing.begin, None, "", *asked(run, " ", (), branch="trial", pull_request=True))
    assert not job
    for words in (
        "nothing is chosen",
        "nobody is known to the Hub",
        "no repository is named; write name or owner/name",
        "not both",
    ):
        assert words in told
    job, _, failed, *_ = last(part.pushing.begin, None, ALICE, *asked(run, "bob/page"))
    assert not job
    assert "This cannot be pushed yet" in failed and "bob" in failed
    assert part.show("nothing", "")[0].visible is False


def test_what_is_told_goes_when_something_else_is_asked_for(run: Run, served: Hub, part: PushPart) -> None:
    wanted = asked(run, "alice/told")
    job_id, *_ = planned = last(part.pushing.plan, None, ALICE, *wanted)
    assert "alice/told" in told_at_the_end(part, planned)[0]
    assert list(part.pushing.go_on(None, "", ALICE, *wanted)) == [], "a second click while the first one still asks"
    assert part.pushing.forget(job_id, *wanted)[2] == "" and part.pushing.forget("", *wanted)[2] == ""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Study:
    runs = [study_run(), study_run(method="qlora", loss=0.851)]
    return lay_down(tmp_path_factory.mktemp("study"), study(runs, analysis=analysed(runs)))


def test_a_report_goes_over_what_others_changed_and_into_a_collection(compared: Study, served: Hub) -> None:
    with gr.Blocks(analytics_enabled=False):
        part = StudyPush(compared.settings)
        part.connect(gr.Textbox(), Identity(), {})
    plain, wanted = ("", "", False, False), ("", "Our studies", False, True)
    begun = last(part.pushing.begin, None, ALICE, compared.study_id, "alice/report", False, False, *plain)
    assert "commit" in told_at_the_end(part, begun)[0]
    repo = served.repo("alice/report")
    served.commit(repo, {"README.md": "by hand"})
    values = (compared.study_id, "alice/report", False, False)
    refused, can_agree = told_at_the_end(part, last(part.pushing.begin, None, ALICE, *values, *plain))
    assert "README.md as no push from here made" in refused and "Over a better version" in refused and not can_agree
    assert part.further[-1].label == "Over a better version"
    begun = last(part.pushing.begin, None, ALICE, *values, *wanted)
    plan, can_agree = told_at_the_end(part, begun)
    assert "collection &#x27;Our studies&#x27; of alice: is made" in plan and can_agree
    done, _ = told_at_the_end(part, last(part.pushing.go_on, None, begun[0], ALICE, *values, *wanted))
    (kept,) = collections(served).values()
    assert kept.slug in done and [item["id"] for item in kept.items] == ["alice/report"]
    assert served.read(repo, "README.md") != b"by hand"


def endpoint(settings: Settings) -> Callable[..., dict[str, Any]]:
    """What a client's push_run calls."""
    found: list[Callable[..., dict[str, Any]]] = []
    with gr.Blocks(analytics_enabled=False):
        add_push_endpoint(settings, lambda push_run: found.append(push_run) or push_run)
    return found[0]


def test_a_script_pushes_the_report_of_a_study_and_cannot_agree_unseen(compared: Study, run: Run, served: Hub) -> None:
    (entry,) = endpoint(compared.settings)(compared.study_id, "alice/compared", ALICE, with_rows=True)["pushed"]
    assert entry["what"] == "report" and "answers.csv" in served.repo("alice/compared").head.files
    push_run = endpoint(run.settings)
    with pytest.raises(HubError, match="--with-rows: only for the report of a study"):
        push_run(run.run_id, "alice/unseen", ALICE, with_rows=True)
    assert push_run(run.run_id, "alice/unseen", ALICE, agreed="unseen")["needed"]
    assert ("models", "alice/unseen") not in served.repos


def test_on_a_space_nobody_pushes_as_its_owner(run: Run, part: PushPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ALICE)
    monkeypatch.setenv("SPACE_ID", "alice/lab")
    assert "nobody is known to the Hub" in last(part.pushing.begin, None, "", *asked(run))[2]
