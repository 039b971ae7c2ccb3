"""Figures of a study show what was measured, name what is missing, and never mix what cannot be compared."""

import html
import math

import pytest
from study_builders import GIB, analysed, behaviour, floor, ladder, quantisation, similarity, study, study_run

from qlora_core.charts import METHOD_HUES
from qlora_core.study_charts import AXES, figures, loss_curves, sections, table_of
from qlora_core.study_charts.quality import smooth
from qlora_core.study_results import Analysis

PAIR = [study_run(), study_run(method="qlora", loss=0.851, base_loss=3.6, peak_gib=0.89, seconds=0.45)]


def shown(figure, column=-1):
    """row or series -> value of the figure's table."""
    columns, rows = table_of(figure)
    value = columns.index(column) if isinstance(column, str) else column
    return {row[0]: row[value] for row in rows}


def texts(figure):
    return " ".join(note.text for note in figure.layout.annotations)


def test_the_bars_are_as_long_as_what_was_measured():
    found = figures(study(PAIR))
    measured = {row[0]: row[2] for row in table_of(found["Peak memory, GPU"])[1] if row[1] == "measured"}
    assert measured == {"LoRA, rank 8": pytest.approx(1.13, abs=1e-6), "QLoRA, rank 8": pytest.approx(0.89, abs=1e-6)}
    speeds = {run.label: run.result["train_info"]["tokens_per_second"] for run in PAIR}
    assert shown(found["Speed"], "tokens a second") == speeds
    medians = shown(found["Step time"], "median")
    assert medians == {run.label: pytest.approx(run.step_seconds) for run in PAIR}
    sizes = {run.label: run.result["train_info"]["adapter_bytes"] / 1024**2 for run in PAIR}
    assert shown(found["Adapter on disk"], "MiB") == sizes
    assert shown(found["Evaluation loss"], "nats a token") == pytest.approx(
        {"LoRA, rank 8": 0.814, "QLoRA, rank 8": 0.851}
    )


