"""A small study for real, from its first run to its analysis: what is compared, and what goes wrong on the way."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import settings_in, write_rows
from safetensors.torch import load_file, save_file
from study_builders import study_run
from tiny_models import dataset, model_folder, reset_accelerate, said, train_here

from qlora_core import events, queue
from qlora_core.combining import create_combined
from qlora_core.config import TrainConfig
from qlora_core.errors import RunError
from qlora_core.merging import merge
from qlora_core.run_status import CRASHED, FINISHED, QUEUED, STOPPED
from qlora_core.runs import Run, RunStore, remove_from_queue
from qlora_core.studies import Study, StudyStore
from qlora_core.study_charts import figures
from qlora_core.study_results import ARM, OTHER_ORDER, OTHER_SEED
from qlora_core.verdicts import verdicts
from qlora_core.worker import loading
from qlora_core.worker.analysing import analyse
from qlora_core.worker.behaviour import agreement, interval_of_mean, token_match
from qlora_core.worker.study_pairs import first_seed, weight_pairs

VARY = {"method": ["lora", "qlora"], "rank": [2, 4]}


def study_in(folder: Path, vary: Any = None, *, noise_floor: bool = True, **values: Any) -> Study:
    """Its runs are made and queued; none is started."""
    data = write_rows(folder / "train.jsonl", dataset(12))
    held_out = write_rows(folder / "eval.jsonl", dataset(5, seed=2))
    config = TrainConfig(
        **{
            "data": str(data), "eval_data": str(held_out), "base_model": str(model_folder()), "method": "lora", "rank": 4,
            "compute_dtype": "fp32", "device": "cpu", "learning_rate": 1e-2, "rows_per_step": 4, "max_steps": 2,
        } | values
    )  # fmt: skip
    study = StudyStore(settings_in(folder)).create(config, vary or VARY, noise_floor=noise_floor, name="tiny")
    started, queue.start_next = queue.start_next, lambda settings: []
    try:
        study.start()
    finally:
        queue.start_next = started
    return study


def train_all(study: Study) -> Study:
    for run in study.runs():
        remove_from_queue(run)
        train_here(run)
    return study


def analyse_here(study: Study, stop: Any = False) -> Run:
    run = study.analysis()
    remove_from_queue(run)
    reset_accelerate()
    attempt = 1 + sum(isinstance(event, events.Launched) for event in run.events()[0])
    events.append(run.events_path, events.Launched(attempt=attempt))
    analyse(run, stop)
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = train_all(study_in(tmp_path_factory.mktemp("study")))
    analyse_here(study)
    return study


def test_all_runs_share_rows_and_steps_and_start_from_the_same_adapter(study: Study) -> None:
    results = study.results()
    assert [(run.role, run.label, run.seed) for run in results.runs] == [
        (ARM, "LoRA, rank 2", 42), (ARM, "LoRA, rank 4", 42), (ARM, "QLoRA, rank 2", 42), (ARM, "QLoRA, rank 4", 42),
        (OTHER_SEED, "LoRA, rank 2", 43), (OTHER_SEED, "LoRA, rank 4", 43),
        (OTHER_ORDER, "LoRA, rank 2", 42), (OTHER_ORDER, "LoRA, rank 4", 42),
    ]  # fmt: skip
    assert {run.state for run in results.runs} == {FINISHED} and {len(run.steps) for run in results.runs} == {2}
    rows = {(run.dataset().train_fingerprint, run.dataset().eval_fingerprint) for run in study.runs()}
    assert len(rows) == 1
    first_step = {run.label: run.steps[0].tokens for run in results.runs if run.role == ARM}
    assert len(set(first_step.values())) == 1
    assert results.analysis_state == FINISHED and len(results.arms()) == 4
    assert study.status().state == FINISHED and study.status().done == 8


def test_updates_are_compared_with_their_pair_their_noise_floor_and_their_neighbour(study: Study) -> None:
    found = study.analysis_found()
    kinds = [(entry["kind"], entry["label"]) for entry in found.similarity]
    assert kinds == [
        ("lora-qlora", "QLoRA, rank 2"), ("lora-qlora", "QLoRA, rank 4"),
        ("other seed", "LoRA, rank 2"), ("other seed", "LoRA, rank 4"),
        ("other row order", "LoRA, rank 2"), ("other row order", "LoRA, rank 4"),
        ("other arm", "LoRA, rank 2 – LoRA, rank 4"), ("other arm", "QLoRA, rank 2 – QLoRA, rank 4"),
    ]  # fmt: skip
    cosines = {entry["kind"]: entry["overall"]["cosine"] for entry in found.similarity if "rank 4" in entry["label"]}
    assert cosines["other seed"] < cosines["other row order"] and cosines["other seed"] < cosines["lora-qlora"]
    assert set(found.updates) == {run.run_id for run in study.runs()} and not found.refused
    assert {(m["layer"], m["module"]) for m in found.updates[study.runs()[0].run_id]} >= {
        (0, "q_proj"),
        (1, "down_proj"),
    }


def test_the_base_is_measured_matrix_by_matrix(study: Study) -> None:
    found = study.analysis_found().quantisation
    assert {(entry["layer"], entry["module"]) for entry in found} >= {(0, "q_proj"), (1, "down_proj")}
    assert all(entry["type"] == "nf4" and 0.03 < entry["relative_error"] < 0.2 for entry in found)


def test_answers_of_every_model_stand_beside_each_other(study: Study) -> None:
    found, arms = study.analysis_found().behaviour, [run.run_id for run in study.results().runs if run.role == ARM]
    assert set(found["sources"]) == {*arms, "base", "base nf4"}
    assert found["sources"]["base"]["loss"] != found["sources"]["base nf4"]["loss"]
    for run in study.results().runs:
        if run.role == ARM:  # the adapter on its own base gives the loss that its run measured last
            assert found["sources"][run.run_id]["loss"] == pytest.approx(run.eval_loss, rel=1e-4)
    assert len(found["rows"]) == 5 and all(set(row["answers"]) == set(found["sources"]) for row in found["rows"])
    pairs = {(pair["first"], pair["second"]): pair for pair in found["pairs"]}
    assert {(arms[0], arms[2]), (arms[1], arms[3]), ("base", arms[3]), ("base", "base nf4")} <= set(pairs)
    for pair in pairs.values():
        low, high = pair["token_match_95"]
        assert 0 <= low <= pair["token_match"] <= high <= 1 and pair["rows"] == 5


def test_what_has_not_finished_is_left_out_and_said_and_the_analysis_can_be_made_again(tmp_path: Path) -> None:
    study = study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False)
    lora, qlora = study.runs()
    with pytest.raises(RunError, match="none of its runs has finished with an adapter; resume the study"):
        analyse_here(study)
    remove_from_queue(lora)
    train_here(lora)
    analysis = analyse_here(study)
    assert said(analysis, events.Note)[-1].text == "not compared, as they have not finished: QLoRA (queued)"
    assert study.analysis_found().similarity == () and len(study.analysis_found().updates) == 1
    remove_from_queue(qlora)
    train_here(qlora)
    analyse_here(study)
    assert [entry["kind"] for entry in study.analysis_found().similarity] == ["lora-qlora"]
    assert study.status().state == FINISHED

    class AtOnce:
        def __bool__(self) -> bool:
            return True

    assert analyse_here(study, AtOnce()).status().state == STOPPED
    assert study.status().state == STOPPED


def test_loftq_is_refused_with_the_reason(tmp_path: Path) -> None:
    vary = {"init_lora_weights": ["default", "loftq"]}
    study = train_all(study_in(tmp_path, vary, noise_floor=False, method="qlora", max_steps=1))
    analyse_here(study)
    (refused,) = study.analysis_found().refused
    assert refused["run_id"] == study.runs()[1].run_id and "LoftQ begins with what 4 bits lost" in refused["reason"]


def test_adapters_of_other_layers_are_not_compared_and_that_ends_nothing(tmp_path: Path) -> None:
    """Attention and MLP share no layer, query-value and attention do."""
    vary = {"target_modules": ["query-value", "attention", "mlp"]}
    study = train_all(study_in(tmp_path, vary, noise_floor=False, max_steps=1))
    assert analyse_here(study).status().state == FINISHED
    found = study.analysis_found()
    assert [entry["label"] for entry in found.similarity] == ["adapters on query-value – adapters on attention"]
    assert len(found.updates) == 3 and not found.refused


def test_each_way_to_hold_the_base_is_a_source_by_itself_and_one_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary = {"method": ["lora", "qlora"], "double_quant": [True, False], "compute_dtype": ["fp32", "bf16"]}
    study = train_all(study_in(tmp_path, vary, noise_floor=False, max_steps=1))
    load, loaded, dtypes = loading.load_base, [], []

    def watched(*args: Any, **how: Any) -> Any:
        assert not any(base() is not None for base in loaded), "a base is still in memory when the next one is loaded"
        model = load(*args, **how)
        loaded.append(weakref.ref(model))
        dtypes.append(how["dtype"])
        return model

    monkeypatch.setattr(loading, "load_base", watched)
    analyse_here(study)
    bases = {
        name: told["label"] for name, told in study.analysis_found().behaviour["sources"].items() if "base" in name
    }
    assert list(bases) == [
        "base bf16", "base nf4, double quantisation", "base nf4, double quantisation bf16", "base nf4", "base nf4 bf16", "base",
    ]  # fmt: skip
    assert len(loaded) == 6 and sorted(dtypes) == ["bf16"] * 3 + ["fp32"] * 3
    for run in study.results().runs:  # on the base that its own run held, so with the loss that this measured
        told = study.analysis_found().behaviour["sources"][run.run_id]
        assert told["loss"] == pytest.approx(run.eval_loss, rel=1e-4 if run.config.compute_dtype == "fp32" else 5e-3)


def test_scores_are_those_that_the_runs_counted(tmp_path: Path) -> None:
    scores = {"score": "exact", "score_rows": 3, "score_max_new_tokens": 4, "max_steps": 1}
    study = train_all(study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False, **scores))
    analyse_here(study)
    sources = study.analysis_found().behaviour["sources"]
    for run, base in zip(study.results().runs, ("base", "base nf4"), strict=True):
        before, after = run.result["train_info"]["scores"]
        assert sources[run.run_id]["score"] == after and sources[base]["score"] == before
        assert after["total"] == 3 and after["name"] == "exact"


def test_a_noise_floor_is_not_taken_from_another_seed() -> None:
    """The arm of the first seed failed: another seed's differs from the floor's runs by more than these are there for."""
    lora = {"method": "lora", "rank": 8}
    arms = [study_run(seed=seed, varied=lora) for seed in (43, 42)]
    floor = [study_run(role=OTHER_SEED, seed=44, varied=lora), study_run(role=OTHER_ORDER, seed=43, varied=lora)]
    whole = weight_pairs([*arms, *floor], first_seed(arms, (43, 42)))
    assert [(one.seed, kind) for one, _, kind, _ in whole] == [(43, OTHER_SEED), (43, OTHER_ORDER)]
    rest = weight_pairs([arms[1], *floor], first_seed(arms[1:], (43, 42)))
    assert [(one.seed, kind) for one, _, kind, _ in rest] == [(42, OTHER_SEED)]


def test_where_the_base_in_16_bits_has_no_room_another_one_embeds_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = train_all(study_in(tmp_path, {"rank": [2, 4]}, noise_floor=False, method="qlora", max_steps=1))
    load = loading.load_base

    def small(folder: Path, config: TrainConfig, **how: Any) -> Any:
        if config.method == "lora":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(folder, config, **how)

    monkeypatch.setattr(loading, "load_base", small)
    analysis = analyse_here(study)
    assert analysis.status().state == FINISHED
    found = study.analysis_found().behaviour
    runs = [run.run_id for run in study.runs()]
    assert set(found["sources"]) == {"base nf4", *runs}
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [("base nf4", run) for run in runs]
    assert "the base in 16 bits does not fit this device" in said(analysis, events.Note)[-1].text


def test_an_analysis_that_was_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kill -9 leaves: events without an end, a free lock, half of a file, and what was found before."""
    monkeypatch.setattr(queue, "start_next", lambda settings: [])
    study = train_all(study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False, max_steps=1))
    analysis = study.analysis()
    remove_from_queue(analysis)
    events.append(analysis.events_path, events.Launched(attempt=1))
    events.append(analysis.events_path, events.Phase(name="answering held-out rows"))
    (analysis.path / "found.json.partial").write_text('{"similarity": [')
    assert study.status().state == CRASHED and "analysis crashed" in study.status().detail
    assert study.analysis_found() is None and study.results().analysis is None
    study.start()
    assert study.status().state == QUEUED and [run.status().state for run in study.runs()] == [FINISHED, FINISHED]
    analyse_here(study)
    assert study.status().state == FINISHED and len(study.analysis_found().similarity) == 1


