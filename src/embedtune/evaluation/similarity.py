"""How embeddings are compared, by the names that sentence-transformers gives similarities."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from embedtune.losses.similarity import pairwise_cosine


def prepared(embeddings: Tensor, similarity: str) -> Tensor:
    """Return embeddings ``[n, d]`` as :func:`similarities` takes them."""
    return F.normalize(embeddings, dim=-1) if similarity == "cosine" else embeddings


def similarities(queries: Tensor, documents: Tensor, similarity: str) -> Tensor:
    """Return the similarity of each query with each document, ``[q, n]``; more is more alike.

    Args:
        queries: :func:`prepared` embeddings ``[q, d]``.
        documents: Likewise, ``[n, d]``.
        similarity: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``, which are distances with
            their sign changed.
    """
    if similarity in ("cosine", "dot"):
        return queries @ documents.T
    return -torch.cdist(queries, documents, p=_ORDERS[similarity])


def pairwise_similarities(first: Tensor, second: Tensor, similarity: str) -> Tensor:
    """Return the similarity of each embedding ``[n, d]`` with that in the same row, ``[n]``.

    >>> a, b = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> [pairwise_similarities(a, b, name).item() for name in ("dot", "euclidean", "manhattan")]
    [0.0, -5.0, -7.0]
    """
    return _PAIRWISE[similarity](first, second)


_ORDERS = {"euclidean": 2.0, "manhattan": 1.0}
_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": pairwise_cosine,
    "dot": lambda first, second: (first * second).sum(dim=-1),
    "euclidean": lambda first, second: -(first - second).norm(dim=-1),
    "manhattan": lambda first, second: -(first - second).abs().sum(dim=-1),
}
