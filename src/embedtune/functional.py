"""Every loss and similarity as a pure function of tensors.

Axes: ``b`` queries, ``m`` positives, ``n`` documents (candidates), ``p`` known positives of a
query, ``d`` width. Any float dtype; training uses float32.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

DIRECT_PAIRS = 16
"""Values of a block that the rank hinge compares one by one: below it, sorting takes longer."""
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


def info_nce(
    similarity: Float[Tensor, "b n"],
    temperature: float,
    *,
    in_batch_positives: bool = False,
    own: Int[Tensor, " b"] | None = None,
    num_positives: int | None = None,
    known: Bool[Tensor, "b n"] | None = None,
    multi_positive: bool = False,
) -> Float[Tensor, ""]:
    """Return InfoNCE (van den Oord et al. 2018, eq. 4), the mean over queries.

    Args:
        similarity: The first columns are positives, the rest all hard negatives of the batch.
        temperature: Divides the similarities.
        in_batch_positives: With hard negatives, count the other queries' positives as negatives
            too; without any they are the only negatives there are.
        own: Column of each query's own positive; by default its own number.
        num_positives: Columns that are positives; by default as many as queries.
        known: Other columns that are positives of a query too, hence none of its negatives.
        multi_positive: Take the mean over the own and the known positives of -log softmax, each
            against the negatives alone (Khosla et al. 2020, eq. 2, without the other positives in
            the denominator); else the known are left out.

    >>> info_nce(torch.zeros(4, 4), temperature=1.0).item()  # log(4)
    1.3862943649291992
    """
    b, n = similarity.shape
    if own is None:
        own = torch.arange(b, device=similarity.device)
    num_positives = b if num_positives is None else num_positives
    positive = torch.zeros(b, n, dtype=torch.bool, device=similarity.device)
    positive[torch.arange(b, device=own.device), own] = True
    ignored = torch.zeros_like(positive)
    if n > num_positives and not in_batch_positives:
        ignored[:, :num_positives] = True
    logits = similarity / temperature
    if known is not None and multi_positive:
        positive |= known
        return _multi_positive_nce(logits, positive, ignored | positive)
    if known is not None:
        ignored |= known
    # Masked after the division: a large finite value divided by a small temperature overflows.
    return F.cross_entropy(logits.masked_fill(ignored & ~positive, float("-inf")), own)


def _multi_positive_nce(
    logits: Float[Tensor, "b n"], positive: Bool[Tensor, "b n"], excluded: Bool[Tensor, "b n"]
) -> Float[Tensor, ""]:
    # Finite: a row without negatives would have a gradient of -inf minus -inf.
    lowest = torch.finfo(logits.dtype).min
    negatives = logits.masked_fill(excluded, lowest).logsumexp(dim=1, keepdim=True)
    terms = F.softplus(negatives - logits).masked_fill(~positive, 0.0)
    return (terms.sum(dim=1) / positive.sum(dim=1)).mean()


def known_positive_mask(
    query_id: Int[Tensor, " b"],
    candidate_id: Int[Tensor, " n"],
    known_positive_id: Int[Tensor, "b p"],
    positive_query_id: Int[Tensor, " m"],
    own: Int[Tensor, " b"],
) -> Bool[Tensor, "b n"]:
    """Tell which candidates are known positives of a query without being its own.

    A candidate is known if its text is one of the row's positives, or if it is the positive of an
    equal query. The own column is False.

    Args:
        query_id: 64-bit hashes of the queries.
        candidate_id: Hashes of the candidates, the ``m`` positives first.
        known_positive_id: Hashes of every positive of each query's row, padded with 0.
        positive_query_id: Hashes of the queries that the positives belong to.
        own: Column of each query's own positive.
    """
    b, n, m = len(query_id), len(candidate_id), len(positive_query_id)
    mask = torch.zeros(b, n, dtype=torch.bool, device=query_id.device)
    for column in known_positive_id.T:  # no b x n x p tensor
        mask |= (column[:, None] == candidate_id) & (column != 0)[:, None]
    mask[:, :m] |= query_id[:, None] == positive_query_id
    mask[torch.arange(b, device=own.device), own] = False
    return mask


def kl_over_list(
    similarity: Float[Tensor, " m"],
    scores: Float[Tensor, " m"],
    list_index: Int[Tensor, " m"],
    num_lists: int,
    temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) of softmaxes over each query's own list, the mean over lists.

    ListNet's top-one probabilities (Cao et al. 2007) with the divergence in place of the
    cross-entropy, so that a perfect student has loss 0.

    Args:
        similarity: Cosine of each text with its query.
        scores: Teacher's score of each text.
        list_index: Which query each text belongs to, ascending.
        num_lists: Number of queries.
        temperature: Divides the similarities.
        teacher_temperature: Divides the scores.
    """
    student = _log_softmax_by_list(similarity / temperature, list_index, num_lists)
    teacher = _log_softmax_by_list(scores / teacher_temperature, list_index, num_lists)
    return (teacher.exp() * (teacher - student)).sum() / num_lists


def _log_softmax_by_list(
    logits: Float[Tensor, " m"], list_index: Int[Tensor, " m"], num_lists: int
) -> Float[Tensor, " m"]:
    largest = logits.new_full((num_lists,), float("-inf"))
    largest = largest.scatter_reduce(0, list_index, logits.detach(), "amax")
    shifted = logits - largest[list_index]
    total = logits.new_zeros(num_lists).index_add(0, list_index, shifted.exp())
    return shifted - total.log()[list_index]


