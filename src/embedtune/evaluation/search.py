"""Exact search in blocks, over documents that may be spread over ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from embedtune.distributed import exchange
from embedtune.evaluation.similarity import prepared, similarities

QUERIES, DOCUMENTS = 512, 8192
"""Rows of a block: a quarter of a GB while it is scored, whatever the size of the corpus."""
LAST = 2**32 - 1
"""Numbers of documents end here: they share an int64 with a float32 score."""
NOTHING = torch.iinfo(torch.int64).min


class Found(NamedTuple):
    """The documents found for each query, best first.

    Attributes:
        scores: Similarities, float32 ``[q, k]``; -inf where fewer than ``k`` were found.
        rows: Numbers of the documents, int64 ``[q, k]``; -1 where fewer than ``k`` were found.
    """

    scores: Tensor
    rows: Tensor


@torch.no_grad()
def search(
    queries: Tensor,
    documents: Tensor,
    rows: Tensor,
    k: int,
    device: torch.device | None = None,
    left_out: Tensor | None = None,
    similarity: str = "cosine",
) -> Found:
    """Return the ``k`` documents with the highest similarity for each query.

    Similarities are float32, under autocast too. Of documents with equal ones those with lower
    numbers come first. One that is NaN is never found.

    Args:
        queries: Embeddings ``[q, d]`` of any scale, dtype and device.
        documents: Embeddings ``[n, d]``, likewise; ``n`` may be 0.
        rows: int64 ``[n]``, the number of each document in the whole corpus, all different.
        k: Documents per query.
        device: Where to compute and to return the result; by default that of the queries.
        left_out: int64 ``[q]``, the number of a document that is no result of the query, -1 for
            none; by default none is left out.
        similarity: By sentence-transformers' names.
    """
    device = queries.device if device is None else device
    without = None if left_out is None else left_out.to(device).split(QUERIES)
    with torch.autocast(device.type, enabled=False):
        asked = prepared(queries.to(device).float(), similarity).split(QUERIES)
        best = [torch.full((len(block), k), NOTHING, device=device) for block in asked]
        for block, numbers in zip(documents.split(DOCUMENTS), rows.split(DOCUMENTS), strict=True):
            documents_here = prepared(block.to(device).float(), similarity)
            numbers = numbers.to(device)
            for i, query in enumerate(asked):
                keys = sort_keys(similarities(query, documents_here, similarity), numbers)
                if without is not None:
                    keys.masked_fill_(without[i][:, None] == numbers, NOTHING)
                keys = keys.topk(min(k, len(numbers))).values
                best[i] = torch.cat([best[i], keys], dim=1).topk(k).values
    return _found(torch.cat(best))


@torch.no_grad()
def merge(found: Found, k: int) -> Found:
    """Return the best ``k`` of what all ranks found for the same queries, on every rank alike.

    One process gets back what it gives.

    Args:
        found: What :func:`search` found in this rank's documents.
        k: Documents per query.
    """
    if not exchange.is_distributed():
        return found
    own = sort_keys(found.scores, found.rows)
    sizes = [size for (size,) in exchange.gather_counts([len(own)], own.device)]
    keys = torch.cat(exchange.gather_rows(own, sizes).split(sizes), dim=1)
    return _found(keys.topk(k).values)


def sort_keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Return int64 keys that order by score, and equal scores by lower row.

    No two keys are equal, so that neither blocks nor ranks nor the device decide between ties.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # The bits of a float order like an integer, those of negative ones backwards.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = torch.add(LAST - rows, ordered, alpha=2**32)
    return keys.masked_fill_(scores.isnan() | (rows < 0), NOTHING)


def _found(keys: Tensor) -> Found:
    """Undo :func:`sort_keys`."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    nothing = keys == NOTHING
    return Found(
        scores=bits.view(torch.float32).masked_fill(nothing, float("-inf")),
        rows=(LAST - (keys & LAST)).masked_fill(nothing, -1),
    )
