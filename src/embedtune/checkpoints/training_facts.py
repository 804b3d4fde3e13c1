"""What a fit tells of itself, kept beside the weights."""

from typing import Any, NamedTuple


class TrainingFacts(NamedTuple):
    """What a fit tells of itself in a card: plain values, which a checkpoint and JSON can hold.

    Attributes:
        data: ``files`` (names without folders), ``format``, ``rows``, ``examples`` (of an epoch),
            ``negatives`` (hard ones a query), ``teacher_width``, ``query_prompt`` (that all rows
            share), ``query_max_len`` and ``passage_max_len`` (in tokens); None where there is none.
        configuration: Settings by the label that the card gives them, in its order.
        mrl_dims: The trained widths; None without Matryoshka.
        step: Optimiser steps of these weights.
        epoch: The epoch that they were in, counted from 1.
        base_metrics: ``val/<set>/<metric>`` and ``val/<set>/<metric>/<width>`` of the model that
            training started from.
        metrics: The same of these weights.
        intervals: By such a name, the ends of the interval in which the difference lies from the
            base model's, as far as known; None of a fit that kept none.
        monitor: The metric that tells which checkpoint of the fit is the best, if one does.
    """

    data: dict[str, Any]
    configuration: dict[str, Any]
    mrl_dims: list[int] | None
    step: int | None
    epoch: int | None
    base_metrics: dict[str, float]
    metrics: dict[str, float]
    intervals: dict[str, list[float]] | None = None
    monitor: str | None = None


NOTHING_KNOWN = TrainingFacts({}, {}, None, None, None, {}, {})
