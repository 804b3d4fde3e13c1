"""In which interval the difference of two models lies: the paired bootstrap.

The queries of a test set, of scored pairs the pairs, are drawn anew with replacement, the same for
both models, and the metric's difference is computed each time; the interval is that of the middle
95 % of these differences (Efron & Tibshirani 1993; paired, on test sets: Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation"; for retrieval: Sakai 2006, "Evaluating
Evaluation Metrics based on the Bootstrap", and 2014, "Statistical Reform in Information
Retrieval?", on intervals in place of p-values; Soboroff 2014, "Computing Confidence Intervals for
Common IR Measures", found that percentile intervals hold what they promise there). Intervals are
not corrected for their number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
"""Of the draws: the same numbers give the same interval, on any rank and again."""
FEWEST = 6
"""Queries below which there is no interval: of five that all rose, a sign test would not yet say at
this confidence that it was no chance, but every draw of them rises."""
DRAWN = 2**18
"""Queries that are drawn at once, at least 4 draws: numbers that a cache holds."""
DIGITS = 12
"""Of an interval's ends: rises and falls that cancel each other, such as 1/2 and 1/3 + 1/6, may
leave 1e-17, from which no verdict may follow."""

OUTCOMES = ("better", "worse", "unclear", "equal")

Interval = tuple[float, float]


class PerQuery(NamedTuple):
    """What the metrics of one model on one test set sum up.

    Attributes:
        values: By the metric's name: its value for each query, float64 ``[n]``; of scored pairs,
            whose metric is Spearman's, the similarity of each pair, float32.
        scores: Of scored pairs their given scores ``[n]``, else None.
    """

    values: Mapping[str, Tensor]
    scores: Tensor | None = None


def outcome(interval: Interval | None) -> str:
    """Return one of :data:`OUTCOMES`: a difference is told only where its interval leaves out 0.

    >>> outcome((0.01, 0.2)), outcome((-0.01, 0.2)), outcome((0.0, 0.0)), outcome(None)
    ('better', 'unclear', 'equal', 'unclear')
    """
    if interval is None:
        return "unclear"
    low, high = interval
    if low == high == 0:
        return "equal"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def decimals(interval: Interval | None, fewest: int) -> int:
    """Return with how many decimals an interval is told: one that leaves out 0 must look so.

    >>> decimals((0.0002, 0.0041), 3), decimals((-0.0002, 0.0041), 3)
    (4, 3)
    """
    if interval is None or outcome(interval) not in ("better", "worse"):
        return fewest
    return max(fewest, -math.floor(math.log10(min(map(abs, interval)))))


def intervals(base: PerQuery, other: PerQuery) -> dict[str, Interval]:
    """Return in which interval each metric's difference lies, ``other`` minus ``base``.

    A metric that is the same in both for every draw has (0, 0), with any number of queries. One
    that only one of them has is left out, and so is one that is not finite or of less than
    :data:`FEWEST` queries.

    Args:
        base: Of the model that is compared with.
        other: Of another, on the same test set.
    """
    names = [name for name in other.values if name in base.values]
    if not names:
        return {}
    first, second = (_stack(side.values, names) for side in (base, other))
    is_finite = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    if base.scores is not None:
        is_finite &= bool(base.scores.isfinite().all())
    first, second = (_dense_ranks(x) if base.scores is not None else x for x in (first, second))
    same = (first == second).all(axis=1)
    found = dict.fromkeys((names[i] for i in np.flatnonzero(is_finite & same)), (0.0, 0.0))
    rows = np.flatnonzero(is_finite & ~same)
    if len(rows) and first.shape[1] >= FEWEST:
        scores = None if base.scores is None else _dense_ranks(base.scores.numpy()[None])
        low, high = _resample(first[rows], second[rows], scores)
        ends = zip(low.tolist(), high.tolist(), strict=True)
        found |= dict(zip((names[row] for row in rows), ends, strict=True))
    return {name: found[name] for name in names if name in found}


def _stack(values: Mapping[str, Tensor], names: Sequence[str]) -> NDArray[np.float64]:
    return torch.stack([values[name] for name in names]).double().numpy()


def _resample(
    first: NDArray[np.float64], second: NDArray[np.float64], scores: NDArray[np.float64] | None
) -> Sequence[NDArray[np.float64]]:
    """Return the ends ``[k]`` of the intervals of ``k`` metrics' differences.

    Args:
        first: Values of the base model ``[k, n]``; of scored pairs their dense ranks.
        second: Those of the other.
        scores: Of scored pairs the dense ranks of the scores ``[1, n]``.
    """
    count = first.shape[1]

    def differences(drawn: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        times = _times(drawn.astype(np.int64).reshape(-1, count))
        if scores is None:
            found = (second - first) @ times / count
        else:
            given = _centred_ranks(scores[0], times)
            found = np.stack([_spearman(row, given, times) for row in second])
            found -= np.stack([_spearman(row, given, times) for row in first])
        return found.reshape(len(first), *drawn.shape[:-1])

    found = bootstrap(
        (np.arange(count),),
        differences,
        n_resamples=RESAMPLES,
        batch=max(4, DRAWN // count),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    ends = found.confidence_interval
    return [np.round(end, DIGITS) + 0.0 for end in (ends.low, ends.high)]  # no -0.0


def _times(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each of ``n`` queries is in each of the draws ``[b, n]``, ``[n, b]``."""
    places = drawn * len(drawn) + np.arange(len(drawn))[:, None]
    return np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.T.shape).astype(float)


def _dense_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each row of ``[k, n]`` the place of a value among its distinct ones, from 0."""
    return np.stack([np.unique(row, return_inverse=True)[1] for row in values]).astype(float)


def _centred_ranks(ranks: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks within each draw less their mean ``[n, b]``; ties share their mean rank.

    Args:
        ranks: Dense ranks of all pairs ``[n]``.
        times: How often each is in each draw ``[n, b]``.
    """
    groups = ranks.astype(np.int64)
    order = groups.argsort(kind="stable")
    last = np.flatnonzero(np.diff(groups[order], append=-1))  # of each group of ties
    ends = times[order].cumsum(axis=0)[last]
    middles = ends.copy()
    middles[1:] += ends[:-1]
    return ((middles - len(times)) / 2)[groups]


def _spearman(
    ranks: NDArray[np.float64], given: NDArray[np.float64], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return Spearman's correlation in each draw ``[b]``, 0 where a side is constant."""
    own = _centred_ranks(ranks, times)
    total = np.einsum("nb,nb,nb->b", own, given, times)
    squares = [np.einsum("nb,nb,nb->b", side, side, times) for side in (own, given)]
    scale = np.sqrt(squares[0] * squares[1])
    return np.divide(total, scale, out=np.zeros_like(total), where=scale > 0)
