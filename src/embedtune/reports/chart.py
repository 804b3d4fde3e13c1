"""Line charts as inline SVG: pure functions of numbers, coloured by the page that holds them.

Lengths are SVG units, about a pixel each where a chart is as wide as a phone or a third of a page.
The page styles the classes ``chart``, ``grid``, ``tick``, ``axis``, ``line``, ``dot``, ``label``,
``hover``, and those of a :class:`Line`, which are ``s0`` to ``s5`` and ``pale`` over the steps.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from embedtune.reports.smoothing import Point
from embedtune.reports.ticks import nice_ticks, number, tick_labels

WIDTH, HEIGHT = 340, 220
TOP, BOTTOM = 26, 36
CHARACTER, BOLD = 6.6, 7.7  # a wide font's digits at the page's 11 px
LINE_HEIGHT = 12
MAX_DOTS = 16  # a line of more points is drawn without dots
MAX_HOVERS = 60


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label: Its name, in the text shown on hover.
        points: (x, y), finite, x ascending.
        style: CSS classes.
        at_end: Whether the name is also written at the line's end.
    """

    label: str
    points: Sequence[Point]
    style: str
    at_end: bool = True


class Axis(NamedTuple):
    """What an axis measures.

    Attributes:
        label: The quantity and its unit.
        include: Values that it shows whatever the data.
        log2: Whether every doubling takes as much room; the ticks are then the data's own values.
    """

    label: str
    include: Sequence[float] = ()
    log2: bool = False


class Scale(NamedTuple):
    """Where the values of an axis lie: ``low`` at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float
    log2: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of ``value``; the middle where there is but one."""
        low, high = self.low, self.high
        if self.log2:
            low, high, value = math.log2(low), math.log2(high), math.log2(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def line_chart(lines: Sequence[Line], *, title: str, x: Axis, y: Axis) -> str:
    """Return an ``<svg>`` of lines over one pair of axes.

    Args:
        lines: At least one point between them; later lines lie above earlier ones.
        title: What the chart shows, for those who do not see it.
        x: The horizontal axis; where all x are whole, so are its ticks.
        y: The vertical axis.
    """
    points = [point for line in lines for point in line.points]
    xs = sorted({*(x for x, _ in points), *x.include})
    ys = [*(y for _, y in points), *y.include]
    y_ticks = nice_ticks(min(ys), max(ys))
    x_ticks = xs if x.log2 else _inner_ticks(xs)
    left = 10 + CHARACTER * max(map(len, tick_labels(y_ticks)))
    names = [line.label for line in lines if line.at_end]
    right = WIDTH - max(24, 9 + BOLD * max(map(len, names), default=0))
    across = Scale(xs[0], xs[-1], left, right, x.log2)
    up = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    about = "; ".join(_in_words(line, x.label) for line in lines if line.points)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>",
        *_draw_y_axis(y, y_ticks, up, left, right),
        *_draw_x_axis(x, x_ticks, across),
        *(_draw_line(line, across, up) for line in lines if line.points),
        *_draw_labels(lines, up, right + 7),
        *_draw_hovers(lines, x.label, across),
        "</svg>",
    ]
    return "".join(parts)


def _inner_ticks(xs: Sequence[float]) -> list[float]:
    """Return the nice ticks between the first and the last of ``xs``."""
    whole = all(x == int(x) for x in xs)
    ticks = nice_ticks(xs[0], xs[-1])
    return [t for t in ticks if xs[0] <= t <= xs[-1] and (t == int(t) or not whole)]


def _in_words(line: Line, x_label: str) -> str:
    ends = [f"{number(y)} at {x_label} {number(x)}" for x, y in (line.points[0], line.points[-1])]
    return f"{line.label}: " + " to ".join(dict.fromkeys(ends))


def _text(x: float, y: float, text: str, anchor: str, style: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _draw_y_axis(
    axis: Axis, ticks: Sequence[float], up: Scale, left: float, right: float
) -> Iterator[str]:
    yield _text(0, 11, axis.label, "start", "axis name")
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = f"{up(tick):.1f}"
        yield f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>'
        yield _text(left - 6, up(tick) + 4, label, "end", "axis")


def _draw_x_axis(axis: Axis, ticks: Sequence[float], across: Scale) -> Iterator[str]:
    base = HEIGHT - BOTTOM
    taken = math.inf
    labels = [f"{tick:g}" for tick in ticks] if axis.log2 else tick_labels(ticks)
    # From the right: where labels would touch, the larger one is shown.
    for tick, label in reversed(list(zip(ticks, labels, strict=True))):
        x, half = across(tick), CHARACTER * len(label) / 2
        yield f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
        if x + half < taken:
            yield _text(x, base + 16, label, "middle", "axis")
            taken = x - half - 4
    yield _text((across.start + across.end) / 2, HEIGHT - 4, axis.label, "middle", "axis name")


def _draw_line(line: Line, across: Scale, up: Scale) -> str:
    places = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    drawn = f'<polyline class="line {line.style}" points="{path}"/>'
    if len(places) > MAX_DOTS:
        return drawn
    dots = (f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places)
    return drawn + "".join(dots)


def _draw_labels(lines: Sequence[Line], up: Scale, x: float) -> Iterator[str]:
    named = sorted(
        (up(line.points[-1][1]), line.label, line.style)
        for line in lines
        if line.at_end and line.points
    )
    heights = spread([height for height, *_ in named], LINE_HEIGHT, up.end, up.start)
    for height, (_, label, style) in zip(heights, named, strict=True):
        yield _text(x, height + 4, label, "start", f"label {style}")


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places as little as it takes to lie ``gap`` apart, between low and high.

    Least squares, by pooling those that come too close. Where there is no room, ``low`` wins.

    >>> spread([50.0, 52.0, 90.0], 12, 0, 100)
    [45.0, 57.0, 90.0]
    """
    pools: list[tuple[float, int]] = []  # mean place as if the gaps were taken out, and size
    for i, place in enumerate(places):
        pools.append((place - i * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools.pop(-2), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    top = max(low, high - gap * (len(places) - 1))
    moved = [min(max(place, low), top) for place, size in pools for _ in range(size)]
    return [place + i * gap for i, place in enumerate(moved)]


def _draw_hovers(lines: Sequence[Line], x_label: str, across: Scale) -> Iterator[str]:
    """Cover the chart with invisible bands whose tooltips tell the values at their middle."""
    values = [dict(line.points) for line in lines]
    xs = sorted(set().union(*values))
    xs = xs[:: -math.ceil(len(xs) / MAX_HOVERS)][::-1]  # the last is always among them
    places = [across(x) for x in xs]
    edges = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    starts, ends = [across.start, *edges], [*edges, across.end]
    for x, start, end in zip(xs, starts, ends, strict=True):
        known = zip(lines, values, strict=True)
        texts = [f"{line.label}: {number(value[x])}" for line, value in known if x in value]
        about = escape("\n".join([f"{x_label} {number(x)}", *texts]))
        box = f'x="{start:.1f}" width="{max(end - start, 0):.1f}" y="{TOP}"'
        height = HEIGHT - TOP - BOTTOM
        yield f'<rect class="hover" {box} height="{height}"><title>{about}</title></rect>'
