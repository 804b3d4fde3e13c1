"""Metrics of retrieval, as trec_eval defines them, and of similarity, as pure functions.

Axes: ``q`` queries, ``k`` documents found for each, best first, ``n`` pairs. ``found`` holds the
numbers of documents in the corpus, and -1 where fewer than ``k`` were found. ``relevant`` holds for
each query the numbers of its relevant documents and their grades, 1 and above; of those that no
corpus holds, too. A query without any has 0.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEPTH = 100
"""Documents to find for each query: as many as the deepest measure looks at."""
RETRIEVAL_METRICS = ("ndcg@10", "mrr@10", "map@100", "recall@100")
TITLES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "map@100": "MAP@100",
    "recall@100": "Recall@100",
    "spearman": "Spearman",
}
"""All metrics, the one that sums up a set first, and how people write them; more is better."""


def retrieval_metrics(
    found: Int[Tensor, "q k"], relevant: Sequence[Mapping[int, int]]
) -> dict[str, float]:
    """Return each of :data:`RETRIEVAL_METRICS`, the mean of :func:`per_query`.

    >>> metrics = retrieval_metrics(torch.tensor([[7, 3, -1]]), [{3: 1, 5: 2}])
    >>> metrics["mrr@10"], metrics["map@100"], metrics["recall@100"]
    (0.5, 0.25, 0.5)
    """
    return {name: values.mean().item() for name, values in per_query(found, relevant).items()}


def per_query(
    found: Int[Tensor, "q k"], relevant: Sequence[Mapping[int, int]]
) -> dict[str, Float[Tensor, " q"]]:
    """Return each of :data:`RETRIEVAL_METRICS` of each query, float64.

    ``ndcg@10`` is graded, see :func:`ndcg`. For the others a document is relevant or not:
    ``mrr@10`` is one over the rank of the first relevant document, 0 if that is below 10;
    ``map@100`` sums the precision at the rank of each relevant document found and divides by the
    number of relevant documents; ``recall@100`` is the share of the relevant documents found.
    """
    hits = (_gains(found[:, :DEPTH], relevant) > 0).double()
    totals = torch.tensor([len(grades) for grades in relevant]).clamp_min(1)
    ranks = torch.arange(1, hits.shape[1] + 1)
    # The first hit is the one up to which there is exactly one.
    first = hits * (hits.cumsum(dim=1) == 1) / ranks
    precision = hits.cumsum(dim=1) / ranks
    return {
        "ndcg@10": ndcg(found, relevant, k=10),
        "mrr@10": first[:, :10].sum(dim=1),
        "map@100": (precision * hits).sum(dim=1) / totals,
        "recall@100": hits.sum(dim=1) / totals,
    }


def ndcg(
    found: Int[Tensor, "q k"], relevant: Sequence[Mapping[int, int]], k: int = 10
) -> Float[Tensor, " q"]:
    """Return the normalised discounted cumulative gain of each query's first ``k`` documents.

    Järvelin & Kekäläinen 2002 as trec_eval has it: the gain is the grade itself, the discount
    log2(rank + 1). A query without relevant documents has 0.

    Returns:
        float64, between 0 and 1.

    >>> ndcg(torch.tensor([[4, 9], [9, 4], [-1, -1]]), [{4: 1}] * 3).tolist()
    [1.0, 0.6309297535714575, 0.0]
    """
    gains = _gains(found[:, :k], relevant)
    best = [sorted(grades.values(), reverse=True)[:k] for grades in relevant]
    ideal = torch.tensor([row + [0] * (k - len(row)) for row in best]).double().view(-1, k)
    discounts = torch.arange(2, k + 2).double().log2()
    reached = (gains / discounts[: gains.shape[1]]).sum(dim=1)
    reachable = (ideal / discounts).sum(dim=1)
    return torch.where(reachable > 0, reached / reachable, 0.0)


def _gains(
    found: Int[Tensor, "q k"], relevant: Sequence[Mapping[int, int]]
) -> Float[Tensor, "q k"]:
    """Return the grade of each document found, 0 for one that is not relevant."""
    pairs = zip(found.tolist(), relevant, strict=True)
    gains = [[grades.get(row, 0) for row in rows] for rows, grades in pairs]
    return torch.tensor(gains, dtype=torch.float64).view(found.shape)


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Return Spearman's rank correlation (1904) in float64; tied values share their mean rank.

    Where ``x`` or ``y`` is constant, and of fewer than two pairs, it is 0: there is no order to
    agree with. Where a value is NaN, it is NaN.

    >>> spearman(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    >>> spearman(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0]))
    0.0
    """
    if x.isnan().any() or y.isnan().any():
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (_mean_ranks(x), _mean_ranks(y)))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return ((a * b).sum() / scale).item() if scale > 0 else 0.0


def _mean_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return ranks from 1 in float64, equal values at the mean of theirs."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    return (sizes.cumsum(dim=0) - (sizes - 1) / 2).double()[group]
