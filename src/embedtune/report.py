"""Write ``report.html``: whether the model got better, where, and how training went.

The page is one file that loads nothing. What it says is computed here; how it says it is in
``report.html.jinja``.
"""

import csv
import importlib.resources
import itertools
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor

from embedtune.chart import Axis, Curve, Panel, number, step_panels, width_panels
from embedtune.metrics import DEPTH, RETRIEVAL_METRICS, ndcg
from embedtune.testsets import RetrievalSet

SCORES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "map@100": "MAP@100",
    "recall@100": "Recall@100",
    "spearman": "Spearman",
}
"""Metrics of which more is better, the one that sums up a set first, and how people write them."""
OUTCOMES = ("better", "worse", "no clear change", "not compared")
ALL_WIDTHS = 0
"""Stands for the width of a loss that is the mean over several widths."""

MAX_QUERIES = 6  # that rose most, and as many that fell most

QUANTITIES = {
    "lr": ("learning rate", 1, Axis("learning rate", include=[0])),
    "examples_per_s": ("examples a second", 1, Axis("examples/s", include=[0])),
    "padding_efficiency": ("padding efficiency", 100, Axis("% of the tokens", include=[0, 100])),
    "input_wait": ("input wait", 100, Axis("% of the time", include=[0, 100])),
}
"""Title, scale and axis of what is logged beside the loss."""

ByWidth = Mapping[str, Mapping[int, Any]]  # values or curves by metric and width


class Comparison(NamedTuple):
    """One retrieval test set, before and after.

    Attributes:
        name: The ``<set>`` of its metrics.
        data: Its texts.
        base: int64 ``[q, k]``: for each query the rows of the documents that the base model finds,
            best first, -1 for none.
        trained: The same of the trained model.
    """

    name: str
    data: RetrievalSet
    base: Tensor
    trained: Tensor


def write_report(
    folder: Path,
    *,
    facts: Mapping[str, str],
    base: Mapping[str, float],
    trained: Mapping[str, float],
    width: int,
    model_note: str,
    comparisons: Sequence[Comparison],
) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        folder: The run folder; of its ``config.yaml`` and ``metrics*.csv`` is shown what is there.
        facts: What the run understood, a text a label.
        base: The base model's metrics, ``val/<set>/<metric>`` at its full width and
            ``val/<set>/<metric>/<width>``; some or all may be missing.
        trained: The same of the model in ``folder/model``.
        width: Full width of the trained model.
        model_note: A sentence that tells which model that is.
        comparisons: What both find in the retrieval test sets.
    """
    curves, config = read_curves(folder), folder / "config.yaml"
    before, after, over_steps = (arrange(m, width) for m in (base, trained, curves))
    queries = {comparison.name: compare_queries(comparison) for comparison in comparisons}
    sets = [
        SetReport(name, before[name], metrics, over_steps[name], queries.get(name))
        for name, metrics in after.items()
    ]
    text = (importlib.resources.files("embedtune") / "report.html.jinja").read_text("utf-8")
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined, **blocks)
    page = template.render(
        folder=folder.as_posix(),
        model=(folder / "model").as_posix(),
        verdict=verdict({s.name: s.change.outcome for s in sets}) if sets else None,
        model_note=model_note,
        sets=sets,
        names=SCORES,
        depth=DEPTH,
        widths=sorted({w for s in sets for w in s.widths if w != ALL_WIDTHS}, reverse=True),
        training=training_panels(curves),
        speed=quantity_panels(curves, "examples_per_s", "padding_efficiency", "input_wait"),
        facts=facts,
        config=config.read_text("utf-8") if config.is_file() else None,
        number=number,
        quote=shlex.quote,
    )
    part, path = folder / "report.html.part", folder / "report.html"
    part.write_text(page, encoding="utf-8")
    part.replace(path)  # at once, for a browser may open it
    return path


# --- What was measured ----------------------------------------------------------------------------


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
        metrics: By names as ``val/<set>/<metric>/<width>``; other names are left out.
        width: The full width, that of a name without one. But a loss that is also known by width
            is their mean there, and has :data:`ALL_WIDTHS`.
    """
    sets: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in metrics.items():
        kind, *parts = name.split("/")
        if kind == "val" and len(parts) in (2, 3):
            by_width = sets[parts[0]][parts[1]]
            is_mean = parts[1] not in SCORES and any(m.startswith(f"{name}/") for m in metrics)
            if len(parts) == 2:
                by_width[ALL_WIDTHS if is_mean else width] = value
            else:
                by_width.setdefault(int(parts[2]), value)
    order = [*SCORES, "loss", *(metric for by_metric in sets.values() for metric in by_metric)]
    for name, by_metric in sets.items():
        shown = sorted(by_metric, key=order.index)
        sets[name] = {m: dict(sorted(by_metric[m].items(), reverse=True)) for m in shown}
    return sets


# --- Did it get better? ---------------------------------------------------------------------------


