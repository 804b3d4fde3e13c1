"""One rank's share of a global batch."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedtune.models.spec import Features


class Batch(NamedTuple):
    """One rank's share of a global batch.

    ``query``, ``positive`` and ``negative`` are row numbers in the embeddings of all chunks, one
    after the other: a text that occurs twice is encoded once.

    Attributes:
        example_id: int64 ``[b]``, the numbers of the examples in their data set; empty for a spare
            share, whose one example does not count.
        chunks: Token features, packed or padded; the texts of a chunk are of about equal length.
        query: int64 ``[b]``.
        positive: int64 ``[m]``, empty for distill.
        negative: int64 ``[b * k]``, query-major, empty without hard negatives.
        list_index: int64 ``[m]``: which query each positive belongs to.
        scores: float32 ``[m]`` (scored).
        teacher: float32 ``[b, D]`` (distill).
        query_id: int64 ``[b]``, hashes of the queries with the prompts that they are encoded with.
        query_text_id: int64 ``[b]``, text hashes of the queries, whatever their prompts.
        positive_id, negative_id: int64 text hashes ``[m]``, ``[b * k]``.
        known_positive_id: int64 ``[b, p]``, the hashes of every positive that each query has in
            its data set, 0 pads.
        tokens: Tokens of the chunks without padding, and with it.
    """

    example_id: Tensor
    chunks: list[Features]
    query: Tensor
    positive: Tensor
    negative: Tensor
    list_index: Tensor
    scores: Tensor | None
    teacher: Tensor | None
    query_id: Tensor
    query_text_id: Tensor
    positive_id: Tensor
    negative_id: Tensor
    known_positive_id: Tensor
    tokens: tuple[int, int]

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of a :class:`~embedtune.losses.scope.Shares`, in its order."""
        rows = len(self.query), len(self.positive), len(self.negative)
        queries, positives, negatives = rows if len(self.example_id) else (0, 0, 0)
        return queries, positives, negatives, self.known_positive_id.shape[1], len(self.chunks)


def text_ids(texts: Iterable[str]) -> Tensor:
    """Return a 64-bit hash of each text, int64 ``[n]``; equal texts get equal ids on every rank."""
    return torch.from_numpy(text_hashes(texts))


def query_hashes(queries: Iterable[str], prompts: Iterable[str | None]) -> np.ndarray:
    """Return a hash of each query, int64 ``[n]``: under another prompt it is another.

    A model that follows instructions is asked another thing by the same words.
    """
    asked = zip(prompts, queries, strict=True)
    return text_hashes(f"{prompt}\0{query}" if prompt else query for prompt, query in asked)


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return the same without torch's type."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.int64).copy()
