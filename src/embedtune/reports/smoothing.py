"""Long lines made fit to draw: running means, and no more points than a chart has pixels."""

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]

MAX_POINTS = 500  # of a line over the steps: more than it has pixels


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
