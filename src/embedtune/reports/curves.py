"""What a run folder's metrics.csv tells, sorted by set, metric and width."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedtune.evaluation.metrics import TITLES

ALL_WIDTHS = 0
"""Stands for the width of a loss that is the mean over several widths."""

ByWidth = Mapping[str, Mapping[int, Any]]  # values or curves by metric and width


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the columns of a run folder's ``metrics.csv``: values by how many steps were done.

    Of an earlier run's ``metrics-N.csv`` the steps count that lie before the first of every later
    run: they led to where that one went on.
    """
    earlier = sorted(folder.glob("metrics-*.csv"), key=lambda p: int(p.stem.partition("-")[2]))
    rows: list[dict[str, str]] = []
    for path in (*earlier, folder / "metrics.csv"):
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        # A run that was killed may leave a part of a line.
        new = list(csv.DictReader(line for line in lines if line.endswith("\n")))
        first = min((int(row["step"]) for row in new), default=math.inf)
        rows = [row for row in rows if int(row["step"]) < first] + new
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        # Lightning counts a step before it is done. The base model's row has no epoch.
        done = int(row.pop("step")) + bool(row.pop("epoch"))
        for name, value in row.items():
            if value:
                curves.setdefault(name, {})[done] = float(value)
    return curves


def arrange(metrics: Mapping[str, Any], width: int) -> dict[str, dict[str, dict[int, Any]]]:
    """Sort metrics by set, metric (the main one first) and width (the widest first).

    Args:
        metrics: By names as ``val/<set>/<metric>/<width>``, or ``test/..``; others are left out.
        width: The full width, that of a name without one. But a loss that is also known by width
            is their mean there, and has :data:`ALL_WIDTHS`.
    """
    sets: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in metrics.items():
        kind, *parts = name.split("/")
        if kind in ("val", "test") and len(parts) in (2, 3):
            by_width = sets[parts[0]][parts[1]]
            is_mean = parts[1] not in TITLES and any(m.startswith(f"{name}/") for m in metrics)
            if len(parts) == 2:
                by_width[ALL_WIDTHS if is_mean else width] = value
            else:
                by_width.setdefault(int(parts[2]), value)
    order = [*TITLES, "loss", *(metric for by_metric in sets.values() for metric in by_metric)]
    for name, by_metric in sets.items():
        shown = sorted(by_metric, key=order.index)
        sets[name] = {m: dict(sorted(by_metric[m].items(), reverse=True)) for m in shown}
    return sets
