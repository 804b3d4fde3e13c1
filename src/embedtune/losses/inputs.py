"""What a loss is given: embeddings, and what they are trained towards."""

from typing import NamedTuple

import torch
from torch import Tensor


class Embeddings(NamedTuple):
    """The embeddings of a batch, float32, not normalised.

    Attributes:
        query: ``[b, d]``.
        positive: ``[m, d]``: one per query (pair, triplet), or list after list (scored).
        negative: ``[b * k, d]``: the hard negatives, query by query (triplet).
    """

    query: Tensor
    positive: Tensor | None = None
    negative: Tensor | None = None

    def cut(self, width: int) -> "Embeddings":
        """Return the first ``width`` columns of each."""
        return Embeddings(
            self.query[:, :width],
            None if self.positive is None else self.positive[:, :width],
            None if self.negative is None else self.negative[:, :width],
        )


class Target(NamedTuple):
    """What the embeddings are trained towards; what a format does not have is None.

    In the scope ``documents`` positives are those of every rank, but ``scores`` and ``list_index``
    have this rank's alone, whose lists start at the rows ``own``.

    Attributes:
        scores: float32 ``[m]`` (scored).
        list_index: int64 ``[m]``: which query each positive belongs to.
        own: int64 ``[b]``: the row of each query's own positive, the first of its list; None is
            the same row as the query.
        teacher: float32 ``[b, D]`` (distill).
        query_id, positive_id, negative_id: int64 text hashes, ``[b]``, ``[m]``, ``[b * k]``.
        positive_query_id: int64 ``[m]``: hash of the query that each positive belongs to.
        known_positive_id: int64 ``[b, p]``: hashes of every positive of each query, 0 pads.
        query_text_id: int64 ``[b]``: text hashes of the queries, comparable with those of
            documents; ``query_id`` is of the prompt, too.
    """

    scores: Tensor | None = None
    list_index: Tensor | None = None
    own: Tensor | None = None
    teacher: Tensor | None = None
    query_id: Tensor | None = None
    positive_id: Tensor | None = None
    negative_id: Tensor | None = None
    positive_query_id: Tensor | None = None
    known_positive_id: Tensor | None = None
    query_text_id: Tensor | None = None

    def never_negative_id(self, rows: slice = slice(None)) -> Tensor | None:
        """Return hashes of texts that are no negatives of queries, ``[rows, p + 1]``, 0 pads.

        They are its known positives and its own text. Prompts do not matter to that: a document
        that says what the query says is no answer to push away, however either is asked.
        """
        if self.known_positive_id is None or self.query_text_id is None:
            return None if self.known_positive_id is None else self.known_positive_id[rows]
        return torch.cat([self.known_positive_id[rows], self.query_text_id[rows, None]], dim=1)