def test_the_queue_holds_an_analysis_back_until_the_last_run_has_ended(tmp_path: Path) -> None:
    study = study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False)
    queue.move(study.analysis(), 1)
    assert study.analysis().status().state == QUEUED
    assert queue._waits_for_others(study.analysis()) and not queue._waits_for_others(study.runs()[0])
    for run in study.runs():
        run.request_stop()
    assert not queue._waits_for_others(study.analysis())


def test_an_analysis_waits_for_no_run_that_cannot_start(tmp_path: Path) -> None:
    study = study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False)
    lora, qlora = study.runs()
    qlora.request_stop()
    (lora.path / "config.json").write_text("{")
    assert lora.queue_place() and not queue._waits_for_others(study.analysis())


def test_an_analysis_has_neither_steps_nor_an_adapter(study: Study) -> None:
    analysis, lora = study.analysis(), study.runs()[0]
    for how in ({}, {"max_steps": 9}):
        with pytest.raises(RunError, match=f"no steps to continue; resume the study.*studies resume {study.study_id}"):
            queue.resume(analysis, **how)
    with pytest.raises(RunError, match="has no adapter to merge; merge one of those runs"):
        merge(analysis)
    with pytest.raises(RunError, match="has no adapter; combine those runs instead"):
        create_combined([analysis, lora], [1, 1], method="svd", name="both")