def test_estimate_and_measurement_stand_beside_each_other_and_look_different():
    run = study_run(parts={"weights": GIB, "logits": GIB // 2}, peak_gib=1.6)
    figure = figures(study([run, *PAIR[1:]]))["Peak memory, GPU"]
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar" and trace.y[0] < 0.5}
    assert bars["weights"].x[0] == 1.0 and bars["logits"].x[0] == 0.5 and bars["measured"].x[0] == pytest.approx(1.6)
    assert all(bars[part].marker.pattern.shape for part in ("weights", "logits"))
    assert bars["measured"].marker.pattern.shape is None
    assert bars["measured"].y != bars["weights"].y == bars["logits"].y


def test_a_run_that_did_not_tell_the_parts_of_its_estimate_gets_no_invented_split():
    figure = figures(study([study_run(parts={}), study_run(method="qlora", parts={})]))["Peak memory, GPU"]
    assert {trace.name for trace in figure.data if trace.type == "bar"} == {"measured", "estimate, parts not recorded"}


def test_memory_of_gpu_and_host_are_never_in_one_figure():
    runs = [study_run(), study_run(method="qlora", on_gpu=False, peak_gib=2.5)]
    found = figures(study(runs))
    gpu, host = found["Peak memory, GPU"], found["Peak memory, host"]
    assert set(shown(gpu)) == {"LoRA, rank 8"} and set(shown(host)) == {"QLoRA, rank 8"}
    assert not [title for title in found if title.startswith("Memory, time and loss")]  # no two arms of one kind


def test_a_failed_run_leaves_a_named_gap_and_the_others_stay():
    gone = study_run(rank=16, state="failed", detail="out of memory")
    runs = [study_run(rank=4), study_run(rank=8), gone, study_run(rank=32)]
    found = figures(study(runs))
    for title in ("Peak memory, GPU", "Step time", "Speed", "Adapter on disk"):
        assert "LoRA, rank 16 <i>– failed</i>" in texts(found[title]), title
        assert set(shown(found[title])) == {"LoRA, rank 4", "LoRA, rank 8", "LoRA, rank 32"}, title
    by_rank = found["Evaluation loss"]
    assert "LoRA, rank 16: failed" in html.unescape(texts(by_rank)).replace("<br>", " ")
    assert list(by_rank.data[0].customdata) == [4, 8, 32] and 16 in by_rank.layout.xaxis.tickvals
    curves = found["Training loss"]
    assert [trace.name for trace in curves.data if "16" in trace.name] == ["LoRA, rank 16 (failed)"]


def test_a_run_that_was_stopped_is_drawn_as_far_as_it_came_but_not_compared():
    runs = [study_run(), study_run(method="qlora", state="stopped", steps=20)]
    found = figures(study(runs))
    assert "stopped" in texts(found["Evaluation loss"])
    assert set(shown(found["Evaluation loss"])) == {"LoRA, rank 8"}
    assert max(found["Training loss"].data[1].x) < max(found["Training loss"].data[0].x) == 20


def test_without_any_step_there_is_no_figure():
    assert figures(study([study_run(state="queued"), study_run(method="qlora", state="queued")])) == {}


def test_one_hue_a_method_and_ranks_as_shades_of_it():
    figure = figures(study(ladder(seeds=(42,))))["Speed"]
    hues = {trace.name: trace.marker.color for trace in figure.data}
    assert len(set(hues.values())) == 8
    blue = [hues[f"LoRA, rank {rank}"] for rank in (2, 4, 8, 16)]
    assert all(int(hue[5:], 16) > int(hue[1:3], 16) for hue in blue)  # bluer than red
    assert [sum(bytes.fromhex(hue[1:])) for hue in blue] == sorted(
        (sum(bytes.fromhex(h[1:])) for h in blue), reverse=True
    )
    single = figures(study(PAIR))["Speed"]
    assert {trace.marker.color for trace in single.data} == set(METHOD_HUES.values())


def test_the_ratio_compares_steps_of_the_same_rows_and_falls_with_their_tokens():
    lora, qlora = (study_run(method=method, steps=40, seconds=1) for method in ("lora", "qlora"))
    odd = study_run(method="qlora", rank=4, steps=40, tokens=[77] * 40, varied={"method": "qlora", "rank": 4})
    figure = figures(study([lora, study_run(rank=4, steps=40), qlora, odd]))["Time of a QLoRA step against LoRA's"]
    dots = figure.data[0]
    steps = {step.tokens: step.step_seconds for step in lora.steps[2:]}
    others = {step.tokens: step.step_seconds for step in qlora.steps[2:]}
    assert len(dots.x) == 38  # two steps of 40 warm up; of rank 4 no step is of the same rows
    # Steps of equal tokens differ a little in time, in both alike.
    assert dots.y[0] == pytest.approx(others[150] / steps[150], rel=1e-6)
    middle = figure.data[1]
    assert list(middle.y) == sorted(middle.y, reverse=True) and len(figure.data) == 2


def test_error_bars_are_the_interval_over_seeds():
    runs = [study_run(seed=seed, rank=rank, loss=loss) for rank, losses in ((4, (1.0, 1.2)), (8, (0.8, 0.8)))
            for seed, loss in zip((1, 2), losses, strict=True)]  # fmt: skip
    figure = figures(study(runs))["Evaluation loss"]
    line = next(trace for trace in figure.data if trace.mode == "lines+markers")
    assert list(line.y) == [pytest.approx(1.1), pytest.approx(0.8)]
    # Student's t of one degree of freedom: 12.706 · s / sqrt(2), s = 0.1414.
    assert list(line.error_y.array) == [pytest.approx(12.706 * 0.1, rel=1e-3), pytest.approx(0, abs=1e-9)]


def test_one_seed_has_no_error_bar_and_says_so():
    figure = figures(study(ladder(seeds=(42,))))["Evaluation loss"]
    assert not any(trace.error_y.visible for trace in figure.data)
    assert "no interval" in figure.layout.title.subtitle.text


@pytest.mark.parametrize(("axis", "last"), [("step", 20), ("epoch", 2.0), ("token", 5080), ("time", None)])
def test_curves_lie_along_the_axis_that_is_asked_for(axis, last):
    run = PAIR[0]
    figure = loss_curves(study(PAIR), axis)
    assert figure.layout.xaxis.title.text == AXES[axis]
    assert list(figure.data[0].y) == [step.loss for step in run.steps]
    wanted = {"token": sum(step.tokens for step in run.steps), "time": sum(step.step_seconds for step in run.steps)}
    assert figure.data[0].x[-1] == pytest.approx(wanted.get(axis, last))


def test_evaluations_lie_where_their_step_lies():
    run = PAIR[0]
    figure = loss_curves(study(PAIR), "token", what="evaluation")
    tokens = [sum(step.tokens for step in run.steps[: one.step]) for one in run.evaluations]
    assert list(figure.data[0].x) == tokens and list(figure.data[0].y) == [one.loss for one in run.evaluations]


def test_smoothing_is_a_moving_average_that_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2, 2, 2])
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1, (0.25 * 1 + 0.5 * 3) / 0.75])
    figure = loss_curves(study(PAIR), smoothing=0.8)
    assert "0.8" in figure.layout.title.subtitle.text
    assert list(figure.data[0].y) == pytest.approx(smooth([step.loss for step in PAIR[0].steps], 0.8))


