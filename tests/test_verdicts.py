"""Verdicts say what the numbers carry and no more: amounts, thresholds, noise, intervals, and what is missing."""

from dataclasses import replace

import pytest
from study_builders import LADDER, analysed, behaviour, floor, ladder, quantisation, similarity, study, study_run

from qlora_core.study_hypotheses import knee, knees, sensitivity
from qlora_core.study_numbers import arms, pairs, spread, step_ratios, undominated
from qlora_core.study_results import Analysis
from qlora_core.verdicts import Verdict, verdicts
from qlora_core.verdicts.failures import mismatch


def pair(**of_qlora):
    """LoRA as measured on a large model, and QLoRA that saves much of it."""
    common = {"steps": 40, "base_loss": 2.0}
    values = {"peak_gib": 7.6, "seconds": 1.05, "loss": 0.81} | of_qlora
    return [study_run(peak_gib=19.4, seconds=1.0, loss=0.80, **common), study_run(method="qlora", **common, **values)]


def practical(runs, **changed) -> Verdict:
    return verdicts(study(runs, **changed))[0]


def titled(results, beginning) -> list[Verdict]:
    return [verdict for verdict in verdicts(results) if verdict.title.startswith(beginning)]


# -- the practical one


def test_it_is_first_and_says_what_was_saved_and_what_it_cost():
    found = practical(pair())
    assert (found.title, found.holds) == ("Does QLoRA pay here?", "yes")
    assert found.sentence.startswith("QLoRA saved 61 % of GPU memory, cost ") and "of time a step" in found.sentence
    assert "+0.010 evaluation loss: use it here" in found.sentence
    assert found.sureness == "low: one seed and no noise floor"
    assert found.numbers["by_setting"]["rank 8"]["memory_saved"] == pytest.approx(1 - 7.6 / 19.4, abs=1e-6)
    assert found.numbers["by_setting"]["rank 8"]["loss_added"] == pytest.approx(0.01)


def test_a_clear_loss_of_quality_is_no_yes():
    found = practical(pair(loss=0.85))
    assert found.holds == "unclear" and "where 16 bits do not fit" in found.sentence and "+0.050" in found.sentence


def test_a_loss_within_what_chance_changes_counts_as_none():
    runs = pair(loss=0.83)
    assert practical(runs).holds == "unclear"
    found = practical([*runs, *floor(runs[0], loss=0.04)])
    assert found.holds == "yes" and found.sureness.startswith("moderate: one seed, judged by a noise floor")
    assert "0.040 nats counts as none, as chance alone changes so much" in found.rests_on


def test_noise_of_other_evaluation_rows_is_none():
    """Another seed may hold out other rows; the difference in loss is then not chance alone."""
    runs = pair(loss=0.83)
    other = study_run(role="other seed", seed=43, loss=0.95, eval_fingerprint="other rows")
    assert practical([*runs, other]).holds == "unclear"


def test_a_small_model_is_named_as_the_reason_with_what_dominates():
    found = practical(pair(peak_gib=19.0))
    assert found.holds == "no" and "it does not pay here" in found.sentence
    assert "weights, which are all that 4 bits make smaller, are only 24 % of LoRA's estimated peak" in found.sentence
    assert "activations 42 % and logits 30 %" in found.sentence
    small = practical([study_run(), study_run(method="qlora", peak_gib=1.12)])
    assert "the model is small (0.27 GiB of 16-bit weights)" in small.sentence


def test_on_a_cpu_the_kind_of_memory_is_named_and_more_of_it_is_no_saving():
    runs = [study_run(on_gpu=False, peak_gib=2.80), study_run(method="qlora", on_gpu=False, peak_gib=2.88, loss=0.85)]
    found = practical(runs)
    assert found.sentence.startswith("QLoRA took 2.9 % more host memory") and found.holds == "no"
    assert "GPU" not in found.sentence and "host memory is that of the whole process" in found.sentence


def test_nothing_is_guessed_where_the_parts_are_not_known():
    runs = [study_run(parts={}), study_run(method="qlora", peak_gib=1.12, parts={})]
    assert "have not recorded" in practical(runs).sentence


