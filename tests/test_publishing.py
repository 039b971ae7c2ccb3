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
from helpers import ROOT, run_in, settings_in
from hub_collections import collections
from hub_server import Hub, hub
from safetensors.torch import load_file, save_file
from study_builders import analysed, study, study_run
from study_folders import lay_down
from tiny_models import make_run, train_here
from transformers import AutoModelForCausalLM

from qlora_core.errors import DatasetError, RunError
from qlora_core.hub import Push, Pushed, Release
from qlora_core.jobs import Cancelled
from qlora_core.merging import adapter_sha256, merge
from qlora_core.publishing import dataset_of, dataset_part, published, run_or_study
from qlora_core.publishing.merge_drift import told_of_merge
from qlora_core.publishing.record import recording
from qlora_core.runs import Run, RunStore, lock
from qlora_core.study import Study
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


@pytest.fixture(scope="module")
def tuned(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a prepared dataset of a known licence."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = make_run(folder)
    source, prepared = str(folder / "train.jsonl"), str(folder / "set")
    options = ("--out", prepared, "--license", "mit", "--eval-fraction", "0.25")
    made = lab(served, rows, "prepare", source, *options, "--no-tokenise")
    assert made.returncode == 0, made.stderr
    return train_here(make_run(folder, data=prepared, eval_data=None, max_steps=2, eval_steps=2))


def lab(
    served: Hub, run: Run | Study, *arguments: str, token: str = ALICE, xet: bool = False
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
    assert "alice/tiny: is to be made, private" in done.stderr
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


def test_what_was_agreed_to_is_pushed_and_nothing_else(served: Hub, tuned: Run) -> None:
    """A private repository and rows of a known licence need nobody's agreement; a digest that is given is held to all the same."""
    push = ("push", tuned.run_id, "--repo-id")
    shown = said(lab(served, tuned, *push, "alice/held", "--plan", "--json"))
    assert not shown["needed"]
    for other in (("alice/held", "--agreed", "deadbeef"), ("alice/wide", "--public", "--agreed", shown["agree"])):
        refused = lab(served, tuned, *push, *other)
        assert refused.returncode == 2 and "something else than what was agreed to" in refused.stderr
    asked = lab(served, tuned, *push, "alice/wide", "--public")
    assert asked.returncode == 2 and "alice/wide: is to be made, public, for everybody to see" in asked.stderr
    assert not {("models", "alice/held"), ("models", "alice/wide")} & set(served.repos)
    assert lab(served, tuned, *push, "alice/held", "--agreed", shown["agree"]).returncode == 0


def test_a_merged_model_is_pushed_and_loads_as_it_is_here(served: Hub, run: Run) -> None:
    """And goes by Xet, from a process of its own."""
    arguments = ("push", run.run_id, "--repo-id", "whole", "--what", "merged", "--public", "--yes", "--json")
    served.requests.clear()
    (entry,) = said(lab(served, run, *arguments, xet=True))["pushed"]
    assert any("/xet-write-token/" in seen.path for seen in served.requests)
    assert entry["proof"]["state"] == "proven", entry["proof"]
    repo = served.repo("alice/whole", "models")
    assert not repo.private and {"config.json", "model.safetensors", "README.md"} <= repo.head.files.keys()


def test_a_merged_model_in_several_shards_arrives_whole(served: Hub, tuned: Run) -> None:
    """Shards as a model of more than a gigabyte has them."""
    folder = merge(tuned, onto="original")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    assert len(shards := sorted(path.name for path in folder.glob("model-*.safetensors"))) > 2
    (folder / "model.safetensors").unlink()
    (entry,) = said(
        lab(served, tuned, "push", tuned.run_id, "--repo-id", "shards", "--what", "merged", "--yes", "--json")
    )["pushed"]
    held = served.repo("alice/shards", "models").head.files.keys()
    assert {*shards, "model.safetensors.index.json"} <= held and "model.safetensors" not in held
    assert entry["proof"]["state"] == "proven", entry["proof"]


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
    unseen = lab(served, run, *asked, "--agreed", "unseen")
    assert unseen.returncode == 2, "a word is no --yes"
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
        (["RUN", "--repo-id", "tiny2", "--version", "v 2"], ALICE, "is no name of a version"),
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
    served.add_repo("alice/theirs", {"README.md": "by hand"}, kind="models", private=True)
    shutil.rmtree(run.path / "merged-original", ignore_errors=True)
    done = lab(served, run, "push", run.run_id, "--repo-id", "pair", "--what", "adapter,merged", "--yes")
    assert done.returncode == 2 and "% worse" in done.stderr and ("models", "alice/pair") not in served.repos
    for name, words in (
        ("held", "an adapter, so a whole model cannot"),
        ("theirs", "README.md as no push from here made"),
    ):
        done = lab(served, run, "push", run.run_id, "--repo-id", name, "--what", "merged", "--plan")
        assert done.returncode == 2 and f"holds {words}" in done.stderr
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


def drifted(run: Run, loss: float, top1: float) -> None:
    """As the command drift leaves it: the trained model's loss is 2."""
    way = {"loss": loss, "loss_difference": loss - 2, "kl": 3.2e-7, "top1": top1, "rows": 3, "tokens": 90}
    told = {"adapter_sha256": adapter_sha256(run), "trained": {"loss": 2.0}, "ways": {"original": way}, "tokens": 90}
    told |= {"rows": 3, "held_out_rows": 3, "dtype": "fp32", "device": "CPU"}
    (run.path / "drift.json").write_text(json.dumps(told))


def test_adapter_merged_model_and_dataset_become_one_collection(served: Hub, tuned: Run) -> None:
    """How far the merge is from the trained model is said before; where that is little and the licence known, nobody is asked."""
    asked = ("push", tuned.run_id, "--repo-id", "all", "--what", "adapter,merged,dataset", "--collection", "Tickets")
    shown = said(lab(served, tuned, *asked, "--plan", "--json"))
    (warning,) = shown["warnings"]
    assert shown["needed"] and f"was not measured. `python -m qlora_core drift {tuned.run_id}`" in warning
    drifted(tuned, 2.5, 0.99)
    (doubt,) = told_of_merge(tuned, tuned.path / "merged-original")[1]
    assert "its loss is 2.5000 instead of 2.0000" in doubt
    drifted(tuned, 2.01, 0.99)
    done = lab(served, tuned, *asked, "--json")
    assert "loss 2.0100, +0.0100 against the model that was trained; KL 3.2e-07" in done.stderr
    assert "collection 'Tickets' of alice: is made, private" in done.stderr
    pushed, url = said(done)["pushed"], said(done)["collection"]
    (kept,) = [kept for kept in collections(served).values() if kept.title == "Tickets"]
    assert url.endswith(kept.slug) and kept.private
    of_kinds = {(item["type"], item["id"]) for item in kept.items}
    assert of_kinds == {("model", "alice/all"), ("model", "alice/all-merged"), ("dataset", "alice/all-data")}
    assert [entry.get("proof", {}).get("state") for entry in pushed] == ["proven", "proven", None]
    assert [entry["what"] for entry in published(tuned.path)[-3:]] == ["adapter", "merged", "dataset"]
    assert any(name.endswith(".parquet") for name in served.repo("alice/all-data").head.files)


def test_a_version_of_ones_own_name_is_pushed_again_and_no_other_takes_it(served: Hub, tuned: Run) -> None:
    asked = ("push", tuned.run_id, "--repo-id", "named", "--version", "1.0", "--yes", "--json")
    assert said(lab(served, tuned, *asked))["pushed"][0]["version"] == "1.0"
    again = said(lab(served, tuned, *asked))["pushed"][0]
    assert (again["version"], again["changed"]) == ("1.0", False)
    (tuned.path / "card.json").write_text(json.dumps({"notes": "Another."}))
    refused = lab(served, tuned, *asked)
    assert refused.returncode == 2 and "has a version '1.0' already; name another" in refused.stderr


def test_a_branch_and_a_pull_request_leave_the_main_branch_as_it_is(served: Hub, tuned: Run) -> None:
    repo = served.add_repo("alice/proposed", {"notes.txt": "theirs"}, kind="models", private=True)
    before, asked = repo.head.oid, ("push", tuned.run_id, "--repo-id", "proposed", "--yes", "--json")
    (branch,) = said(lab(served, tuned, *asked, "--revision", "trial"))["pushed"]
    assert branch["commit"] == repo.refs["refs/heads/trial"] and branch["proof"]["state"] == "proven"
    (proposed,) = said(lab(served, tuned, *asked, "--pull-request"))["pushed"]
    assert proposed["commit"] == repo.refs["refs/pr/1"] and proposed["proof"]["state"] == "proven"
    assert proposed["pull_request"].endswith("/alice/proposed/discussions/1")
    assert repo.head.oid == before and set(repo.head.files) <= {"notes.txt", ".gitattributes"}


def test_the_report_of_a_study_goes_without_rows_and_with_them_if_asked(served: Hub, tmp_path: Path) -> None:
    runs = [study_run(), study_run(method="qlora", loss=0.851)]
    found = lay_down(tmp_path, study(runs, analysis=analysed(runs)))
    asked = ("push", found.study_id, "--repo-id", "compared", "--json")
    (entry,) = said(lab(served, found, *asked))["pushed"]
    repo = served.repo("alice/compared")
    assert entry["what"] == "report" and published(found.path) == [entry] and repo.private
    assert {"report.html", "runs.csv"} <= repo.head.files.keys() and "answers.csv" not in repo.head.files
    shown = json.loads(lab(served, found, *asked, "--with-rows").stdout)
    assert "adds answers.csv" in "".join(shown["plan"]) and "answers.csv" not in repo.head.files
    assert said(lab(served, found, *asked, "--with-rows", "--agreed", shown["agree"]))["pushed"][0]["changed"]
    assert "answers.csv" in repo.head.files


def test_a_study_is_found_by_its_whole_id_though_a_run_begins_so(tmp_path: Path) -> None:
    found = lay_down(tmp_path, study([study_run()]))
    run = run_in(tmp_path)
    run.path.rename(run.path.with_name(f"{found.study_id}-arm"))
    assert run_or_study(found.study_id, found.settings).path == found.path
    assert run_or_study(f"{found.study_id}-", found.settings).path.name == f"{found.study_id}-arm"
    with pytest.raises(RunError, match="(?s)no run 'x'.*no study 'x'"):
        run_or_study("x", settings_in(tmp_path))


@pytest.mark.parametrize("broken", ["{", "[]", '"x"'])
def test_a_broken_lineage_is_named_with_its_remedy(tuned: Run, broken: str) -> None:
    file = Path(tuned.config().data or "") / "lineage.json"
    whole = file.read_text()
    try:
        file.write_text(broken)
        for look in (lambda: dataset_of(tuned), lambda: dataset_part(file.parent, "alice/broken", token=ALICE)):
            with pytest.raises(DatasetError, match=f"{file.parent}: its lineage.json .* prepare it again"):
                look()
    finally:
        file.write_text(whole)


@pytest.mark.parametrize(("licence", "words"), [(None, "is unknown"), ("cc-by-nc-4.0", "non-commercial"), ("mit", "")])
def test_a_licence_is_confirmed_for_a_private_dataset_too(
    tuned: Run, tmp_path: Path, licence: str | None, words: str
) -> None:
    shutil.copytree(tuned.config().data or "", folder := tmp_path / "set")
    lineage = json.loads((folder / "lineage.json").read_text()) | {"license": licence}
    (folder / "lineage.json").write_text(json.dumps(lineage))
    warning = dataset_part(folder, "alice/set", token=ALICE, private=True).warning or ""
    assert words in warning and bool(words) == bool(warning)


def test_a_push_that_is_cancelled_after_its_commit_says_that_it_is_there() -> None:
    push = Push("alice/it", "model", ALICE, Release("adapter"), {})
    with pytest.raises(Cancelled, match="^cancelled$"), recording(None, push):
        raise Cancelled("cancelled")
    told = "http://hub/alice/it: is on the Hub, as v3, commit 01234567, and was not checked"
    with pytest.raises(Cancelled, match=told), recording(None, push) as committed:
        committed(Pushed("http://hub/alice/it", "alice/it", "0123456789", "v3", True, {}))
        raise Cancelled("cancelled")
