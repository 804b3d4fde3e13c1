"""Losses of texts with scores: over the list of a query, or over all pairs."""

from typing import Any, Literal

import torch
from torch import Tensor

from embedtune.data.records import Format
from embedtune.errors import InputError, require_choice, require_positive
from embedtune.losses import functional
from embedtune.losses.contract import Loss
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.similarity import cosine_similarity, pairwise_cosine

OverLists = Literal["list", "batch"]
SPREAD = 0.15
"""Standard deviation of a list's cosines that a derived teacher temperature asks for."""


class ListwiseKL(Loss):
    """KL divergence of the student's distribution over texts from that of the scores."""

    formats = frozenset({Format.SCORED})

    def __init__(
        self,
        over: OverLists = "list",
        temperature: float = 0.05,
        teacher_temperature: float | None = None,
        in_batch_negatives: bool = True,
        other_weight: float = 16.0,
    ) -> None:
        """Set the hyper-parameters.

        Args:
            over: ``list`` compares the texts of each query, ``batch`` all pairs of the
                global batch.
            temperature: Divides the cosines.
            teacher_temperature: Divides the scores; over the batch the default is ``temperature``.
                Over lists a fit derives it from the spread of its scores
                (:meth:`derive_teacher_temperature`).
            in_batch_negatives: Over lists, compare each also with the texts of the other lists of
                the global batch, which the teacher gives a probability of 0; those that a list of
                an equal query has as well are left out, and so is the query's own text.
            other_weight: How many texts one of another list stands for; by the default rows gain as
                much as lists as they do as triplets (docs/quality.md).
        """
        super().__init__()
        require_choice("over", over, OverLists)
        if teacher_temperature is None and over == "batch":
            teacher_temperature = temperature
        if teacher_temperature is not None:
            require_positive("teacher_temperature", teacher_temperature)
        self.over, self.in_batch_negatives = over, in_batch_negatives
        if over == "batch":
            self.scope = "global"
        else:
            self.scope = "documents" if in_batch_negatives else "rank"
        self.temperature = require_positive("temperature", temperature)
        self.teacher_temperature = teacher_temperature
        self.other_weight = require_positive("other_weight", other_weight)

    def derive_teacher_temperature(self, spread: float) -> float:
        """Set the teacher temperature with which cosines must spread by ``SPREAD`` to fit.

        Scores are of any scale: probabilities, logits, grades, cosines. Divided by a temperature
        that was made for another, they ask for lists that are all alike, or for one best text.

        Args:
            spread: Standard deviation of the scores within a list; 0 leaves the temperature at 1.
        """
        self.teacher_temperature = self.temperature * spread / SPREAD if spread else 1.0
        return self.teacher_temperature

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the mean over lists, or over the pairs of the batch."""
        if self.teacher_temperature is None:
            raise InputError(
                "teacher_temperature: expected a number, or a call of derive_teacher_temperature "
                "as a fit makes it, found None"
            )
        temperatures = self.temperature, self.teacher_temperature
        if self.over == "list" and self.in_batch_negatives:
            loss = _kl_over_candidates(embeddings, target, *temperatures, self.other_weight)
            return {"loss": loss}
        cosine, scores, list_index = _scored_pairs(embeddings, target)
        if self.over == "batch":
            return {"loss": functional.kl_over_batch(cosine, scores, *temperatures)}
        num_lists = len(embeddings.query)
        loss = functional.kl_over_list(cosine, scores, list_index, num_lists, *temperatures)
        return {"loss": loss}


def _kl_over_candidates(
    embeddings: Embeddings,
    target: Target,
    temperature: float,
    teacher_temperature: float,
    other_weight: float,
) -> Tensor:
    given: Any = target  # what scored rows have comes together
    documents: Any = embeddings.positive
    list_index = given.list_index
    place = torch.arange(len(list_index), device=list_index.device)
    place = place - torch.searchsorted(list_index, list_index)  # within its list
    # The list of a spare share is not among the documents: any will do, for it has no weight.
    column = (given.own[list_index] + place).clamp_max(len(documents) - 1)
    known = functional.known_positive_mask(
        given.query_id,
        given.positive_id,
        given.never_negative_id(),
        given.positive_query_id,
        given.own,
    )
    known[list_index, column] = False
    return functional.kl_over_candidates(
        cosine_similarity(embeddings.query, documents),
        given.scores,
        list_index,
        column,
        known,
        temperature,
        teacher_temperature,
        other_weight,
    )


class CoSENT(Loss):
    """Order the pairs of the global batch as their scores order them (Su 2022)."""

    formats = frozenset({Format.SCORED})

    def __init__(self, scale: float = 20.0) -> None:
        """Set the hyper-parameters.

        Args:
            scale: Multiplies the differences of cosines.
        """
        super().__init__()
        self.scale = require_positive("scale", scale)

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the loss of all pairs of the batch."""
        cosine, scores, _ = _scored_pairs(embeddings, target)
        return {"loss": functional.cosent(cosine, scores, self.scale)}


def _scored_pairs(embeddings: Embeddings, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosine of each text with its query, its score, and its query's number."""
    positive, scores, list_index = embeddings.positive, target.scores, target.list_index
    assert positive is not None
    assert scores is not None
    assert list_index is not None
    queries = embeddings.query[list_index]
    return pairwise_cosine(queries, positive), scores, list_index