def test_lora_left_out_for_memory_is_a_reason_and_said_to_be_an_estimate():
    left_out = study_run(state="left out", detail="it would not fit the memory")
    found = practical([left_out, pair()[1]])
    assert found.holds == "yes" and found.sureness.startswith("moderate: LoRA was estimated")
    assert found.sentence.startswith(
        "QLoRA fits where LoRA would not have fitted, by the estimate: its peak was 7.60 GiB"
    )


def test_lora_out_of_memory_is_the_best_reason_for_qlora():
    failed = study_run(state="failed", detail="out of memory while training at step 3; choose qlora")
    found = practical([failed, pair()[1]])
    assert found.holds == "yes" and found.sentence.startswith(
        "QLoRA fits where LoRA ran out of memory: its peak was 7.60 GiB"
    )
    assert "out of memory while training" in found.rests_on


def test_memory_of_two_kinds_is_not_compared():
    found = practical([study_run(), study_run(method="qlora", on_gpu=False)])
    assert (
        found.title == "Which setting to take?" and "cannot be weighed" in found.sentence and found.holds == "unclear"
    )


def test_several_ranks_give_a_range_and_seeds_give_sureness():
    found = practical(ladder(peaks=(19.4, 7.6), qlora_loss=0.003, seeds=(1, 2, 3)))
    assert found.holds == "yes" and "Over rank 2, rank 4, rank 8 and rank 16." in found.sentence
    assert found.sureness == "moderate: 3 seeds"
    assert practical(ladder(peaks=(19.4, 7.6), seeds=(1, 2, 3, 4, 5))).sureness == "high: 5 seeds"
    assert found.numbers["loss_added"]["count"] == 12


def test_runs_that_are_not_quite_comparable_are_never_sure():
    every = verdicts(study(ladder(seeds=(1, 2, 3, 4, 5)), differences=("device: a, b",), analysis=analysed(ladder())))
    judged = [verdict for verdict in every if not verdict.title.startswith(("H2", "LoRA and QLoRA answer"))]
    assert {verdict.sureness for verdict in judged} == {"low: the runs are not quite comparable"}


def test_without_a_pair_the_cheapest_of_the_good_ones_is_named():
    runs = [study_run(method="qlora", rank=rank, loss=loss, peak_gib=1 + rank / 100)
            for rank, loss in ((4, 0.95), (8, 0.815), (64, 0.811))]  # fmt: skip
    found = practical(runs)
    assert found.sentence.startswith("Take QLoRA, rank 8: evaluation loss 0.8150, 1.08 GiB of GPU memory")
    assert "QLoRA, rank 64 has the lowest loss" in found.sentence


def test_before_anything_has_finished_it_says_so():
    found = practical([study_run(state="queued"), study_run(method="qlora", state="running")])
    assert (found.sentence, found.holds) == ("Nothing has finished yet.", "unclear")


def test_qlora_of_other_number_types_is_compared_with_the_one_lora_run():
    runs = [study_run(varied={"method": "lora"}), *(
        study_run(method="qlora", varied={"method": "qlora", "quant_type": kind}, quant_type=kind, peak_gib=0.5)
        for kind in ("nf4", "fp4"))]  # fmt: skip
    assert set(practical(runs).numbers["by_setting"]) == {"NF4", "FP4"}


# -- H1


def equal(cosine, **others):
    runs = [*pair(), *floor(pair()[0])]
    return titled(study(runs, analysis=analysed(runs, cosine=cosine, **others)), "H1")[0]


@pytest.mark.parametrize(
    ("cosine", "order", "holds", "said"),
    [
        (0.97, 0.96, "yes", "above 0.95"),
        (0.97, 0.99, "yes", "4 bits changed more than another row order does"),
        (0.80, 0.70, "unclear", "no more than another row order does"),
        (0.80, 0.99, "no", "not above 0.95"),
    ],
)
def test_adapters_are_judged_by_the_threshold_and_by_the_noise_floor(cosine, order, holds, said):
    found = equal(cosine, order=order)
    assert found.holds == holds and said in found.sentence, found.sentence
    assert f"{order:.3f} with another row order" in found.sentence and "0.210 with another seed" in found.sentence
    assert ("preferable" in found.sentence) == (holds == "yes")
    assert found.sureness == "moderate: one seed, judged by a noise floor"


