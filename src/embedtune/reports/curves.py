"""What a run folder's metrics.csv tells, sorted by set, metric and width."""

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from embedtune.evaluation.metric_name import parse_name
from embedtune.evaluation.metrics import TITLES

ALL_WIDTHS = 0
"""Stands for the width of a loss that is the mean over several widths."""
WHOLE = sys.maxsize
"""Stands for the full widths of two models, where that of the base model is the larger one."""

ByWidth = Mapping[str, Mapping[int, Any]]  # values or curves by metric and width


class Row(NamedTuple):
    """A row of ``metrics.csv``: what was logged at a step, which Lightning counts from 0."""

    step: int
    values: dict[str, float]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a ``metrics.csv``, of one that is not there none."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    # A run that was killed may leave a part of a line.
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [
        Row(int(row.pop("step")), {name: float(value) for name, value in row.items() if value})
        for row in rows
    ]


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the columns of a run folder's ``metrics.csv``: values by how many steps were done."""
    curves: dict[str, dict[int, float]] = {}
    for row in read_rows(folder / "metrics.csv"):
        # A step is counted before it is done. The base model's row has no epoch.
        done = row.step + ("epoch" in row.values)
        for name, value in row.values.items():
            if name != "epoch":
                curves.setdefault(name, {})[done] = value
    return curves


def last_validation(curves: Mapping[str, Mapping[int, float]]) -> int:
    """Return the last step after which curves have a value of ``data.val_path``, 0 for none."""
    validated = [curve for name, curve in curves.items() if name.startswith("val/")]
    return max((step for curve in validated for step in curve), default=0)


def width_name(width: int) -> str:
    """Return how a width is called.

    >>> width_name(32), width_name(ALL_WIDTHS), width_name(WHOLE)
    ('32', 'all', 'full')
    """
    return {ALL_WIDTHS: "all", WHOLE: "full"}.get(width, str(width))


def arrange(metrics: Mapping[str, Any], width: int) -> dict[str, dict[str, dict[int, Any]]]:
    """Sort metrics by set, metric (the main one first) and width (the widest first).

    Args:
        metrics: By names as ``val/<set>/<metric>/<width>``, or ``test/..``; others are left out.
        width: The full width, that of a name without one. But a loss that is also known by width
            is their mean there, and has :data:`ALL_WIDTHS`.
    """
    sets: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in metrics.items():
        parsed = parse_name(name)
        if parsed is None:
            continue
        by_width = sets[parsed.dataset][parsed.metric]
        if parsed.width is None:
            is_mean = parsed.is_loss and any(m.startswith(f"{name}/") for m in metrics)
            by_width[ALL_WIDTHS if is_mean else width] = value
        else:
            by_width.setdefault(parsed.width, value)
    order = [*TITLES, "loss", *(metric for by_metric in sets.values() for metric in by_metric)]
    for name, by_metric in sets.items():
        shown = sorted(by_metric, key=order.index)
        sets[name] = {m: dict(sorted(by_metric[m].items(), reverse=True)) for m in shown}
    return sets
