"""Charts tell what was measured, in the hue of the method, and keep the zoom of a redraw."""

import pytest
from helpers import started, step

from qlora_core import charts, events
from qlora_core.devices import GIB


def evaluation(number: int, loss: float) -> events.Evaluation:
    return events.Evaluation(step=number, loss=loss, tokens=10, seconds=1)


def test_a_run_gives_four_charts_of_its_values():
    history = [started(total_steps=4), evaluation(0, 3.5), step(1), step(2), evaluation(2, 1.5)]
    loss, rate, seconds, memory = charts.run_charts(history, method="lora", revision="run-1")
    assert list(loss.data[0].y) == [3.0, 1.5] and list(loss.data[1].y) == [3.5, 1.5]
    assert [trace.name for trace in loss.data] == ["training", "evaluation"]
    assert list(rate.data[0].y) == [1e-4, 1e-4]
    assert list(seconds.data[0].y) == [0.5, 0.5]
    assert list(memory.data[0].y) == [1000 / GIB, 1000 / GIB]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_line_has_the_hue_of_its_method(method):
    figures = charts.run_charts([started(), step(1)], method=method, revision="r")
    hues = {trace.line.color for figure in figures for trace in figure.data}
    assert hues == {charts.METHOD_HUES[method]}
    assert charts.METHOD_HUES["lora"] != charts.METHOD_HUES["qlora"]


def test_kinds_of_memory_are_named_and_not_mixed():
    host = charts.run_charts([step(1)], method="lora", revision="r")[3]
    gpu_step = step(1, peak_allocated_bytes=5 * GIB, peak_reserved_bytes=6 * GIB)
    gpu = charts.run_charts([gpu_step], method="lora", revision="r")[3]
    assert "host" in host.layout.title.text and [trace.name for trace in host.data] == ["host"]
    assert "GPU" in gpu.layout.title.text and [trace.name for trace in gpu.data] == ["allocated", "reserved"]
    assert list(gpu.data[0].y) == [5.0]


def test_a_redraw_keeps_zoom_and_frame():
    first = charts.run_charts([started(total_steps=50), step(1)], method="lora", revision="run-1")
    later = charts.run_charts([started(total_steps=50), step(1), step(2)], method="lora", revision="run-1")
    for before, after in zip(first, later, strict=True):
        assert before.layout.uirevision == after.layout.uirevision == "run-1"
        assert before.layout.xaxis.range == after.layout.xaxis.range


def test_axes_carry_units():
    loss, _, seconds, memory = charts.run_charts([step(1)], method="lora", revision="r")
    assert "nats" in loss.layout.yaxis.title.text
    assert (seconds.layout.yaxis.title.text, memory.layout.yaxis.title.text) == ("seconds", "GiB")


def test_before_the_first_step_the_charts_say_when_they_begin():
    for figure in charts.run_charts([], method="qlora", revision="r"):
        assert "first step" in figure.layout.annotations[0].text


def test_a_long_run_shows_every_nth_step_and_says_so():
    history = [step(number) for number in range(1, 2501)]
    loss = charts.run_charts(history, method="lora", revision="r")[0]
    assert len(loss.data[0].x) <= charts.MOST_POINTS
    assert loss.layout.xaxis.title.text == "step (one of 3 shown)"


def test_the_histogram_shows_the_cut_only_in_sight():
    near, far = charts.length_histogram([90, 100], cut_at=95), charts.length_histogram([90, 100], cut_at=512)
    assert near.layout.shapes[0].x0 == 95 and "95" in near.layout.annotations[0].text
    assert not far.layout.shapes
    assert "no rows" in charts.length_histogram([], cut_at=95).layout.annotations[0].text


def test_a_chart_without_points_sets_no_range_that_would_stay_when_points_come() -> None:
    """plotly keeps a range under one uirevision: after a resume from the beginning the curves were out of sight."""
    for figure in charts.run_charts([started(total_steps=10)], method="lora", revision="run"):
        assert figure.layout.yaxis.range is None