def test_without_a_noise_floor_the_sureness_is_low():
    found = equal(0.97, order=None, seed=None)
    assert found.sureness.startswith("low: one seed and no noise floor") and "was not measured" in found.sentence


def test_pairs_of_several_seeds_are_judged_by_their_mean():
    runs = [study_run(method=method, seed=seed) for seed in (1, 2) for method in ("lora", "qlora")]
    found = Analysis(
        updates={},
        similarity=(
            similarity(runs[0], runs[1], cosine=0.96),
            similarity(runs[2], runs[3], cosine=0.90),
            similarity(runs[0], runs[0], cosine=0.80, kind="other row order"),
        ),
    )
    verdict = titled(study(runs, analysis=found), "H1")[0]
    assert verdict.numbers["LoRA – QLoRA, rank 8"]["cosine"] == [0.96, 0.90]
    assert verdict.holds == "unclear" and "cosine 0.900 to 0.960, around 0.95" in verdict.sentence
    assert verdict.sureness == "moderate: 2 seeds, judged by a noise floor"


def test_refused_adapters_are_named_with_the_reason():
    analysis = Analysis(updates={}, refused=({"run_id": "a", "reason": "DoRA learns magnitudes too"},))
    found = titled(study(pair(), analysis=analysis), "H1")[0]
    assert found.holds == "unclear" and "DoRA learns magnitudes too" in found.sentence


# -- H2


def groups(costs, seeds=(1, 2, 3), noise=0.0):
    runs = [study_run(seed=s, varied={"method": "lora"}, loss=0.8 + 0.02 * s) for s in seeds]
    for place, (group, cost) in enumerate(costs.items()):
        runs += [
            study_run(
                method="qlora", seed=s, varied={"method": "qlora", "quantize_modules": [group]},
                loss=0.8 + 0.02 * s + cost + noise * ((s * 7 + place * 3) % 5 - 2),
            )
            for s in seeds
        ]  # fmt: skip
    return runs


COSTS = {"all": 0.05, "q_proj": 0.001, "k_proj": 0.001, "v_proj": 0.02, "mlp": 0.03}


def test_groups_are_ranked_by_what_they_cost_beyond_the_seeds():
    found = titled(study(groups(COSTS, noise=0.0005)), "H2")[0]
    assert found.holds == "yes" and found.numbers["chance"] < 0.05
    assert list(found.numbers["loss_added"])[:2] == ["QLoRA, 4 bits in mlp", "QLoRA, 4 bits in v_proj"]
    assert found.numbers["loss_added"]["QLoRA, 4 bits in mlp"]["low"] is not None
    assert "All of them in 4 bits: +0.050" in found.sentence


def test_groups_that_differ_by_chance_only_are_not_ranked():
    found = titled(study(groups({"q_proj": 0.010, "v_proj": 0.012, "mlp": 0.011}, noise=0.01)), "H2")[0]
    assert found.holds in ("no", "unclear") and "which is not rare" in found.sentence


def test_one_seed_gives_an_order_without_an_interval_and_says_it_may_be_chance():
    found = titled(study(groups(COSTS, seeds=(1,))), "H2")[0]
    assert found.holds == "unclear" and "may be chance" in found.sentence and found.numbers["chance"] is None
    assert found.sureness.startswith("low: one seed")


def test_rounding_errors_are_labelled_as_no_loss():
    analysis = Analysis(updates={}, quantisation=quantisation())
    found = titled(study(pair(), analysis=analysis), "H2")[0]
    assert found.holds == "unclear" and found.sentence.startswith("Not measured by loss.")
    assert found.sentence.index("v_proj") < found.sentence.index("q_proj") and found.sureness.startswith("low")


