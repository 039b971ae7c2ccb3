"""Loss curves and LoRA beside QLoRA as PNG: the Hub shows no SVG of a repository. Drawn with Pillow, which gradio brings."""

import bisect
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from qlora_core import events
from qlora_core.charts import METHOD_HUES, MOST_POINTS, NEUTRAL
from qlora_core.devices import GIB
from qlora_core.study_numbers import Arm, losses, memory_kind, memory_kinds
from qlora_core.wording import METHOD_NAMES

# Twice the size that a card shows, for sharp screens; drawn twice as large again, for smooth lines.
SHARP, SMOOTH = 2, 2
SCALE = SHARP * SMOOTH
WIDTH, HEIGHT = 720, 360
PAPER, INK, FAINT = "#ffffff", "#1f2933", "#d5dbe3"
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 48, 48
ROW, MOST_ARMS = 22, 16


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[tuple[float, float], ...]
    colour: str
    dotted: bool = False


def loss_curve(history: Sequence[events.Event], *, method: str) -> bytes | None:
    """Training loss as a thin line, evaluation loss as dots; None for a run without a step."""
    steps = [(one.step, one.loss) for one in history if isinstance(one, events.Step)]
    evaluations = [(one.step, one.loss) for one in history if isinstance(one, events.Evaluation)]
    if not steps:
        return None
    shown = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    hue = METHOD_HUES[method]
    lines = [Line("training", tuple(shown), _lighter(hue)), Line("evaluation", tuple(evaluations), hue, dotted=True)]
    return _lines(f"Loss of {METHOD_NAMES[method]}, nats a token", lines)


def study_losses(found: Sequence[Arm], hues: dict[str, str]) -> bytes | None:
    """Evaluation loss of the first finished run of each arm, by step."""
    lines = []
    for arm in found[:MOST_ARMS]:
        run = next(iter(arm.finished), None)
        if run and run.evaluations:
            points = tuple((one.step, one.loss) for one in run.evaluations)
            lines.append(Line(arm.label, points, hues[arm.label], dotted=arm.method == "qlora"))
    return _lines("Evaluation loss, nats a token", lines) if lines else None


def costs(found: Sequence[Arm], hues: dict[str, str]) -> bytes | None:
    """Peak memory, step time and evaluation loss of each finished arm as bars, means over its seeds."""
    shown = [arm for arm in found if arm.finished][:MOST_ARMS]
    if not shown:
        return None
    panels: list[tuple[str, dict[str, float | None], Callable[[float], str]]] = [
        (
            f"Peak memory, {kind}, GiB",
            {arm.label: _gib(arm) for arm in shown if memory_kind(arm) == kind},
            lambda value: f"{value:.2f}",
        )
        for kind in memory_kinds(shown)
    ]
    times = {arm.label: arm.mean(lambda run: run.step_seconds) for arm in shown}
    panels.append(("Step time, median, seconds", times, lambda value: f"{value:.3f}"))
    ends = {arm.label: _mean(losses(arm)) for arm in shown}
    panels.append(("Evaluation loss, nats a token", ends, lambda value: f"{value:.4f}"))
    return _bars([panel for panel in panels if any(value is not None for value in panel[1].values())], hues)


def _gib(arm: Arm) -> float | None:
    peak = arm.mean(lambda run: run.peak_bytes)
    return None if peak is None else peak / GIB