class Change(NamedTuple):
    """One metric of the base model and of the trained one, None where it is not known.

    Attributes:
        is_score: Whether more is better.
        interval: In which the difference lies with 95 % confidence, where that is known.
    """

    base: float | None
    trained: float | None
    is_score: bool
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float | None:
        """Trained minus base."""
        return None if self.base is None or self.trained is None else self.trained - self.base

    @property
    def outcome(self) -> str:
        """One of :data:`OUTCOMES`: of the interval, else of the difference to three decimals."""
        if self.difference is None or math.isnan(self.difference):
            return "not compared"
        low, high = self.interval or (round(self.difference, 3),) * 2
        if low <= 0 <= high:
            return "no clear change"
        return "better" if (low > 0) == self.is_score else "worse"


def verdict(outcomes: Mapping[str, str]) -> str:
    """Return a phrase on the outcomes of one set or more.

    >>> verdict({"a": "better", "b": "worse", "c": "better"}), verdict({"a": "no clear change"})
    ('Better on 2, worse on 1 of 3 sets', 'No clear change on a')
    """
    total, counts = len(outcomes), Counter(outcomes.values())
    words = sorted(counts, key=OUTCOMES.index)
    if words == ["not compared"]:
        return "No base model to compare with"
    if len(words) > 1:
        text = ", ".join(f"{word} on {counts[word]}" for word in words) + f" of {total} sets"
    else:
        where = {1: "".join(outcomes), 2: "both sets"}.get(total, f"all {total} sets")
        text = f"{words[0]} on {where}"
    return text[0].upper() + text[1:]


class QueryChange(NamedTuple):
    """What became of one query; of each pair the base model's comes first.

    Attributes:
        scores: Its nDCG@10.
        ranks: Ids of its relevant documents and their ranks, None where it was not found.
        tops: The first document, and whether it is relevant.
    """

    query: str
    scores: list[float]
    ranks: list[tuple[str, list[int | None]]]
    tops: list[tuple[str, bool]]


class Queries(NamedTuple):
    """What became of the queries of a set: how many rose, fell and stayed, and the extremes.

    ``interval`` is that in which the mean difference of nDCG@10 lies with 95 % confidence.
    """

    interval: tuple[float, float] | None
    counts: dict[str, int]
    rose: list[QueryChange]
    fell: list[QueryChange]


def compare_queries(comparison: Comparison) -> Queries:
    """Compare what both models find for each query."""
    relevant = comparison.data.relevant
    scores = torch.stack([ndcg(comparison.base, relevant), ndcg(comparison.trained, relevant)])
    difference, interval = scores[1] - scores[0], None
    if len(difference) > 1:
        mean, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
        interval = (mean - 1.96 * error, mean + 1.96 * error)
    order = difference.argsort(descending=True, stable=True).tolist()
    rose = [row for row in order if difference[row] > 0]
    fell = [row for row in reversed(order) if difference[row] < 0]
    described = (
        [_describe_query(comparison, row, scores[:, row].tolist()) for row in rows[:MAX_QUERIES]]
        for rows in (rose, fell)
    )
    counts = {"rose": len(rose), "fell": len(fell), "stayed": len(order) - len(rose) - len(fell)}
    return Queries(interval, counts, *described)


def _describe_query(comparison: Comparison, row: int, scores: list[float]) -> QueryChange:
    data, relevant = comparison.data, comparison.data.relevant[row]
    found = [rows[row].tolist() for rows in (comparison.base, comparison.trained)]
    ranks = [
        (data.document_ids[d], [rows.index(d) + 1 if d in rows else None for rows in found])
        for d in relevant
    ]
    ranks.sort(key=lambda item: min(rank or math.inf for rank in item[1]))
    tops = [(data.corpus[d] if d >= 0 else "", d in relevant) for d, *_ in found]
    return QueryChange(data.queries[row], scores, ranks, tops)


# --- What is drawn --------------------------------------------------------------------------------


class SetReport(NamedTuple):
    """All about one set; the base model's metrics, curves and queries may be missing."""

    name: str
    base: ByWidth
    trained: ByWidth
    curves: ByWidth
    queries: Queries | None

    @property
    def widths(self) -> list[int]:
        """All at which something was measured, the widest first."""
        return sorted(set().union(*self.trained.values()), reverse=True)

    def at(self, metric: str, width: int) -> Change:
        """Return what became of a metric at a width."""
        base, trained = (m.get(metric, {}).get(width) for m in (self.base, self.trained))
        is_compared = (metric, width) == (RETRIEVAL_METRICS[0], self.widths[0])
        interval = self.queries.interval if self.queries and is_compared else None
        return Change(base, trained, metric in SCORES, interval)

    @property
    def main(self) -> str:
        """The metric that sums the set up."""
        return next(iter(self.trained))

    @property
    def change(self) -> Change:
        """What became of that, at full width."""
        widths = self.trained[self.main]
        return self.at(self.main, ALL_WIDTHS if ALL_WIDTHS in widths else max(widths))

    @property
    def panels(self) -> list[Panel]:
        """That over the steps, and by width where there are several."""
        y = Axis(SCORES.get(self.main, self.main))
        base, curves = self.base.get(self.main, {}), self.curves.get(self.main, {})
        start = {width: {0: value} for width, value in base.items()}
        over_steps = {str(w or "all"): start.get(w, {}) | curve for w, curve in curves.items()}
        by_width = {"base": base, "trained": self.trained[self.main]}
        return step_panels("over the steps", y, over_steps) + width_panels("by width", y, by_width)


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