def test_a_study_of_int8_groups_is_no_study_of_groups_in_4_bits():
    runs = [study_run(varied={"method": "lora"})] + [
        study_run(method="qlora", varied={"method": "qlora", "int8_modules": given})
        for given in ([], ["attention"], ["mlp"])
    ]
    assert sensitivity(arms(study(runs))) is None


# -- H3


def test_the_minimum_rank_is_where_more_gains_nothing_with_an_interval_over_seeds():
    found = titled(study(ladder(ranks=(2, 4, 8, 16, 32))), "H3")[0]
    assert found.holds == "yes" and "LoRA: r* is 8" in found.sentence and "QLoRA: r* is 8" in found.sentence
    assert found.numbers["LoRA"]["interval_95"] is not None and found.numbers["LoRA"]["seeds"] == 3
    assert found.numbers["LoRA"]["next_lower_rank_is_worse_by"] == pytest.approx(LADDER[4] - LADDER[8], abs=0.02)


def test_one_seed_gives_no_interval_and_says_so():
    found = titled(study(ladder(seeds=(42,))), "H3")[0]
    assert "one seed gives no interval" in found.sentence and found.sureness == "low: one seed and no noise floor"


def test_what_chance_changes_widens_what_counts_as_equal():
    runs = ladder(seeds=(42,), noise=0)
    first = next(run for run in runs if run.varied == {"method": "lora", "rank": 8})
    assert [one.rank for one in knees(study(runs), arms(study(runs)))] == [8, 8]
    noisy = study([*runs, *floor(first, loss=0.12)])
    assert [one.rank for one in knees(noisy, arms(noisy))] == [4, 4]


def test_the_bootstrap_covers_the_ranks_that_seeds_disagree_on():
    by_rank = {2: [1.0, 1.0, 1.0, 1.0], 4: [0.80, 0.84, 0.80, 0.84], 8: [0.81, 0.79, 0.81, 0.79]}
    seeds = {rank: dict(enumerate(values)) for rank, values in by_rank.items()}
    found = knee("", seeds, None)
    assert found.interval == (4, 8) and found.tolerance > 0.01
    assert knee("", seeds, None) == found  # the same numbers give the same interval


def test_a_flat_ladder_has_no_minimum_and_a_steep_one_may_go_on():
    flat = titled(study(ladder(losses=dict.fromkeys(LADDER, 0.8), noise=0.001)), "H3")[0]
    assert flat.holds == "no" and "no such rank among ranks 2, 4, 8 and 16" in flat.sentence
    steep = titled(study(ladder(losses={2: 1.2, 4: 1.1, 8: 1.0, 16: 0.9})), "H3")[0]
    assert steep.holds == "unclear" and "still falling at rank 16" in steep.sentence


def test_two_ranks_show_no_bend():
    found = titled(study(ladder(ranks=(4, 8))), "H3")[0]
    assert found.holds == "unclear" and "two ranks show no bend" in found.sentence


def test_a_rank_that_failed_is_left_out_and_the_rest_is_judged():
    runs = [
        replace(run, state="failed", result=None) if run.varied == {"method": "lora", "rank": 4} else run
        for run in ladder()
    ]
    results = study(runs)
    found = {one.label: one for one in knees(results, arms(results))}
    assert list(found["LoRA"].losses) == [2, 8, 16] and list(found["QLoRA"].losses) == [2, 4, 8, 16]


# -- behaviour


@pytest.mark.parametrize(("cosine", "holds"), [(0.99, "yes"), (0.95, "unclear"), (0.80, "no")])
def test_answers_are_alike_where_the_whole_interval_is(cosine, holds):
    analysis = Analysis(updates={}, behaviour=behaviour(pair(), cosine=cosine))
    found = titled(study(pair(), analysis=analysis), "LoRA and QLoRA answer")[0]
    assert found.holds == holds
    assert "83 % of tokens are equal (95 % interval 78 to 87 %)" in found.sentence
    assert "untuned base: LoRA, rank 8 42 %" in found.sentence


