"""A trained run to a Hub on loopback by the command line: card, record, proof, versions; and where the token is not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from hub_server import Hub, hub
from safetensors.torch import load_file, save_file
from tiny_models import make_run, train_here

from qlora_core.errors import RunError
from qlora_core.publishing import published
from qlora_core.runs import Run, RunStore, lock
from qlora_core.worker.proving import prove

MARK = "hf_SECRETMARKER"
ALICE = f"{MARK}alice"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(tmp_path_factory.mktemp("hub")) as found:
        found.add_user("alice")
        found.add_token("alice", text=ALICE)
        yield found


def lab(
    served: Hub, run: Run, *arguments: str, token: str = ALICE, xet: bool = False
) -> subprocess.CompletedProcess[str]:
    names = {"HF_ENDPOINT": served.url, "HF_HOME": str(run.settings.home.parent / "hf"), "HF_TOKEN": token}
    names |= {"HF_HUB_DISABLE_XET": "" if xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    names |= {"QLORA_LAB_HOME": str(run.settings.home), "QLORA_LAB_LOCKS": str(run.settings.locks)}
    return subprocess.run(
        [sys.executable, "-m", "qlora_core", *arguments],
        env=os.environ | names,
        capture_output=True,
        text=True,
        cwd=run.settings.home,
    )


def said(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_is_pushed_with_its_card_and_proven_and_a_better_version_stays(served: Hub, run: Run) -> None:
    done = lab(served, run, "push", run.run_id, "--repo-id", "tiny", "--yes", "--json")
    (entry,) = said(done)["pushed"]
    assert entry["proof"]["state"] == "proven", entry["proof"]
    assert entry["proof"]["largest_difference"] == 0 and entry["proof"]["rows"] == 3
    assert "alice/tiny: is made, private" in done.stderr
    assert published(run.path) == [entry] and (entry["version"], entry["changed"]) == ("v1", True)
    repo = served.repo("alice/tiny", "models")
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json", "release.json"} <= repo.head.files.keys()
    assert not any(name.endswith((".pt", ".jsonl", ".txt")) for name in repo.head.files)
    record = json.loads(served.read(repo, "release.json"))
    (last,) = [e["loss"] for e in run.result()["train_info"]["eval_losses"] if e["step"] == 6]  # type: ignore[index]
    assert record["metrics"]["eval_loss"] == last and record["eval_fingerprint"] == run.dataset().eval_fingerprint
    assert not said(lab(served, run, "push", run.run_id, "--repo-id", "tiny", "--yes", "--json"))["pushed"][0][
        "changed"
    ]
    assert published(run.path) == [entry], "what was proven is not proven again"
    # A version that was twice as good is there now.
    better = record | {"version": "v2", "metrics": {"eval_loss": last / 2}}
    repo.refs["refs/tags/v2"] = served.commit(repo, {"release.json": json.dumps(better), "tokenizer.json": "{}"}).oid
    refused = lab(served, run, "push", run.run_id, "--repo-id", "tiny", "--yes")
    assert refused.returncode == 2 and "100.0% worse" in refused.stderr and "Traceback" not in refused.stderr
    listed = said(lab(served, run, "versions", "alice/tiny", "--json"))["versions"]
    assert [(v["version"], v["current"]) for v in listed] == [("v2", True), ("v1", False)]
    back = ("rollback", "alice/tiny", "v1")
    assert "tokenizer.json there was changed by someone else" in lab(served, run, *back).stderr
    assert "restores tokenizer.json" in lab(served, run, *back, "--plan").stdout
    assert said(lab(served, run, *back, "--force", "--json"))["changed"]
    assert json.loads(served.read(repo, "release.json"))["version"] == "v1"


def test_a_merged_model_is_pushed_and_loads_as_it_is_here(served: Hub, run: Run) -> None:
    """And goes by Xet, from a process of its own."""
    arguments = ("push", run.run_id, "--repo-id", "whole", "--what", "merged", "--public", "--yes", "--json")
    served.requests.clear()
    (entry,) = said(lab(served, run, *arguments, xet=True))["pushed"]
    assert any("/xet-write-token/" in seen.path for seen in served.requests)
    assert entry["proof"]["state"] == "proven", entry["proof"]
    repo = served.repo("alice/whole", "models")
    assert not repo.private and {"config.json", "model.safetensors", "README.md"} <= repo.head.files.keys()


def test_what_comes_back_with_other_bytes_is_pushed_but_not_proven(
    served: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = served.content

    def damaged(file: Any) -> bytes:
        content = resolve(file)
        return content.replace(b'"r": 4', b'"r": 5') if b'"peft_type"' in content else content

    monkeypatch.setattr(served, "content", damaged)
    done = lab(served, run, "push", run.run_id, "--repo-id", "damaged", "--yes", "--json")
    (entry,) = json.loads(done.stdout)["pushed"]
    assert done.returncode == 1 and "not proven" in done.stderr
    assert entry["proof"]["state"] == "failed"
    assert "came back with other bytes in adapter_config.json" in entry["proof"]["reason"]


def test_an_unknown_licence_and_a_change_are_agreed_to_by_what_was_shown(served: Hub, run: Run) -> None:
    asked = ("push", run.run_id, "--repo-id", "agreed")
    refused = lab(served, run, *asked)
    assert refused.returncode == 2 and "this needs a look first" in refused.stderr
    assert "licence of the dataset is unknown" in refused.stderr and ("models", "alice/agreed") not in served.repos
    shown = said(lab(served, run, *asked, "--plan", "--json"))
    assert shown["needed"] and f"--agreed {shown['agree']}" in refused.stderr
    assert said(lab(served, run, *asked, "--agreed", shown["agree"], "--json"))["pushed"][0]["changed"]
    (run.path / "card.json").write_text(json.dumps({"intended_use": "To <b>test</b>."}))
    changed = lab(served, run, *asked, "--agreed", shown["agree"], "--json")
    told = json.loads(changed.stdout)
    assert changed.returncode == 2 and "something else than what was agreed to" in changed.stderr
    assert "changes README.md" in "".join(told["plan"])
    assert said(lab(served, run, *asked, "--agreed", told["agree"], "--json"))["pushed"][0]["version"] == "v2"
    assert rb"To \<b>test\</b>" in served.read(served.repo("alice/agreed", "models"), "README.md").replace(b"\\>", b">")


def test_a_run_stays_while_it_is_pushed(run: Run) -> None:
    with lock(run.path / "publish.lock"), pytest.raises(RunError, match="is being pushed"):
        RunStore(run.settings).delete(run)


def test_an_adapter_that_answers_otherwise_is_told_by_its_logits(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.adapter, other := tmp_path / "other")
    assert prove(run, "adapter", other, run.adapter)["same"]
    tensors = {name: tensor * 1.5 for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(tensors, other / "adapter_model.safetensors")
    verdict = prove(run, "adapter", other, run.adapter)
    assert not verdict["same"] and verdict["largest_difference"] > 0 and verdict["same_tokens"]


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (["RUN", "--repo-id", "a b"], ALICE, "holds a space"),
        (["RUN", "--repo-id", "tiny2"], f"{MARK}gone", "invalid or has expired"),
        (["nothing", "--repo-id", "tiny2"], ALICE, "there is no run 'nothing'"),
        (["./nowhere", "--repo-id", "tiny2"], ALICE, "is no prepared dataset"),
        (["RUN", "--repo-id", "tiny2", "--onto", "original"], ALICE, "only for --what merged"),
    ],
)
def test_a_mistake_is_one_sentence(served: Hub, run: Run, arguments: list[str], token: str, words: str) -> None:
    named = [run.run_id if argument == "RUN" else argument for argument in arguments]
    done = lab(served, run, "push", *named, token=token)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert MARK not in done.stdout + done.stderr and ("models", "alice/tiny2") not in served.repos


def test_the_token_is_in_no_file_and_nothing_pushed_tells_of_this_machine(served: Hub, run: Run) -> None:
    assert len(published(run.path)) >= 2 and ("models", "alice/tiny") in served.repos, "the tests before have pushed"
    assert MARK not in json.dumps(published(run.path))
    written = [path for root in (run.settings.home.parent, served.objects.parent) for path in root.rglob("*")]
    assert len(written) > 30
    assert [path for path in written if path.is_file() and MARK.encode() in path.read_bytes()] == []
    here = str(run.settings.home.parent).encode()
    assert [path for path in served.objects.iterdir() if here in path.read_bytes()] == []
    assert not list(run.path.glob(".proof-*"))


def test_nothing_is_sent_of_several_where_one_is_refused_and_no_merge_is_made_for_it(served: Hub, run: Run) -> None:
    worse = {"what": "merged", "version": "v1", "eval_fingerprint": run.dataset().eval_fingerprint, "files": {}}
    record = json.dumps(worse | {"metrics": {"trained_eval_loss": 1e-3}})
    served.add_repo("alice/pair-merged", {"release.json": record, "config.json": "{}"}, kind="models", private=True)
    served.add_repo("alice/held", {"adapter_config.json": "{}"}, kind="models", private=True)
    done = lab(served, run, "push", run.run_id, "--repo-id", "pair", "--what", "adapter,merged", "--yes")
    assert done.returncode == 2 and "% worse" in done.stderr and ("models", "alice/pair") not in served.repos
    shutil.rmtree(run.path / "merged-original", ignore_errors=True)
    done = lab(served, run, "push", run.run_id, "--repo-id", "held", "--what", "merged", "--plan")
    assert done.returncode == 2 and "holds an adapter, so a whole model cannot" in done.stderr
    assert not (run.path / "merged-original").exists(), "minutes of merging for what is refused anyway"


def test_words_for_the_card_that_are_only_looked_at_are_not_kept(served: Hub, run: Run, tmp_path: Path) -> None:
    (words := tmp_path / "card.yaml").write_text("notes: Only looked at.\n")
    before = (run.path / "card.json").read_bytes() if (run.path / "card.json").exists() else None
    said(lab(served, run, "push", run.run_id, "--repo-id", "looked", "--card", str(words), "--plan", "--json"))
    after = (run.path / "card.json").read_bytes() if (run.path / "card.json").exists() else None
    assert after == before and ("models", "alice/looked") not in served.repos


def test_what_is_on_the_hub_is_on_record_even_if_its_tag_could_not_be_made(
    served: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "faults", [("POST", "/tag/", 403)])
    done = lab(served, run, "push", run.run_id, "--repo-id", "untagged", "--yes")
    assert done.returncode == 2 and "was pushed as commit" in done.stderr
    assert [entry["repo_id"] for entry in published(run.path)][-1] == "alice/untagged"
    monkeypatch.setattr(served, "faults", [])
    (entry,) = said(lab(served, run, "push", run.run_id, "--repo-id", "untagged", "--yes", "--json"))["pushed"]
    assert entry["proof"]["state"] == "proven"
    assert [e["repo_id"] for e in published(run.path)].count("alice/untagged") == 1, "one commit, one record"


def test_the_hub_is_asked_from_the_shell(served: Hub, run: Run) -> None:
    found = said(lab(served, run, "probe", "alice/not-there", "--json"))
    assert found["ok"] and found["name"] == "alice" and found["exists"] is False
    refused = lab(served, run, "probe", "bob/mine")
    assert refused.returncode == 2 and "alice may not write" in refused.stderr and MARK not in refused.stdout
    served.add_repo("alice/rows", {"a.txt": "a"})
    assert said(lab(served, run, "versions", "rows", "--kind", "dataset", "--json"))["versions"] == []