def test_a_deleted_run_leaves_a_gap_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "start_next", lambda settings: [])
    study = train_all(study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False))
    lora = study.runs()[0]
    RunStore(study.settings).delete(lora)
    assert study.status().runs[0] == ("LoRA, seed 42", None) and study.results().runs[0].state == "gone"
    study.start()
    again = study.runs()[0]
    assert again.run_id != lora.run_id and again.status().state == QUEUED
    assert study.runs()[1].status().state == FINISHED, "finished runs stay as they are"
    assert again.config() == lora_config(study)


def lora_config(study: Study) -> TrainConfig:
    return TrainConfig.from_mapping(json.loads((study.path / "study.json").read_text())["runs"][0]["config"])


# -- measures of answers


def test_tokens_match_position_by_position_over_the_longer_answer() -> None:
    assert token_match([1, 2, 3], [1, 2, 3]) == 1 and token_match([], []) == 1
    assert token_match([1, 2, 3, 4], [1, 9]) == 0.25 and token_match([], [1]) == 0


def test_empty_answers_are_alike_and_an_empty_one_is_like_no_other() -> None:
    some, none = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.zeros(3, 2)
    found = agreement([[1], [], []], [[], [], []], some, none)
    assert found["embedding_cosine"] == pytest.approx(2 / 3) and found["token_match"] == pytest.approx(2 / 3)


