"""Every loss and similarity as a pure function of tensors.

Axes: ``b`` queries, ``m`` positives, ``n`` documents (candidates), ``p`` known positives of a
query, ``d`` width. Any float dtype; training uses float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
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
    query: Float[Tensor, "b d"], document: Float[Tensor, "n d"], dims: Sequence[int]
) -> list[Float[Tensor, "b n"]]:
    """Return the cosines of the prefixes of every width in ``dims``, in the order given.

    Products and squared norms add up over blocks of columns, so that all widths together cost one
    full-width product.

    >>> q, d = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    >>> [s.item() for s in nested_cosine_similarities(q, d, [2, 1])]
    [0.0, 1.0]
    """
    product = query.new_zeros(query.shape[0], document.shape[0])
    query_norm = query.new_zeros(query.shape[0])
    document_norm = document.new_zeros(document.shape[0])
    cosines: dict[int, Tensor] = {}
    start = 0
    for end in sorted(set(dims)):
        q, d = query[:, start:end], document[:, start:end]
        product = product + q @ d.T
        query_norm = query_norm + q.square().sum(dim=-1)
        document_norm = document_norm + d.square().sum(dim=-1)
        scale = query_norm.clamp_min(EPSILON).rsqrt()[:, None]
        cosines[end] = product * scale * document_norm.clamp_min(EPSILON).rsqrt()
        start = end
    return [cosines[dim] for dim in dims]


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


def rank_hinge(
    student_similarity: Float[Tensor, "b b"],
    teacher_similarity: Float[Tensor, "b b"],
    margin: float,
) -> Float[Tensor, ""]:
    """Return the hinge on the order of all pairs of pairs of texts, in O(m log^2 m).

    The ``m = b (b - 1) / 2`` pairs of texts are sorted by the teacher's similarity (ascending, ties
    in the matrix's order). Each pair a before a pair b is asked for ``s_a + margin <= s_b``: the
    result is the mean over the ``m (m - 1) / 2`` pairs of pairs of ``relu(s_a - s_b + margin)``.

    Args:
        student_similarity: Its upper triangle is read.
        teacher_similarity: Gives the order alone.
        margin: By how much the student should tell two pairs apart.
    """
    b = len(student_similarity)
    rows, columns = torch.triu_indices(b, b, offset=1, device=student_similarity.device)
    order = torch.sort(teacher_similarity[rows, columns], stable=True).indices
    scores = student_similarity[rows, columns][order]
    m = len(scores)
    if m < 2:
        return scores.sum() * 0
    return _OrderedHinge.apply(scores, margin) / (m * (m - 1) / 2)


class _OrderedHinge(torch.autograd.Function):
    """The sum over a < b of relu(s_a - s_b + margin), and its gradient, from counts alone."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, margin: float) -> Tensor:
        raised = scores + margin
        beaten, beating = count_violations(scores, raised)
        ctx.save_for_backward(beaten - beating)
        total = (beaten * raised.double()).sum() - (beating * scores.double()).sum()
        return total.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (net,) = ctx.saved_tensors
        return grad_outputs[0] * net.to(grad_outputs[0].dtype), None


def count_violations(
    scores: Float[Tensor, " m"], raised: Float[Tensor, " m"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Count the pairs a < b with ``scores[b] < raised[a]``, for each a and for each b.

    A bottom-up merge: on each level of blocks of doubling length, each left block is compared with
    the right block beside it by binary search in its sorted values. Both counts come from one
    predicate on the same rounded values, so they add up to the same total.
    """
    m = len(scores)
    size = 1 << (m - 1).bit_length()
    # Padding comes last, is below nothing and above nothing.
    s = F.pad(scores, (0, size - m), value=float("inf"))
    t = F.pad(raised, (0, size - m), value=float("-inf"))
    beaten = torch.zeros(size, dtype=torch.int64, device=scores.device)
    beating = torch.zeros_like(beaten)
    width = 1
    while width < size:
        left, right = t.view(-1, 2, width)[:, 0], s.view(-1, 2, width)[:, 1]
        sorted_left, sorted_right = left.sort(dim=-1).values, right.sort(dim=-1).values
        below = torch.searchsorted(sorted_right, left.contiguous())
        not_above = torch.searchsorted(sorted_left, right.contiguous(), right=True)
        beaten.view(-1, 2, width)[:, 0] += below
        beating.view(-1, 2, width)[:, 1] += width - not_above
        width *= 2
    return beaten[:m], beating[:m]