def kl_over_batch(
    similarity: Float[Tensor, " m"],
    scores: Float[Tensor, " m"],
    temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) of one softmax over all pairs, divided by their number."""
    student = F.log_softmax(similarity / temperature, dim=0)
    teacher = F.log_softmax(scores / teacher_temperature, dim=0)
    return (teacher.exp() * (teacher - student)).sum() / len(similarity)


def cosent(
    similarity: Float[Tensor, " m"], scores: Float[Tensor, " m"], scale: float
) -> Float[Tensor, ""]:
    """Return CoSENT (Su 2022): log(1 + sum over s_i > s_j of exp(scale * (cos_j - cos_i))).

    Only the order of the scores counts; pairs with equal scores contribute nothing.
    """
    difference = scale * (similarity[None, :] - similarity[:, None])  # [i, j] = cos_j - cos_i
    ordered = scores[:, None] > scores[None, :]
    differences = difference[ordered]
    return torch.logsumexp(torch.cat([differences, differences.new_zeros(1)]), dim=0)


def distill_cosine(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """Return the mean of 1 - cosine(student, teacher)."""
    return (1 - pairwise_cosine(student, teacher)).mean()


def similarity_mse(
    student_similarity: Float[Tensor, "b b"], teacher_similarity: Float[Tensor, "b b"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference of two similarity matrices."""
    return F.mse_loss(student_similarity, teacher_similarity)


def pair_order(teacher_similarity: Float[Tensor, "b b"]) -> Int[Tensor, " m"]:
    """Return the ``m = b (b - 1) / 2`` pairs of texts, ascending by the teacher's similarity.

    A pair is its position in the flattened upper triangle; ties stay in the matrix's order.

    >>> pair_order(torch.tensor([[1.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 1.0]])).tolist()
    [2, 5, 1]
    """
    b = len(teacher_similarity)
    rows, columns = torch.triu_indices(b, b, offset=1, device=teacher_similarity.device)
    positions = rows * b + columns
    return positions[teacher_similarity.flatten()[positions].sort(stable=True).indices]


def rank_hinge(
    student_similarity: Float[Tensor, "b b"], order: Int[Tensor, " m"], margin: float
) -> Float[Tensor, ""]:
    """Return the hinge on the order of all pairs of pairs of texts, in O(m log^2 m).

    Each pair a before a pair b in ``order`` is asked for ``s_a + margin <= s_b``: the result is the
    mean over the ``m (m - 1) / 2`` pairs of pairs of ``relu(s_a - s_b + margin)``.

    Args:
        student_similarity: Its upper triangle is read.
        order: The teacher's (:func:`pair_order`).
        margin: By how much the student should tell two pairs apart.
    """
    m = len(order)
    if m < 2:
        return student_similarity.sum() * 0
    return _OrderedHinge.apply(student_similarity, order, margin) / (m * (m - 1) / 2)


class _OrderedHinge(torch.autograd.Function):
    """The sum over a < b of relu(s_a - s_b + margin), and its gradient, from counts alone."""

    @staticmethod
    def forward(ctx: Any, similarity: Tensor, order: Tensor, margin: float) -> Tensor:
        scores = similarity.flatten()[order]
        raised = scores + margin
        beaten, beating = count_violations(scores, raised)
        # Each width keeps half a matrix, in 4 bytes; the order is shared.
        ctx.save_for_backward(beaten - beating, order)
        ctx.shape = similarity.shape
        total = (beaten * raised.double()).sum() - (beating * scores.double()).sum()
        return total.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        net, order = ctx.saved_tensors
        gradient = grad_outputs[0].new_zeros(ctx.shape)
        gradient.view(-1)[order] = grad_outputs[0] * net
        return gradient, None, None


def count_violations(
    scores: Float[Tensor, " m"], raised: Float[Tensor, " m"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Count the pairs a < b with ``scores[b] < raised[a]``, for each a and for each b, in int32.

    A bottom-up merge: pairs within short blocks are compared one by one; then, on each level of
    blocks of doubling length, each left block with the right block beside it by sorting both
    together. Both counts come from one predicate on the same rounded values, so they add up to the
    same total.
    """
    m = len(scores)
    size = 1 << (m - 1).bit_length()
    # Padding comes last, is below nothing and above nothing.
    s = F.pad(scores, (0, size - m), value=float("inf"))
    t = F.pad(raised, (0, size - m), value=float("-inf"))
    width = min(size, DIRECT_PAIRS)
    violated = (s.view(-1, 1, width) < t.view(-1, width, 1)).triu_(diagonal=1)  # [block, a, b]
    beaten = violated.sum(dim=2, dtype=torch.int32).flatten()
    beating = violated.sum(dim=1, dtype=torch.int32).flatten()
    while width < size:
        left, right = t.view(-1, 2, width)[:, 0], s.view(-1, 2, width)[:, 1]
        # Stable: of equal values those of the left come first, and are not above.
        values = torch.cat([left, right], dim=1).sort(dim=1, stable=True)
        is_right = values.indices >= width
        right_before = is_right.cumsum(dim=1)
        left_from_here = width + right_before - torch.arange(1, 2 * width + 1, device=s.device)
        counts = torch.where(is_right, left_from_here, right_before).int()
        counts = torch.empty_like(counts).scatter_(1, values.indices, counts)
        beaten.view(-1, 2, width)[:, 0] += counts[:, :width]
        beating.view(-1, 2, width)[:, 1] += counts[:, width:]
        width *= 2
    return beaten[:m], beating[:m]
