"""Line charts as inline SVG: pure functions of numbers, coloured by the page that holds them.

Lengths are SVG units, about a pixel each where a chart is as wide as a phone or a third of a page.
The page styles the classes ``chart``, ``grid``, ``tick``, ``axis``, ``line``, ``dot``, ``label``,
``hover``, and those of a :class:`Line`, which are ``s0`` to ``s5`` and ``pale`` over the steps.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

Point = tuple[float, float]

WIDTH, HEIGHT = 340, 220
TOP, BOTTOM = 26, 36
CHARACTER, BOLD = 6.6, 7.7  # a wide font's digits at the page's 11 px
LINE_HEIGHT = 12
MAX_DOTS = 16  # a line of more points is drawn without dots
MAX_HOVERS = 60
MAX_POINTS = 500  # of a line over the steps: more than it has pixels
MIN_SMOOTHED = 20  # points; a shorter line is shown as it is
COLOURS = 6

Curve = Mapping[int, float]
"""Values by how many steps were done, ascending."""


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


class Panel(NamedTuple):
    """A chart with its title, and what its lines do not tell."""

    title: str
    note: str
    svg: str


# --- Numbers --------------------------------------------------------------------------------------


def number(value: float, decimals: int | None = None, sign: bool = False) -> str:
    """Return ``value`` as text without a leading zero; by default to four digits.

    >>> number(0.6449, 3), number(12345.6), number(2e-5), number(0.05, 2, sign=True)
    ('.645', '12,346', '2e-5', '+.05')
    """
    if decimals is not None:
        text = f"{abs(value):,.{decimals}f}"
    elif 1000 <= abs(value) < 1e9:
        text = f"{abs(value):,.0f}"
    else:
        text = re.sub(r"e([+-])0*", lambda e: "e" + e[1].strip("+"), f"{abs(value):.4g}")
    if not re.search("[1-9a-z]", text):  # what rounds to zero has no sign
        value = 0.0
    before = "\N{MINUS SIGN}" if value < 0 else "+" if sign and value > 0 else ""
    return before + text.removeprefix("0" if text.startswith("0.") else "")


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return ascending multiples of 1, 2 or 5 times a power of ten that enclose both values.

    Args:
        low: The smallest value.
        high: The largest; where it is hardly larger, room is made around both.
        most: Of the intervals between the values.

    >>> nice_ticks(0.612, 0.7)
    [0.6, 0.62, 0.64, 0.66, 0.68, 0.7]
    """
    if high - low <= abs(high) / 1000:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most * 1.0001)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the texts of evenly spaced ticks, all with as many decimals as they need.

    >>> tick_labels([0.0, 0.5, 1.0]), tick_labels([0.0, 1e-5, 2e-5])
    (['0', '.5', '1.0'], ['0', '1e-5', '2e-5'])
    """
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    shown = decimals if 0 < decimals <= 4 else None
    return [number(tick, shown) if tick else "0" for tick in ticks]


# --- Long lines -----------------------------------------------------------------------------------


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Return each point's mean with up to ``reach`` neighbours on either side.

    >>> smooth([(0, 1), (1, 2), (2, 6)], 1)
    [(0, 1.5), (1, 3.0), (2, 4.0)]
    """
    totals = np.cumsum([0.0, *(y for _, y in points)])
    middle = np.arange(len(points))
    start, stop = (middle - reach).clip(0), (middle + reach + 1).clip(max=len(points))
    means = (totals[stop] - totals[start]) / (stop - start)
    return [(x, mean) for (x, _), mean in zip(points, means.tolist(), strict=True)]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return at most ``most`` points: the means of equal runs of the points, where they are more.

    >>> thin([(0, 1), (1, 3), (2, 5), (3, 7)], 2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = (np.asarray(points[i : i + size]) for i in range(0, len(points), size))
    return [(float(x), float(y)) for x, y in (run.mean(axis=0) for run in runs)]


# --- Drawing --------------------------------------------------------------------------------------


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


def step_panels(
    title: str, y: Axis, curves: Mapping[str, Curve], is_noisy: bool = False
) -> list[Panel]:
    """Return a panel of curves over the steps, none where they have no finite value.

    Args:
        title: What they show.
        y: What they measure.
        curves: By name; the names of several are written at their ends.
        is_noisy: Whether running means are drawn; that of a single curve lies over its values.
    """
    lines: list[Line] = []
    notes: dict[str, None] = {}  # a set that keeps its order
    for i, (name, curve) in enumerate(curves.items()):
        points: Sequence[Point] = [point for point in curve.items() if math.isfinite(point[1])]
        if len(points) < len(curve):
            notes[f"{name}: {len(curve) - len(points):,} not finite"] = None
        if is_noisy and len(points) >= MIN_SMOOTHED:
            reach = len(points) // 40 + 1
            notes[f"running mean of {2 * reach + 1:,} values"] = None
            if len(curves) == 1:
                lines.append(Line(f"{name}, unsmoothed", thin(points), "pale", at_end=False))
            points = smooth(points, reach)
        if len(points) > MAX_POINTS:
            notes[f"thinned to {len(thin(points))} points"] = None
        lines.append(Line(name, thin(points), f"s{i % COLOURS}", at_end=len(curves) > 1))
    if not any(line.points for line in lines):
        return []
    svg = line_chart(lines, title=title, x=Axis("step", include=[0]), y=y)
    return [Panel(title, ", ".join(notes), svg)]


def width_panels(title: str, y: Axis, values: Mapping[str, Mapping[int, float]]) -> list[Panel]:
    """Return a panel of values by width, 0 for none; no panel without two widths to compare.

    The name of each line is also its style.
    """
    points = {name: [(w, v[w]) for w in sorted(v) if w] for name, v in values.items()}
    if len(set().union(*values.values()) - {0}) < 2:
        return []
    lines = [Line(name, line, name) for name, line in points.items()]
    svg = line_chart(lines, title=title, x=Axis("dimensions", log2=True), y=y)
    return [Panel(title, "", svg)]


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
