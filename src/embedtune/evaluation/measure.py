"""Measure embeddings on a test set, at several widths."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtune.data.beir import RetrievalSet
from embedtune.data.scored_pairs import ScoredPairs
from embedtune.evaluation.intervals import PerQuery
from embedtune.evaluation.metrics import DEPTH, RETRIEVAL_METRICS, per_query, spearman
from embedtune.evaluation.search import merge, search
from embedtune.evaluation.similarity import pairwise_similarities


class Measured(NamedTuple):
    """What one model reaches on one test set.

    Attributes:
        metrics: By name, such as ``ndcg@10``, and at a smaller width ``ndcg@10/128``.
        found: For each query the rows of the documents that it finds, best first, int64
            ``[q, DEPTH]``; None for scored pairs.
        per_query: What the metrics sum up, for another model's to be compared with.
    """

    metrics: dict[str, float]
    found: Tensor | None
    per_query: PerQuery


def metric_names(testset: RetrievalSet | ScoredPairs, widths: Sequence[int]) -> list[str]:
    """Return the names of the metrics of a test set.

    >>> metric_names(ScoredPairs([], [], []), [16, 8])
    ['spearman', 'spearman/16', 'spearman/8']
    """
    names = RETRIEVAL_METRICS if isinstance(testset, RetrievalSet) else ("spearman",)
    return [f"{name}{suffix}" for suffix in ("", *(f"/{w}" for w in widths)) for name in names]


def main_metric(testset: RetrievalSet | ScoredPairs) -> str:
    """Return the metric that sums up a test set."""
    return metric_names(testset, ())[0]


def measure(
    testset: RetrievalSet | ScoredPairs,
    first: Tensor,
    second: Tensor,
    widths: Mapping[str, int],
    device: torch.device,
    rows: Tensor | None = None,
    similarity: str = "cosine",
) -> Measured:
    """Measure embeddings at several widths; of ranks that share the documents all must call it.

    Args:
        testset: What was embedded.
        first: Embeddings of the queries ``[q, d]``, or of the first texts of pairs ``[n, d]``.
        second: Embeddings of the documents, or of the second texts of pairs ``[n, d]``.
        widths: By the suffix that the names of its metrics get.
        device: Where to search.
        rows: int64, which documents of the corpus ``second`` holds; None is all of them.
        similarity: How embeddings compare, by sentence-transformers' names.
    """
    if isinstance(testset, ScoredPairs):
        scores = torch.tensor(testset.scores, dtype=torch.float64)
        named = {
            f"spearman{k}": pairwise_similarities(first[:, :w], second[:, :w], similarity)
            for k, w in widths.items()
        }
        correlations = {name: spearman(c, scores) for name, c in named.items()}
        return Measured(correlations, None, PerQuery(named, scores))
    order = torch.tensor(testset.tie_order, dtype=torch.int64)
    places = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
    own = torch.tensor(testset.own_documents, dtype=torch.int64)
    left_out = torch.where(own >= 0, places[own], -1) if (own >= 0).any() else None
    places = places if rows is None else places[rows]
    by_width: dict[int, Tensor] = {}
    for width in dict.fromkeys(widths.values()):  # the full one is mostly among those asked for
        cut = first[:, :width], second[:, :width]
        found = search(*cut, places, DEPTH, device, left_out, similarity)
        found_places = merge(found, DEPTH).rows.cpu()
        by_width[width] = torch.where(found_places >= 0, order[found_places], -1)
    at = {width: per_query(found, testset.relevant) for width, found in by_width.items()}
    values = {f"{name}{k}": value for k, w in widths.items() for name, value in at[w].items()}
    metrics = {name: value.mean().item() for name, value in values.items()}
    return Measured(metrics, next(iter(by_width.values())), PerQuery(values))