def test_an_interval_narrows_with_rows_and_holds_the_mean() -> None:
    chance = np.random.default_rng(1)
    few, many = (chance.normal(0.5, 0.1, count) for count in (8, 800))
    (low, high), (lower, higher) = interval_of_mean(few), interval_of_mean(many)
    assert low < few.mean() < high and lower < many.mean() < higher and higher - lower < (high - low) / 3


def test_an_adapter_that_has_learnt_nothing_is_left_out_of_what_is_drawn_and_judged(tmp_path: Path) -> None:
    vary = {"method": ["lora", "qlora"]}
    study = train_all(study_in(tmp_path, vary, noise_floor=False, max_steps=1, learning_rate=1e-30))
    for run in study.runs():  # a step of nothing, to the last bit
        path = run.adapter / "adapter_model.safetensors"
        save_file({n: t * (0 if "lora_B" in n else 1) for n, t in load_file(path).items()}, path, {"format": "pt"})
    analyse_here(study)
    results = study.results()
    assert results.analysis.similarity == () and set(map(len, results.analysis.updates.values())) == {0}
    assert figures(results) and verdicts(results)


def test_double_quantisation_on_and_off_are_measured_apart(tmp_path: Path) -> None:
    study = train_all(
        study_in(tmp_path, {"double_quant": [True, False]}, noise_floor=False, method="qlora", max_steps=1)
    )
    analyse_here(study)
    found = study.analysis_found().quantisation
    types = [entry["type"] for entry in found if (entry["layer"], entry["module"]) == (0, "q_proj")]
    assert types == ["nf4", "nf4, single quantisation"]


def test_what_an_analysis_has_found_stays_until_the_next_has_found_it_all(tmp_path: Path) -> None:
    study = train_all(study_in(tmp_path, {"method": ["lora", "qlora"]}, noise_floor=False, max_steps=1))
    path = analyse_here(study).path / "found.json"
    before = path.read_text()

    class AfterTheWeights:
        """Stops where answers begin."""

        def __bool__(self) -> bool:
            phases = said(study.analysis(), events.Phase)
            return any("loading the base" in phase.name for phase in phases[-3:])

    assert analyse_here(study, AfterTheWeights()).status().state == STOPPED
    assert path.read_text() == before
    assert analyse_here(study).status().state == FINISHED and path.read_text() == before
