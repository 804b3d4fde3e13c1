"""The hinge on the order of all pairs of pairs of texts, from counts alone."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

DIRECT_PAIRS = 16
"""Values of a block that the rank hinge compares one by one: below it, sorting takes longer."""


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
