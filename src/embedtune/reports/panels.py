"""Charts with a title: curves over the steps, values by width."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedtune.reports.chart import Axis, Line, line_chart
from embedtune.reports.smoothing import MAX_POINTS, Point, smooth, thin

MIN_SMOOTHED = 20  # points; a shorter line is shown as it is
COLOURS = 6

Curve = Mapping[int, float]
"""Values by how many steps were done, ascending."""


class Panel(NamedTuple):
    """A chart with its title, and what its lines do not tell."""

    title: str
    note: str
    svg: str


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


QUANTITIES = {
    "lr": ("learning rate", 1, Axis("learning rate", include=[0])),
    "examples_per_s": ("examples a second", 1, Axis("examples/s", include=[0])),
    "padding_efficiency": ("padding efficiency", 100, Axis("% of the tokens", include=[0, 100])),
    "input_wait": ("input wait", 100, Axis("% of the time", include=[0, 100])),
}
"""Title, scale and axis of what is logged beside the loss."""


def training_panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """Draw the loss, its parts and the learning rate."""
    groups: dict[str, dict[str, Curve]] = {"loss": {}, "loss by width": {}}
    for column in sorted(
        curves, key=lambda c: [-int(p) if p.isdigit() else 0 for p in c.split("/")]
    ):
        kind, *parts = column.split("/")
        if kind == "train" and parts[0] not in QUANTITIES:
            title = f"{parts[0]} by width" if len(parts) > 1 else parts[0]
            groups.setdefault(title, {})[parts[-1]] = curves[column]
    panels = [step_panels(t, Axis(t.split()[0]), lines, True) for t, lines in groups.items()]
    return [*itertools.chain(*panels), *quantity_panels(curves, "lr")]


def quantity_panels(curves: Mapping[str, Curve], *names: str) -> list[Panel]:
    """Draw some of :data:`QUANTITIES`."""
    panels = []
    for name in names:
        title, scale, axis = QUANTITIES[name]
        curve = curves.get(f"train/{name}", curves.get(name, {}))
        panels += step_panels(title, axis, {title: {s: scale * v for s, v in curve.items()}})
    return panels