def _mean(values: dict[int, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


# -- drawing


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


class _Sheet:
    """A picture in card pixels."""

    def __init__(self, height: float) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, math.ceil(height) * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float = 3.5) -> None:
        ends = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self._draw.ellipse(ends, fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle([left * SCALE, top * SCALE, right * SCALE, bottom * SCALE], fill=colour)

    def text(self, x: float, y: float, text: str, *, size: float = 12, anchor: str = "la", colour: str = INK) -> None:
        self._draw.text((x * SCALE, y * SCALE), text, fill=colour, font=_font(size), anchor=anchor)

    def width(self, text: str, size: float = 12) -> float:
        return self._draw.textlength(text, font=_font(size)) / SCALE

    def fitted(self, text: str, width: float) -> str:
        """The text, or as much of its beginning as the width holds."""
        if self.width(text) <= width:
            return text
        most = bisect.bisect_right(range(len(text)), width, key=lambda letters: self.width(text[:letters] + "…")) - 1
        return text[: max(0, most)] + "…"

    def png(self) -> bytes:
        """The same picture gives the same bytes, so that a push without a change is none."""
        file = io.BytesIO()
        self.image.reduce(SMOOTH).save(file, "PNG", optimize=True)
        return file.getvalue()


def _lines(title: str, lines: Sequence[Line]) -> bytes:
    lines = [line for line in lines if line.points]
    legend_rows = _legend(None, lines)
    sheet = _Sheet(HEIGHT + 20 * (legend_rows - 1))
    sheet.text(12, 10, title, size=15)
    _legend(sheet, lines)
    top, bottom = TOP + 20 * legend_rows, HEIGHT + 20 * (legend_rows - 1) - BOTTOM
    x_most = max(x for line in lines for x, _ in line.points) or 1
    values = [y for line in lines for _, y in line.points]
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - low) / ((high - low) or 1)
        return LEFT + x / x_most * (WIDTH - LEFT - RIGHT), bottom - share * (bottom - top)

    for tick in ticks:
        _, y = place(0, tick)
        sheet.line([(LEFT, y), (WIDTH - RIGHT, y)], FAINT)
        sheet.text(LEFT - 8, y, f"{tick:.4g}", anchor="rm")
    for tick in _ticks(0, x_most, whole=True):
        x, _ = place(tick, low)
        sheet.text(x, bottom + 8, f"{tick:,.0f}", anchor="ma")
    sheet.text((LEFT + WIDTH - RIGHT) / 2, bottom + 26, "step", anchor="ma")
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        if len(placed) > 1:
            sheet.line(placed, line.colour, 1.6)
        if line.dotted or len(placed) == 1:
            for x, y in placed:
                sheet.dot(x, y, line.colour)
    return sheet.png()


def _legend(sheet: _Sheet | None, lines: Sequence[Line]) -> int:
    """Rows that the entries take below the title, drawn where there is a sheet."""
    ruler, x, row = sheet or _Sheet(1), 12.0, 0
    for line in lines:
        name = ruler.fitted(line.name, WIDTH - 60)
        room = ruler.width(name) + 44
        if x + room > WIDTH - 8 and x > 12:
            x, row = 12.0, row + 1
        if sheet:
            y = 44 + 20 * row
            sheet.line([(x, y), (x + 22, y)], line.colour, 2)
            if line.dotted:
                sheet.dot(x + 11, y, line.colour)
            sheet.text(x + 28, y, name, anchor="lm")
        x += room
    return row + 1


def _bars(panels: Sequence[tuple[str, dict[str, float | None], Callable[[float], str]]], hues: dict[str, str]) -> bytes:
    height = sum(30 + ROW * len(values) + 14 for _, values, _ in panels) + 12
    sheet, y = _Sheet(height), 12.0
    labels = [label for _, values, _ in panels for label in values]
    left = min(max(sheet.width(label) for label in labels) + 24, WIDTH / 2)
    for title, values, written in panels:
        sheet.text(12, y, title, size=14)
        y += 30
        most = max((value for value in values.values() if value is not None), default=1) or 1
        for label, value in values.items():
            sheet.text(left - 8, y + ROW / 2 - 2, sheet.fitted(label, left - 20), anchor="rm")
            if value is None:
                sheet.text(left, y + ROW / 2 - 2, "not measured", anchor="lm", colour=NEUTRAL)
            else:
                end = left + max(1.0, value / most * (WIDTH - left - 90))
                sheet.box(left, y, end, y + ROW - 5, hues[label])
                sheet.text(end + 6, y + ROW / 2 - 2, written(value), anchor="lm")
            y += ROW
        y += 14
    return sheet.png()


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers from below `low` to above `high`, or within them for whole ones."""
    span = high - low or abs(high) or 1
    rough = span / 5
    power = 10 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        width = max(1, round(width))
        return [width * n for n in range(int(high // width) + 1)]
    first, last = math.floor(low / width), math.ceil(high / width)
    return [round(width * n, 12) for n in range(first, last + 1)]


def _lighter(hue: str) -> str:
    return "#" + "".join(f"{round(int(hue[i : i + 2], 16) * 0.5 + 127):02X}" for i in (1, 3, 5))
