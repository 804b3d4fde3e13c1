"""How much of a global batch a loss sees, where several ranks share it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embedtune.distributed import exchange
from embedtune.losses.inputs import Embeddings, Target

Scope = Literal["rank", "documents", "global"]
"""How much of a global batch a loss sees, where several ranks share it.

``global``: every rank's queries and documents, so that every rank computes the loss that one
process would; ``documents``: this rank's queries, with the scores of their own lists, and every
rank's documents; ``rank``: this rank's alone. A loss of the last two is a mean over queries.
"""
Over = Literal["rank", "global"]
"""Which of these a user may choose."""


class Shares(NamedTuple):
    """What each rank holds of a global batch: a list with a number per rank each.

    Attributes:
        queries, positives, negatives: Rows of each kind; 0 for a spare share (see
            :class:`~embedtune.data.sampler.Key`).
        known_positives: Width ``p`` of ``known_positive_id``.
        chunks: Chunks to encode.
    """

    queries: list[int]
    positives: list[int]
    negatives: list[int]
    known_positives: list[int]
    chunks: list[int]

    @classmethod
    def exchange(cls, own: Sequence[int], device: torch.device) -> "Shares":
        """Tell every rank this rank's numbers, in the order of the attributes."""
        by_rank = exchange.gather_counts(own, device)
        return cls(*(list(column) for column in zip(*by_rank, strict=True)))

    @property
    def weight(self) -> float:
        """Weight of this rank's mean over its queries in the average over ranks."""
        return len(self.queries) * self.queries[exchange.rank()] / sum(self.queries)


def in_scope(
    scope: Scope, embeddings: Embeddings, target: Target, shares: Shares
) -> tuple[Embeddings, Target]:
    """Return what a loss of ``scope`` sees, from what this rank holds."""
    if scope == "rank" or len(shares.queries) == 1:
        return embeddings, target
    rank = exchange.rank()
    queries_before = sum(shares.queries[:rank])
    # A spare query has weight 0: any positive will do for its own.
    positives_before = sum(shares.positives[:rank]) if shares.queries[rank] else 0
    own = None if target.own is None else target.own + positives_before
    embeddings = embeddings._replace(
        positive=_all(embeddings.positive, shares.positives),
        negative=_all(embeddings.negative, shares.negatives),
    )
    target = target._replace(
        own=own,
        positive_id=_all(target.positive_id, shares.positives),
        negative_id=_all(target.negative_id, shares.negatives),
        positive_query_id=_all(target.positive_query_id, shares.positives),
    )
    if scope == "documents":
        return embeddings, target
    list_index = None if target.list_index is None else target.list_index + queries_before
    known = target.known_positive_id
    if known is not None:
        known = torch.nn.functional.pad(known, (0, max(shares.known_positives) - known.shape[1]))
    query = exchange.gather_rows(embeddings.query[: shares.queries[rank]], shares.queries)
    return embeddings._replace(query=query), target._replace(
        own=_all(own, shares.queries),
        scores=_all(target.scores, shares.positives),
        list_index=_all(list_index, shares.positives),
        teacher=_all(target.teacher, shares.queries),
        query_id=_all(target.query_id, shares.queries),
        known_positive_id=_all(known, shares.queries),
        query_text_id=_all(target.query_text_id, shares.queries),
    )


def _all(rows: Tensor | None, sizes: list[int]) -> Tensor | None:
    if rows is None:
        return None
    return exchange.gather_rows(rows[: sizes[exchange.rank()]], sizes)