def test_long_runs_are_thinned_and_the_axis_says_so():
    runs = [study_run(rank=rank, steps=5000, tokens=[100] * 5000) for rank in (4, 8)]
    figure = loss_curves(study(runs))
    assert sum(len(trace.x) for trace in figure.data) <= 8000
    assert figure.layout.xaxis.title.text == "step (one step of 2 shown)"


def test_every_seed_of_an_arm_is_a_line_of_one_colour_and_one_entry_of_the_legend():
    figure = loss_curves(study(ladder(ranks=(8,), seeds=(1, 2, 3))))
    assert len(figure.data) == 6 and len({trace.line.color for trace in figure.data}) == 2
    assert sum(trace.showlegend for trace in figure.data) == 2


def test_maps_show_each_pair_above_its_noise_floor_on_one_scale():
    runs = [*PAIR, *floor(PAIR[0])]
    found = figures(study(runs, analysis=analysed(runs, cosine=0.97, order=0.985, seed=0.21)))
    figure = found["Cosine similarity: LoRA – QLoRA, rank 8"]
    panels = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.name for trace in panels] == [
        "LoRA against QLoRA (overall 0.970)",
        "noise floor: another row order (overall 0.985)",
        "noise floor: another seed (overall 0.210)",
    ]
    assert {(trace.zmin, trace.zmax) for trace in panels} == {(0.0 if panels[2].zmin == 0 else panels[2].zmin, 1.0)}
    wanted = {(str(m["layer"]), m["module"]): m["cosine"] for m in similarity(*PAIR, cosine=0.97)["modules"]}
    columns, rows = table_of(figure)
    got = {(layer, module): value for series, layer, module, value in rows if series == panels[0].name}
    assert columns == ["series", "layer", "module", "value"] and got == wanted


def test_all_comparisons_of_adapters_stand_in_one_figure():
    runs = [*PAIR, *floor(PAIR[0])]
    found = analysed(runs)
    neighbours = similarity(PAIR[0], study_run(rank=16), cosine=0.6, kind="other arm") | {
        "label": "LoRA, rank 8 – LoRA, rank 16"
    }
    results = study(runs, analysis=Analysis(updates={}, similarity=(*found.similarity, neighbours)))
    assert shown(figures(results)["Likeness of the adapters"], "cosine of all updates together") == {
        "LoRA – QLoRA, rank 8": 0.97,
        "LoRA, rank 8, other seed": 0.21,
        "LoRA, rank 8, other row order": 0.985,
        "LoRA, rank 8 – LoRA, rank 16": 0.6,
    }


def test_modules_stand_in_the_order_of_the_data_and_bases_after_the_arms():
    entries = sorted(quantisation(layers=2, types=("nf4",)), key=lambda entry: entry["module"])
    told = behaviour(PAIR)
    sources = dict(sorted(told["sources"].items(), reverse=True))
    found = figures(
        study(PAIR, analysis=Analysis(updates={}, quantisation=tuple(entries), behaviour=told | {"sources": sources}))
    )
    modules = list(found["Quantisation error of the base weights"].data[0].y)
    assert modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    labels = found["Perplexity on held-out rows"].layout.meta["rows"]
    assert list(labels) == ["LoRA, rank 8", "QLoRA, rank 8", "base", "base nf4"]


