"""Cosines of embeddings and of their prefixes, as pure functions.

Axes: ``b`` queries, ``m`` positives, ``n`` documents, ``w`` widths, ``d`` width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-12  # below it a squared norm counts as this: a zero prefix has zero similarities


def cosine_similarity(
    query: Float[Tensor, "b d"], document: Float[Tensor, "n d"]
) -> Float[Tensor, "b n"]:
    """Return the cosine of every query with every document.

    >>> cosine_similarity(torch.eye(2), torch.tensor([[3.0, 0.0]])).tolist()
    [[1.0], [0.0]]
    """
    return nested_cosine_similarities(query, document, [query.shape[1]])[0]


def pairwise_cosine(
    query: Float[Tensor, "m d"], document: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """Return the cosine of each query with the document in the same row.

    >>> pairwise_cosine(torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    return (F.normalize(query, dim=-1) * F.normalize(document, dim=-1)).sum(dim=-1)


def nested_cosine_similarities(
    query: Float[Tensor, "b d"],
    document: Float[Tensor, "n d"],
    dims: Sequence[int],
    document_norms: Float[Tensor, "w n"] | None = None,
) -> list[Float[Tensor, "b n"]]:
    """Return the cosines of the prefixes of every width in ``dims``, in the order given.

    Products add up over blocks of columns, so that all widths together cost one full-width
    product.

    Args:
        query: Embeddings.
        document: Embeddings.
        dims: Widths, at most ``d``.
        document_norms: :func:`inverse_prefix_norms` of the documents, where they are at hand.

    >>> q, d = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    >>> [s.item() for s in nested_cosine_similarities(q, d, [2, 1])]
    [0.0, 1.0]
    """
    if document_norms is None:
        document_norms = inverse_prefix_norms(document, dims)
    norms = zip(inverse_prefix_norms(query, dims), document_norms, strict=True)
    columns = zip(_columns(query, dims), _columns(document, dims), strict=True)
    product = query.new_zeros(query.shape[0], document.shape[0])
    cosines: dict[int, Tensor] = {}
    for width, (q, d), (q_norm, d_norm) in zip(sorted(set(dims)), columns, norms, strict=True):
        product = torch.addmm(product, q, d.T)
        cosines[width] = product * q_norm[:, None] * d_norm
    return [cosines[dim] for dim in dims]


def inverse_prefix_norms(
    embedding: Float[Tensor, "n d"], dims: Sequence[int]
) -> Float[Tensor, "w n"]:
    """Return one over the norm of the prefixes of every distinct width in ``dims``, ascending.

    >>> inverse_prefix_norms(torch.tensor([[0.6, 0.8]]), [2]).tolist()
    [[1.0]]
    """
    squared = torch.stack([c.square().sum(dim=-1) for c in _columns(embedding, dims)])
    return squared.cumsum(dim=0).clamp_min(EPSILON).rsqrt()


def _columns(embedding: Float[Tensor, "n d"], dims: Sequence[int]) -> Sequence[Tensor]:
    """Split off the columns by which each distinct width, ascending, exceeds the one before."""
    # One split, whose backward is one concatenation; a slice's would pad to the full width.
    ends = sorted(set(dims))
    sizes = [end - start for start, end in pairwise([0, *ends, embedding.shape[1]])]
    return embedding.split(sizes, dim=1)[:-1]
