"""Every loss as a pure function of tensors.

Axes: ``b`` queries, ``m`` positives, ``n`` documents (candidates), ``p`` known positives of a
query, ``d`` width. Any float dtype; training uses float32.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from embedtune.losses.similarity import pairwise_cosine


def info_nce(
    similarity: Float[Tensor, "b n"],
    temperature: float,
    *,
    in_batch_positives: bool = False,
    own: Int[Tensor, " b"] | None = None,
    num_positives: int | None = None,
    known: Bool[Tensor, "b n"] | None = None,
    left_out: Bool[Tensor, "b n"] | None = None,
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
        left_out: Which of these are no positives either: a query's own text would teach nothing.
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
    # Compared, for what is written to places that a tensor tells waits for a GPU.
    positive = torch.arange(n, device=own.device) == own[:, None]
    ignored = torch.zeros_like(positive)
    if n > num_positives and not in_batch_positives:
        ignored[:, :num_positives] = True
    logits = similarity / temperature
    if known is not None and multi_positive:
        positive |= known if left_out is None else known & ~left_out
        return _multi_positive_nce(logits, positive, ignored | positive | known)
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

    A candidate is known if its text is a positive of the query, or if it is the positive of an
    equal query. The own column is False.

    Args:
        query_id: 64-bit hashes of the queries.
        candidate_id: Hashes of the candidates, the ``m`` positives first.
        known_positive_id: Hashes of every positive of each query, and of what else is none of its
            negatives, padded with 0.
        positive_query_id: Hashes of the queries that the positives belong to.
        own: Column of each query's own positive.
    """
    b, n, m = len(query_id), len(candidate_id), len(positive_query_id)
    # Looked up, not compared: a query may have thousands of positives.
    ordered = candidate_id.sort().values
    place = torch.searchsorted(ordered, known_positive_id)
    is_there = ordered[place.clamp_max(n - 1)] == known_positive_id
    place = torch.where(is_there & (known_positive_id != 0), place, n)
    known = torch.zeros(b, n + 1, dtype=torch.bool, device=query_id.device)
    known = known.scatter_(1, place, True)
    mask = known.gather(1, torch.searchsorted(ordered, candidate_id).expand(b, -1))
    mask[:, :m] |= query_id[:, None] == positive_query_id
    return mask & (torch.arange(n, device=own.device) != own[:, None])


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


def kl_over_candidates(
    similarity: Float[Tensor, "b n"],
    scores: Float[Tensor, " m"],
    list_index: Int[Tensor, " m"],
    column: Int[Tensor, " m"],
    known: Bool[Tensor, "b n"],
    temperature: float,
    teacher_temperature: float,
    other_weight: float,
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) over each query's list and the texts of the others' lists.

    The teacher gives those of other lists a probability of 0: in the limit of a teacher that is
    sure of one text this is InfoNCE.

    Args:
        similarity: Cosine of each query with every text of the batch.
        scores: Teacher's score of each text of a list.
        list_index: Which query each of these belongs to, ascending.
        column: Where it is among the texts of the batch.
        known: Texts of other lists that are left out, for a list of the query has them too.
        temperature: Divides the similarities.
        teacher_temperature: Divides the scores.
        other_weight: How many texts one of another list stands for.
    """
    others = torch.full_like(similarity, math.log(other_weight))
    others[list_index, column] = 0.0
    logits = (similarity / temperature + others).masked_fill(known, float("-inf"))
    student = F.log_softmax(logits, dim=1)[list_index, column]
    teacher = _log_softmax_by_list(scores / teacher_temperature, list_index, len(similarity))
    return (teacher.exp() * (teacher - student)).sum() / len(similarity)


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
