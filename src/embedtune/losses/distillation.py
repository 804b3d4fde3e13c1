"""Pull a student's embeddings to a teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embedtune.data.records import Format
from embedtune.errors import require_choice, require_not_negative
from embedtune.losses import functional
from embedtune.losses.contract import Loss
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.rank_hinge import pair_order, rank_hinge
from embedtune.losses.scope import Over
from embedtune.losses.similarity import cosine_similarity, nested_cosine_similarities
from embedtune.losses.widths import refuse_wider, require_widths


class Distillation(Loss):
    """Three terms that pull the student's embeddings to the teacher's.

    The cosine of both embeddings at full width; the mean squared difference of their similarity
    matrices; and a hinge on the order of all pairs of pairs. With ``mrl_dims`` the last two are
    averaged over the student's widths, against the teacher's full width (after Jasper and Stella,
    Zhang et al. 2024, who weigh the cosine by 10; by 100 small widths gain, docs/quality.md).
    """

    formats = frozenset({Format.DISTILL})

    def __init__(
        self,
        mrl_dims: list[int] | None = None,
        cosine_weight: float = 100.0,
        similarity_weight: float = 200.0,
        rank_weight: float = 20.0,
        margin: float = 0.015,
        over: Over = "rank",
    ) -> None:
        """Set the hyper-parameters.

        Args:
            mrl_dims: Widths of the student; the default is its full width, and with
                ``model.use_mrl`` the widths of ``model.mrl_dims``.
            cosine_weight: Weight of the cosine term.
            similarity_weight: Weight of the squared differences.
            rank_weight: Weight of the hinge.
            margin: By how much the student should tell apart what the teacher orders.
            over: Pairs of texts are formed on each ``rank``, or over the ``global`` batch: more to
                tell apart, and a hinge that costs the square of the number of ranks.
        """
        super().__init__()
        require_choice("over", over, Over)
        self.mrl_dims = None if mrl_dims is None else require_widths("mrl_dims", mrl_dims)
        self.over = over
        self.scope = over
        self.cosine_weight = require_not_negative("cosine_weight", cosine_weight)
        self.similarity_weight = require_not_negative("similarity_weight", similarity_weight)
        self.rank_weight = require_not_negative("rank_weight", rank_weight)
        self.margin = require_not_negative("margin", margin)

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the weighted sum, and its terms without their weights."""
        student, teacher = embeddings.query, target.teacher
        assert teacher is not None
        truth = cosine_similarity(teacher, teacher)
        dims = self.mrl_dims or [student.shape[1]]
        refuse_wider(dims, student.shape[1])

        def compare(student: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            similarities = nested_cosine_similarities(student, student, dims)
            return similarities, [functional.similarity_mse(s, truth) for s in similarities]

        # Computed again in the backward pass: no width's similarities are kept for it.
        similarities, squared = checkpoint(
            compare, student, use_reentrant=False, preserve_rng_state=False
        )
        order = pair_order(truth)
        ranks = [rank_hinge(s, order, self.margin) for s in similarities]
        cosine = functional.distill_cosine(student, teacher)
        loss = (
            self.cosine_weight * cosine
            + self.similarity_weight * _float32_mean(squared)
            + self.rank_weight * _float32_mean(ranks)
        )
        parts = {
            "similarity_mse": torch.stack(squared).mean(),
            "rank_hinge": torch.stack(ranks).mean(),
        }
        return {"loss": loss, "cosine": cosine, **parts}


def _float32_mean(terms: Sequence[Tensor]) -> Tensor:
    """Average terms in a float32 sum, whatever their type, as the reference implementation does.

    So float64 inputs give its totals and gradients to the last digits; float32 ones see no
    difference.
    """
    total = torch.zeros((), dtype=torch.float32, device=terms[0].device)
    for term in terms:
        total += term
    return total / len(terms)
