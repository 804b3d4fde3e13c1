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
    """

    data: dict[str, Any]
    configuration: dict[str, Any]
    mrl_dims: list[int] | None
    step: int | None
    epoch: int | None
    base_metrics: dict[str, float]
    metrics: dict[str, float]


NOTHING_KNOWN = TrainingFacts({}, {}, None, None, None, {}, {})
