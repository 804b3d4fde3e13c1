"""Did it get better? The base model beside the trained one, set by set and query by query."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from embedtune.data.beir import RetrievalSet
from embedtune.evaluation import intervals
from embedtune.evaluation.intervals import Interval, outcome
from embedtune.evaluation.metrics import ndcg

OUTCOMES = (*intervals.OUTCOMES, "not compared", "not measured", "no verdict")

MAX_QUERIES = 6  # that rose most, and as many that fell most


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


class Change(NamedTuple):
    """One metric of the base model and of the trained one, None where it is not known.

    Attributes:
        is_score: Whether more is better; of a loss, which is none of the aims, nothing is said.
        interval: In which the difference lies, see ``evaluation.intervals``; None: not known.
    """

    base: float | None
    trained: float | None
    is_score: bool
    interval: Interval | None = None

    @property
    def difference(self) -> float | None:
        """Trained minus base."""
        return None if self.base is None or self.trained is None else self.trained - self.base

    @property
    def outcome(self) -> str:
        """One of :data:`OUTCOMES`."""
        if self.trained is None:
            return "not measured"
        if self.difference is None or math.isnan(self.difference):
            return "not compared"
        return outcome(self.interval) if self.is_score else "no verdict"


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
    """What became of the queries of a set: how many rose, fell and stayed, and the extremes."""

    counts: dict[str, int]
    rose: list[QueryChange]
    fell: list[QueryChange]


def compare_queries(comparison: Comparison) -> Queries:
    """Compare what both models find for each query."""
    relevant = comparison.data.relevant
    scores = torch.stack([ndcg(comparison.base, relevant), ndcg(comparison.trained, relevant)])
    difference = scores[1] - scores[0]
    order = difference.argsort(descending=True, stable=True).tolist()
    rose = [row for row in order if difference[row] > 0]
    fell = [row for row in reversed(order) if difference[row] < 0]
    described = (
        [_describe_query(comparison, row, scores[:, row].tolist()) for row in rows[:MAX_QUERIES]]
        for rows in (rose, fell)
    )
    counts = {"rose": len(rose), "fell": len(fell), "stayed": len(order) - len(rose) - len(fell)}
    return Queries(counts, *described)


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
