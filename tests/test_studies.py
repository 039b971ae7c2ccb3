"""Studies before and around their runs: what a grid consists of, what is refused, what a study is made and remade from."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import settings_in, write_rows
from test_planner import LLAMA_8B
from tiny_models import dataset, make_run, model_folder, train_here

from qlora_core import events, queue
from qlora_core.config import TrainConfig, replace
from qlora_core.errors import ConfigError, RunError
from qlora_core.planner.facts import Device, Facts
from qlora_core.planner.studying import Pace, estimate_study, fit_sentence
from qlora_core.run_status import CRASHED, FAILED, FINISHED, QUEUED
from qlora_core.runs import RunStore
from qlora_core.studies import PICKED, Study, StudyStore
from qlora_core.study_grid import (
    KINDS,
    LAYER_GROUPS,
    MATRICES,
    cells,
    fill_notes,
    filled,
    layer_groups,
    matrices,
    sentence,
)
from qlora_core.study_picking import varied_of
from qlora_core.study_results import ARM, OTHER_ORDER, OTHER_SEED
from qlora_core.targets import Architecture
from qlora_core.verdicts import verdicts

GIB = 1024**3
PLAIN = TrainConfig(data="rows.jsonl", rank=8, seed=42)


def labels(made: Any) -> list[str]:
    return [cell.label for cell in made]


# -- the grid


def test_every_combination_is_one_run_for_each_seed() -> None:
    made = cells(PLAIN, {"method": ["lora", "qlora"], "rank": [2, 4]}, seeds=[1, 2])
    assert [(cell.label, cell.seed) for cell in made] == [
        (f"{method}, rank {rank}", seed) for method in ("LoRA", "QLoRA") for rank in (2, 4) for seed in (1, 2)
    ]
    assert all((cell.config.method, cell.config.rank, cell.config.seed) == (
        cell.varied["method"], cell.varied["rank"], cell.seed) for cell in made)  # fmt: skip
    assert len({cell.config.name for cell in made}) == len(made), "each run can be told from the others by its name"
    assert sentence(made) == "8 runs: 4 arms, 2 seeds"


def test_what_changes_nothing_for_lora_gives_one_lora_run() -> None:
    made = cells(PLAIN, {"method": ["lora", "qlora"], "quant_type": ["nf4", "fp4"]})
    assert labels(made) == ["LoRA", "QLoRA, NF4", "QLoRA, FP4"]
    assert made[0].varied == {"method": "lora"}


def test_the_noise_floor_repeats_lora_with_another_seed_and_in_another_order() -> None:
    made = cells(PLAIN, {"method": ["lora", "qlora"]}, noise_floor=True)
    (seed,), (order,) = ([cell for cell in made if cell.role == role] for role in (OTHER_SEED, OTHER_ORDER))
    assert (seed.config.seed, seed.config.row_order_seed) == (43, None)
    assert (order.config.seed, order.config.row_order_seed) == (42, 43)
    assert {seed.config.method, order.config.method} == {"lora"}
    only_qlora = cells(PLAIN, {"rank": [2, 4]}, noise_floor=True)
    assert [cell.varied for cell in only_qlora if cell.role == OTHER_SEED] == [{"rank": 2}, {"rank": 4}]


def test_another_row_order_is_another_one() -> None:
    made = cells(replace(PLAIN, row_order_seed=43), {"method": ["lora", "qlora"]}, noise_floor=True)
    orders = {cell.role: cell.config.order_seed for cell in made}
    assert orders[OTHER_ORDER] != orders[ARM]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_runs_that_differ_in_what_it_names(kind: str) -> None:
    made = cells(PLAIN, filled(KINDS[kind].vary, LLAMA_8B), noise_floor=KINDS[kind].noise_floor)
    arms = [cell for cell in made if cell.role == ARM]
    assert len(arms) >= 2 and len({cell.label for cell in arms}) == len(arms)
    assert not any(text in str(cell.varied) for cell in arms for text in (MATRICES, LAYER_GROUPS))


def test_matrices_and_quarters_are_those_of_the_model() -> None:
    assert matrices(LLAMA_8B) == [("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",), ("mlp",)]
    assert layer_groups(LLAMA_8B) == [("all@0-7",), ("all@8-15",), ("all@16-23",), ("all@24-31",)]


def test_where_query_key_and_value_are_one_matrix_it_stands_for_the_three() -> None:
    from qlora_core.worker.architecture import described

    gpt2 = Architecture.from_json(json.loads(json.dumps(described(model_folder("gpt2")))))
    assert matrices(gpt2) == [("c_attn",), ("attn.c_proj",), ("mlp",)]
    made = cells(PLAIN, filled(KINDS["quantised-matrices"].vary, gpt2))
    assert "QLoRA, 4 bits in c_attn" in labels(made)


def test_all_that_is_wrong_is_told_at_once() -> None:
    vary = {"base_model": ["a", "b"], "rnk": [1], "rank": [], "max_steps": [1, 2]}
    with pytest.raises(ConfigError) as raised:
        cells(PLAIN, vary, seeds=[1, 1])
    assert raised.value.problems == (
        "base_model cannot be varied: runs of other bases cannot be compared",
        "rnk is not a setting, so it cannot be varied",
        "rank has no values to vary; name at least one",
        "max_steps cannot be varied: runs of other lengths cannot be compared",
        "seeds are 1, 1: one is named twice; name each once",
    )
    with pytest.raises(
        ConfigError, match="QLoRA, init lora weights pissa: init_lora_weights is 'pissa' with method qlora"
    ):
        cells(PLAIN, {"method": ["lora", "qlora"], "init_lora_weights": ["default", "pissa"]})
    with pytest.raises(ConfigError, match="would have 1,000 runs.*at most 200"):
        cells(PLAIN, {"rank": list(range(1, 1001))})
    with pytest.raises(ConfigError, match="would combine 1,000,000 values and seeds"):
        cells(PLAIN, {"rank": list(range(1, 1001)), "lora_alpha": list(range(1, 1001))})
    with pytest.raises(ConfigError, match="one run, so there is nothing to compare"):
        cells(PLAIN, {"rank": [4]})


# -- what it will need


def facts(gib: float) -> Facts:
    config = TrainConfig(data="rows.jsonl", base_model="llama-8b", rank=16, max_seq_length=512, max_steps=10)
    return Facts(
        config=config, device=Device("a card", round(gib * GIB), True, True), train_rows=100, eval_rows=10,
        free_disk_bytes=10**12, architecture=LLAMA_8B,
    )  # fmt: skip


def test_a_study_is_estimated_run_by_run_and_what_does_not_fit_is_named() -> None:
    of = facts(12)
    made = cells(of.config, {"method": ["lora", "qlora"]})
    found = estimate_study(of, made, [])
    assert [cell.fits for cell in found.cells] == [False, True] and [c.label for c in found.fitting] == ["QLoRA"]
    (problem,) = found.problems()
    assert problem.startswith("LoRA: needs 1") and problem.endswith("11.40 may be used")
    assert fit_sentence(found).startswith("1 run would not fit: LoRA: needs")
    assert fit_sentence(estimate_study(facts(80), made, [])).startswith(
        "every run fits: the largest, LoRA, needs about"
    )


def test_time_is_known_where_each_method_was_measured_on_this_device_and_else_not() -> None:
    of = facts(80)
    made = cells(of.config, {"method": ["lora", "qlora"]})
    paces = [Pace("llama-8b", "NVIDIA a card", method, 1000.0, 30.0) for method in ("lora", "qlora")]
    tokens = 10 * 8 * 512
    assert estimate_study(of, made, paces).seconds == pytest.approx(2 * (30 + tokens / 1000))
    for others in (paces[:1], [Pace("other", p.device, p.method, 1.0, 1.0) for p in paces],
                   [Pace(p.base_model, "CPU (Xeon)", p.method, 1.0, 1.0) for p in paces]):  # fmt: skip
        assert estimate_study(of, made, others).seconds is None


# -- a study on disk


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "start_next", lambda settings: [])


def config_in(folder: Path, **values: Any) -> TrainConfig:
    data = write_rows(folder / "train.jsonl", dataset(12))
    known = {
        "data": str(data),
        "base_model": str(model_folder()),
        "compute_dtype": "fp32",
        "device": "cpu",
        "max_steps": 2,
    }
    return TrainConfig(**(known | values))


def made_study(folder: Path, **how: Any) -> Study:
    vary = how.pop("vary", {"method": ["lora", "qlora"]})
    return StudyStore(settings_in(folder)).create(config_in(folder), vary, name="tiny", **how)


def test_a_double_click_makes_one_study_and_another_one_after_it_has_ended(tmp_path: Path) -> None:
    first = made_study(tmp_path)
    assert made_study(tmp_path).study_id == first.study_id
    first.start()
    assert made_study(tmp_path).study_id == first.study_id and len(RunStore(first.settings).list()) == 3
    assert made_study(tmp_path, noise_floor=True).study_id != first.study_id
    first.stop()
    assert made_study(tmp_path).study_id != first.study_id


def test_rows_are_read_once_and_shared_by_all_runs(tmp_path: Path) -> None:
    study = made_study(tmp_path, vary={"rank": [1, 2, 3]})
    study.start()
    inodes = {(run.path / "dataset" / "train.jsonl").stat().st_ino for run in study.runs()}
    assert len(inodes) == 1
    (tmp_path / "train.jsonl").unlink()  # the study has its own copy
    RunStore(study.settings).delete(stopped(study).runs()[0])
    study.start()
    assert [status.state for _, status in study.status().runs] == [QUEUED] * 3


def stopped(study: Study) -> Study:
    study.stop()
    return study


def test_a_kill_while_its_runs_are_made_leaves_what_start_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, publish = made_study(tmp_path, vary={"rank": [1, 2, 3]}), RunStore.publish

    def killed(self: RunStore, *args: Any, **kwargs: Any) -> Any:
        if len(self.list()) == 2:
            raise KeyboardInterrupt
        return publish(self, *args, **kwargs)

    monkeypatch.setattr(RunStore, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        study.start()
    monkeypatch.setattr(RunStore, "publish", publish)
    assert len(study.runs()) == 2 and study.status().runs[2][1] is None
    study.start()
    assert len(RunStore(study.settings).list()) == 4 and study.status().state == QUEUED


def test_a_failed_run_is_a_gap_that_is_named_and_resumed(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    study.start()
    study.stop()
    lora, qlora = study.runs()
    train_here(lora)
    for event in (events.Launched(attempt=1), events.Failed(step=0, reason="out of memory")):
        events.append(qlora.events_path, event)
    status = study.status()
    assert (status.state, status.done, status.total) == (FAILED, 1, 2)
    assert "1 of 2 runs finished" in status.detail and "QLoRA, seed 42 failed" in status.detail
    results = study.results()
    assert [run.state for run in results.runs] == [FINISHED, FAILED] and results.runs[1].detail == "out of memory"
    assert results.runs[0].eval_loss == pytest.approx(results.runs[0].evaluations[-1].loss)
    study.start()
    assert lora.status().state == FINISHED and qlora.status().state == QUEUED


def test_deleting_a_study_leaves_its_runs_unless_asked(tmp_path: Path) -> None:
    study, store = made_study(tmp_path), StudyStore(settings_in(tmp_path))
    study.start()
    with pytest.raises(RunError, match="is under way; stop it before you delete it"):
        store.delete(study)
    study.stop()
    store.delete(study)
    assert store.list() == [] and len(RunStore(study.settings).list()) == 2
    again = made_study(tmp_path)
    again.start()
    again.stop()
    store.delete(again, with_runs=True)
    assert len(RunStore(study.settings).list()) == 2


def test_a_study_stays_where_a_run_of_it_cannot_go(tmp_path: Path) -> None:
    study, store = made_study(tmp_path), StudyStore(settings_in(tmp_path))
    study.start()
    study.stop()
    lora = study.runs()[0]
    merged = lora.path / "merged-original"
    shutil.copytree(model_folder(), merged)
    based = RunStore(study.settings).create(replace(config_in(tmp_path), base_model=str(merged)))
    with pytest.raises(RunError, match=f"its files are needed by {based.run_id}"):
        store.delete(study, with_runs=True)
    assert store.get(study.study_id).status().total == 2
    assert all(run.path.exists() for run in (*study.runs(), study.analysis())) and len(study.runs()) == 2


def test_what_would_not_fit_stays_a_gap_and_the_rest_is_a_whole_study(tmp_path: Path) -> None:
    vary = {"rank": [2, 64]}
    small = [cell for cell in cells(config_in(tmp_path), vary, name="tiny") if cell.varied["rank"] == 2]
    study = made_study(tmp_path, vary=vary, only=small)
    assert made_study(tmp_path, vary=vary).study_id != study.study_id
    study.start()
    study.stop()
    (run,) = study.runs()
    train_here(run)
    events.append(study.analysis().events_path, events.Finished(step=0))
    status = study.status()
    assert (status.done, status.total, status.left_out) == (1, 1, ("rank 64, seed 42",))
    assert status.state == FINISHED, "what was never to be made is not missing"
    assert "rank 64, seed 42 is left out, as it would not fit the memory" in status.detail
    gap = study.results().runs[1]
    assert (gap.state, gap.detail, gap.config.rank) == ("left out", "it would not fit the memory", 64)
    study.start()
    assert len(study.runs()) == 1, "starting it again does not make it"
    sentences = [verdict.sentence for verdict in verdicts(study.results())]
    assert any("rank 64, seed 42, is left out: it would not fit the memory" in text for text in sentences)


def test_folders_of_creations_that_were_killed_go_after_a_day(tmp_path: Path) -> None:
    folder = settings_in(tmp_path).home / "studies"
    for name, age in ((".creating-1-aa", 90_000), (".deleted-old", 90_000), (".creating-2-bb", 60)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    made_study(tmp_path)
    assert [path.name for path in folder.glob(".*") if path.is_dir()] == [".creating-2-bb"]
    assert len(StudyStore(settings_in(tmp_path)).list()) == 1


def test_values_that_mean_the_same_layers_are_one_run_and_that_is_said() -> None:
    from qlora_core.worker.architecture import described

    gpt2, mamba = (
        Architecture.from_json(json.loads(json.dumps(described(model_folder(n))))) for n in ("gpt2", "mamba")
    )
    vary = KINDS["adapted-matrices"].vary
    assert filled(vary, LLAMA_8B) == vary and fill_notes(vary, LLAMA_8B) == []
    assert filled(vary, gpt2) == {"target_modules": ["query-value", "attention", "mlp", "all-linear"]}
    assert fill_notes(vary, gpt2) == [
        "target_modules key-value means the same layers as query-value here, as query, key and value are one matrix, c_attn: one "
        "run stands for both"
    ]
    assert "target_modules mlp is left out: the model has no such layers" in fill_notes(vary, mamba)


def test_an_unreadable_study_says_so_and_names_are_found_by_their_beginning(tmp_path: Path) -> None:
    study, store = made_study(tmp_path), StudyStore(settings_in(tmp_path))
    assert store.get(study.study_id[:12]).study_id == study.study_id
    with pytest.raises(RunError, match="there is no study 'nothing'"):
        store.get("nothing")
    (study.path / "study.json").write_text("{")
    with pytest.raises(RunError, match=r"its study.json cannot be read .*; delete the study"):
        study.status()


# -- runs picked by hand


def test_picked_runs_of_equal_rows_and_base_are_compared_and_differences_are_said(tmp_path: Path) -> None:
    runs = [
        train_here(make_run(tmp_path, max_steps=steps, rank=rank, eval_steps=2)) for steps, rank in ((2, 2), (3, 4))
    ]
    study = StudyStore(settings_in(tmp_path)).of_runs(runs)
    results = study.results()
    assert results.kind == PICKED and [run.varied for run in results.runs] == [
        {"rank": 2, "max_steps": 2}, {"rank": 4, "max_steps": 3},
    ]  # fmt: skip
    assert any(text.startswith("max steps: 2 in ") for text in results.differences)
    assert study.status().done == 2
    RunStore(study.settings).delete(runs[0])
    with pytest.raises(RunError, match="is gone; pick runs again"):
        study.start()


def test_a_study_of_runs_that_may_end_early_is_refused() -> None:
    config = TrainConfig(data="rows.jsonl", base_model="base", early_stopping_patience=2)
    with pytest.raises(
        ConfigError, match="early_stopping_patience is 2: runs that end at other steps cannot be compared"
    ):
        cells(config, {"rank": [2, 4]})


def test_settings_that_count_in_no_run_do_not_part_a_pair() -> None:
    given = {"data": "rows.jsonl", "base_model": "base", "max_steps": 4}
    lora = TrainConfig(**given, method="lora", quant_type="fp4", num_epochs=3)
    qlora = TrainConfig(**given, method="qlora", quant_type="nf4", num_epochs=1)
    assert varied_of([lora, qlora]) == ["method"]
    assert varied_of([qlora, replace(qlora, rank=16)]) == ["rank"]


def test_picked_runs_stay_when_their_study_goes_with_its_runs(tmp_path: Path) -> None:
    runs = [train_here(make_run(tmp_path, max_steps=1, rank=rank)) for rank in (2, 4)]
    store = StudyStore(settings_in(tmp_path))
    store.delete(store.of_runs(runs), with_runs=True)
    assert all(run.path.exists() for run in runs) and store.list() == []


def test_runs_that_cannot_be_compared_are_refused_with_every_reason(tmp_path: Path) -> None:
    store = StudyStore(settings_in(tmp_path))
    first = train_here(make_run(tmp_path, max_steps=1))
    rows = train_here(make_run(tmp_path, max_steps=1, train_rows=dataset(14)))
    waiting = make_run(tmp_path, max_steps=1)
    with pytest.raises(RunError, match="1 run is picked; pick at least two"):
        store.of_runs([first])
    with pytest.raises(RunError, match="were trained on other rows: pick runs of the same"):
        store.of_runs([first, rows])
    assert waiting.status().state == CRASHED, "made, and never queued"
    with pytest.raises(RunError, match=f"{waiting.run_id}: is crashed; pick runs that have finished"):
        store.of_runs([first, waiting])
    other = tmp_path / "other"
    shutil.copytree(model_folder(), other)
    based = train_here(make_run(tmp_path, max_steps=1, base_model=str(other)))
    for changed, words in (({"template": "chatml"}, "other templates"), ({"loss_on": "everything"}, "on other tokens")):
        asked = train_here(make_run(tmp_path, max_steps=1, **changed))
        with pytest.raises(RunError, match=words):
            store.of_runs([first, asked])
    with pytest.raises(RunError, match="the runs have other base models"):
        store.of_runs([first, based])