# -- failure modes, and what is missing


def test_ranks_that_are_too_low_are_named():
    found = titled(study(ladder()), "Failure: rank too low")[0]
    assert "LoRA: too low is rank 2 by +0.21 and rank 4 by +0.1" in found.sentence and found.holds == "yes"


def test_a_group_that_costs_much_is_a_sensitive_layer_with_its_remedy():
    found = titled(study(groups(COSTS)), "Failure: sensitive layer")[0]
    assert found.sentence.startswith("QLoRA, 4 bits in mlp costs +0.030") and "int8_modules" in found.sentence


def test_a_layer_that_4_bits_drew_apart_is_a_candidate_and_no_more():
    runs = [*pair(), *floor(pair()[0])]
    apart = similarity(*pair(), cosine=0.97, spread=0.01)
    for module in apart["modules"]:
        module["cosine"] = 0.4 if module["layer"] == 5 else 0.96
    order = similarity(pair()[0], runs[3], cosine=0.98, kind="other row order", spread=0.01)
    found = titled(study(runs, analysis=Analysis(updates={}, similarity=(apart, order))), "Failure: sensitive layer")[0]
    assert "layer 5 (cosine 0.40" in found.sentence and "layer 6" not in found.sentence and found.holds == "unclear"


def test_evaluation_loss_that_rises_while_training_loss_falls_is_a_data_mismatch():
    run = study_run(evaluations=(2.0, 1.0, 1.4), loss=1.4)
    assert "rises from 1.000 at step 10 to 1.400 while training loss falls" in mismatch(run)
    found = titled(study([run, study_run(rank=4)]), "Failure: data mismatch")[0]
    assert found.sentence.startswith("LoRA, rank 8: evaluation loss rises")


def test_a_base_that_was_better_is_a_data_mismatch():
    assert "the base was better: evaluation loss 2.000 before, 2.300 after" in mismatch(
        study_run(evaluations=(2.0, 2.2, 2.3))
    )
    assert mismatch(study_run()) is None


def test_what_was_not_looked_for_is_said():
    found = titled(study(pair()), "A known failure is seen")[0]
    assert found.holds == "no" and found.sentence.startswith("Not seen: data mismatch.")
    assert "did not measure it: rank too low and sensitive layer" in found.sentence


@pytest.mark.parametrize("state", ["failed", "stopped", "crashed", "gone"])
def test_a_missing_run_is_named_and_the_rest_compared(state):
    runs = [*pair(), study_run(rank=16, state=state, detail="the loss is not finite; lower learning_rate")]
    every = verdicts(study(runs))
    assert every[0].sentence.startswith("QLoRA saved 61 %")
    missing = every[-1]
    assert missing.title == "The study is complete" and missing.holds == "no"
    assert "LoRA, rank 16, seed 42, " in missing.sentence and missing.rests_on == "2 of 3 runs finished"
    assert ("the loss is not finite" in missing.sentence) == (state != "gone")


def test_runs_still_to_come_are_no_failure():
    missing = verdicts(study([*pair(), study_run(rank=16, state="queued")]))[-1]
    assert missing.holds == "unclear" and missing.sentence.startswith("1 run still to come")


def test_a_complete_study_does_not_speak_of_it():
    assert not titled(study(pair()), "The study is complete")


# -- numbers


def test_an_interval_of_the_mean():
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 * 1 / 3**0.5)
    assert spread([1.0]).low is None and spread([]) is None


def test_only_what_no_other_arm_beats_is_kept():
    runs = [study_run(), study_run(method="qlora", peak_gib=0.5), study_run(rank=16, loss=0.9, peak_gib=2, seconds=1)]
    assert undominated(arms(study(runs))) == {"LoRA, rank 8", "QLoRA, rank 8"}


def test_ratios_take_no_step_that_saw_other_rows():
    one, other = study_run(steps=10), study_run(method="qlora", steps=10, tokens=[1] * 10)
    assert step_ratios(pairs(arms(study([one, other])))[0]) == []