def test_a_module_that_a_layer_does_not_have_stays_empty():
    entries = [
        entry for entry in quantisation(layers=3, types=("nf4",)) if (entry["layer"], entry["module"]) != (1, "k_proj")
    ]
    analysis = Analysis(updates={}, quantisation=tuple(entries))
    figure = figures(study(PAIR, analysis=analysis))["Quantisation error of the base weights"]
    panel = figure.data[0]
    assert math.isnan(panel.z[list(panel.y).index("k_proj")][1]) and len(table_of(figure)[1]) == 20
    assert "nf4 (mean" in panel.name


def test_effective_rank_and_singular_values_come_from_the_updates():
    found = figures(study(PAIR, analysis=analysed(PAIR)))
    ranks = table_of(found["Effective rank: rank 8"])[1]
    of_lora = {(row[1], row[2]): row[3] for row in ranks if row[0].startswith("LoRA")}
    assert of_lora[("0", "q_proj")] == pytest.approx(1 + 7 * 0.3)
    values = found["Singular values"].data[0]
    assert list(values.x) == list(range(1, 9)) and values.y[1] / values.y[0] == pytest.approx(0.67)


def test_answers_are_shown_with_their_intervals():
    analysis = Analysis(updates={}, behaviour=behaviour(PAIR))
    found = figures(study(PAIR, analysis=analysis))
    first = table_of(found["Answers equal, token by token"])[1][0]
    assert first[0] == "LoRA, rank 8 – QLoRA, rank 8" and first[2:] == [0.83, pytest.approx(0.78), pytest.approx(0.87)]
    perplexities = shown(found["Perplexity on held-out rows"], "perplexity (lower is better)")
    assert perplexities["base nf4"] == pytest.approx(math.exp(3.599))
    assert (
        "21 of 40" in [text for trace in found["Right answers on held-out rows"].data for text in trace.text or ()][0]
    )


def test_what_makes_runs_not_comparable_is_said_in_every_figure():
    results = study(ladder(), differences=("device: NVIDIA H100 in a, CPU in b",), analysis=analysed(ladder()))
    found = figures(results)
    assert len(found) > 10
    for title, figure in found.items():
        said = html.unescape(texts(figure)).replace("<br>", " ")
        assert "Not quite comparable: device: NVIDIA H100 in a, CPU in b." in said, title


def test_a_hostile_name_is_shown_as_text():
    name = '<a href="http://evil">&lt;b&gt;</a>'
    runs = [study_run(varied={"template": name}), study_run(varied={"template": "model"})]
    for title, figure in figures(study(runs)).items():
        written = [texts(figure), *(f"{trace.name} {trace.hovertemplate}" for trace in figure.data)]
        assert any("&lt;a href" in text for text in written) and not any("<a href" in text for text in written), title
    assert table_of(figures(study(runs))["Speed"])[1][0][0] == f"template {name}"  # a table is no markup


def test_every_axis_has_a_name_and_the_figures_fit_a_narrow_screen():
    results = study(ladder(), analysis=analysed(ladder()))
    for title, figure in figures(results).items():
        axes = [axis.title.text for axis in figure.select_xaxes()]
        assert any(axes), title
        assert figure.layout.margin.l + figure.layout.margin.r < 200 and len(figure.layout.title.text) <= 42, title
        for line in (figure.layout.title.subtitle.text or "").split("<br>"):
            assert len(html.unescape(line)) <= 56, title


def test_parts_of_the_study_are_in_the_order_of_reading():
    assert list(sections(study(ladder(), analysis=analysed(ladder())))) == [
        "Memory and time",
        "Loss",
        "Weights",
        "Answers",
    ]


def test_a_study_of_quantised_groups_ranks_what_each_costs():
    runs = [study_run(seed=s, varied={"method": "lora"}, loss=0.80 + 0.01 * s) for s in (1, 2, 3)]
    for group, cost in (("all", 0.05), ("q_proj", 0.002), ("mlp", 0.03)):
        runs += [
            study_run(
                method="qlora",
                seed=s,
                varied={"method": "qlora", "quantize_modules": [group]},
                loss=0.80 + 0.01 * s + cost,
            )
            for s in (1, 2, 3)
        ]
    figure = figures(study(runs))["What each group costs in 4 bits"]
    rows = table_of(figure)[1]
    assert [row[0] for row in rows] == ["QLoRA, 4 bits in mlp", "QLoRA, 4 bits in q_proj"]
    assert [row[2] for row in rows] == [pytest.approx(0.03), pytest.approx(0.002)]
