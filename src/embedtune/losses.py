"""Losses over embeddings: modules that hold hyper-parameters, and the contract of a plug-in."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedtune import functional
from embedtune.errors import InputError, require_positive
from embedtune.records import Format
from embedtune.target import Embeddings, Scope, Target

BLOCK_ELEMENTS = 2**24  # that a block of queries may take in similarities and what follows them
MIN_BLOCK_ROWS = 16  # with fewer, a product costs more to read than to compute
MATRICES_PER_WIDTH = 6  # of similarities, their logits and masks, and the gradients


class Loss(nn.Module):
    """What a loss is: a function of embeddings that never sees the model.

    A loss of your own derives from this class, implements ``forward`` and is named in the YAML by
    its import path.

    Attributes:
        formats: The formats of data it can be trained on; all by default.
        scope: What it sees where several ranks share a batch (:data:`~embedtune.target.Scope`);
            with the default every loss has the gradient of one process.
    """

    formats: ClassVar[frozenset[Format]] = frozenset(Format)
    scope: Scope = "global"

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the scalar "loss", and under other names scalars to log beside it."""
        raise NotImplementedError

    def at_widths(
        self, embeddings: Embeddings, target: Target, dims: Sequence[int]
    ) -> list[Tensor]:
        """Return the loss of the embeddings' prefixes of each width in ``dims``.

        Override it where widths can share work.
        """
        return [self(embeddings.cut(dim), target)["loss"] for dim in dims]


class InfoNCE(Loss):
    """Cross-entropy of the own positive against negatives (van den Oord et al. 2018).

    Candidates that are known positives of a query (see
    :func:`~embedtune.functional.known_positive_mask`) are never its negatives. Similarities are
    computed a block of queries at a time, and again in the backward pass (Chen et al. 2016), so
    that memory grows with the texts, not with queries x documents.
    """

    formats = frozenset({Format.PAIR, Format.TRIPLET})

    def __init__(
        self,
        temperature: float = 0.02,
        in_batch_positives: bool = False,
        multi_positive: bool = False,
        over: Literal["rank", "global"] = "global",
    ) -> None:
        """Set the hyper-parameters.

        Args:
            temperature: Divides the cosines.
            in_batch_positives: With hard negatives, also use the other queries' positives as
                negatives; pair data uses them in any case.
            multi_positive: Count a query's known positives among the candidates as positives, in
                place of masking them.
            over: Negatives are the documents of the ``global`` batch, those of other ranks with
                their gradient, or of each ``rank`` alone.
        """
        super().__init__()
        self.over = over
        self.scope: Scope = "documents" if over == "global" else "rank"
        self.temperature = require_positive("temperature", temperature)
        self.in_batch_positives, self.multi_positive = in_batch_positives, multi_positive

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the mean over the queries."""
        (loss,) = self.at_widths(embeddings, target, [embeddings.query.shape[1]])
        return {"loss": loss}

    def at_widths(
        self, embeddings: Embeddings, target: Target, dims: Sequence[int]
    ) -> list[Tensor]:
        """Return the mean over the queries at each width, for the products of the widest."""
        assert embeddings.positive is not None
        num_positives, documents = len(embeddings.positive), candidates(embeddings)
        norms = functional.inverse_prefix_norms(documents, dims)
        b = len(embeddings.query)
        own = torch.arange(b, device=documents.device) if target.own is None else target.own
        matrices = MATRICES_PER_WIDTH * len(dims)
        rows = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // (matrices * len(documents)))

        def block_loss(query: Tensor, start: int) -> Tensor:
            block = slice(start, start + rows)
            similarities = functional.nested_cosine_similarities(query, documents, dims, norms)
            known = _known_positives(target, block)
            losses = [
                functional.info_nce(
                    similarity,
                    self.temperature,
                    in_batch_positives=self.in_batch_positives,
                    own=own[block],
                    num_positives=num_positives,
                    known=known,
                    multi_positive=self.multi_positive,
                )
                for similarity in similarities
            ]
            return torch.stack(losses) * (len(query) / b)

        blocks = [
            checkpoint(block_loss, query, i * rows, use_reentrant=False, preserve_rng_state=False)
            for i, query in enumerate(embeddings.query.split(rows))
        ]
        return list(torch.stack(blocks).sum(dim=0).unbind())


def _known_positives(target: Target, block: slice) -> Tensor | None:
    """Return the known positives of a block of queries among all candidates, ``[rows, n]``."""
    if target.positive_id is None:
        return None
    ids = [i for i in (target.positive_id, target.negative_id) if i is not None]
    given: Any = target  # its hashes come together
    return functional.known_positive_mask(
        given.query_id[block],
        torch.cat(ids),
        given.known_positive_id[block],
        given.positive_query_id,
        given.own[block],
    )


def candidates(embeddings: Embeddings) -> Tensor:
    """Return the positives and then the hard negatives, ``[n, d]``."""
    documents = [e for e in (embeddings.positive, embeddings.negative) if e is not None]
    return torch.cat(documents)


class ListwiseKL(Loss):
    """KL divergence of the student's distribution over texts from that of the scores."""

    formats = frozenset({Format.SCORED})

    def __init__(
        self,
        over: Literal["list", "batch"] = "list",
        temperature: float = 0.02,
        teacher_temperature: float | None = None,
    ) -> None:
        """Set the hyper-parameters.

        Args:
            over: ``list`` compares the texts of each query, ``batch`` all pairs of the
                global batch.
            temperature: Divides the cosines.
            teacher_temperature: Divides the scores; 1.0 over lists and 0.02 over the batch.
        """
        super().__init__()
        if teacher_temperature is None:
            teacher_temperature = 1.0 if over == "list" else 0.02
        self.over = over
        self.scope = "rank" if over == "list" else "global"
        self.temperature = require_positive("temperature", temperature)
        self.teacher_temperature = require_positive("teacher_temperature", teacher_temperature)

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the mean over lists, or over the pairs of the batch."""
        cosine, scores, list_index = _scored_pairs(embeddings, target)
        temperatures = self.temperature, self.teacher_temperature
        if self.over == "batch":
            return {"loss": functional.kl_over_batch(cosine, scores, *temperatures)}
        num_lists = len(embeddings.query)
        loss = functional.kl_over_list(cosine, scores, list_index, num_lists, *temperatures)
        return {"loss": loss}


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
    return functional.pairwise_cosine(queries, positive), scores, list_index


class Distillation(Loss):
    """Three terms that pull the student's embeddings to the teacher's.

    The cosine of both embeddings at full width; the mean squared difference of their similarity
    matrices; and a hinge on the order of all pairs of pairs. With ``mrl_dims`` the last two are
    averaged over the student's widths, against the teacher's full width (after Jasper and Stella,
    Zhang et al. 2024).
    """

    formats = frozenset({Format.DISTILL})

    def __init__(
        self,
        mrl_dims: list[int] | None = None,
        cosine_weight: float = 10.0,
        similarity_weight: float = 200.0,
        rank_weight: float = 20.0,
        margin: float = 0.015,
        over: Literal["rank", "global"] = "rank",
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
        self.mrl_dims, self.over = mrl_dims, over
        self.scope = over
        self.cosine_weight, self.similarity_weight = cosine_weight, similarity_weight
        self.rank_weight, self.margin = rank_weight, margin

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the weighted sum, and its terms without their weights."""
        student, teacher = embeddings.query, target.teacher
        assert teacher is not None
        truth = functional.cosine_similarity(teacher, teacher)
        dims = self.mrl_dims or [student.shape[1]]

        def compare(student: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            similarities = functional.nested_cosine_similarities(student, student, dims)
            return similarities, [functional.similarity_mse(s, truth) for s in similarities]

        # Computed again in the backward pass: no width's similarities are kept for it.
        similarities, squared = checkpoint(
            compare, student, use_reentrant=False, preserve_rng_state=False
        )
        order = functional.pair_order(truth)
        ranks = [functional.rank_hinge(s, order, self.margin) for s in similarities]
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


class Matryoshka(Loss):
    """A loss at every width of one embedding's prefixes (MRL, Kusupati et al. 2022, eq. 1).

    A loss is called with the embeddings cut to each width, unless its ``at_widths`` knows better.
    Of what it returns, the loss alone is logged.
    """

    def __init__(
        self, loss: Loss, dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        """Wrap a loss.

        Args:
            loss: The loss at each width.
            dims: The widths.
            weights: Their weights in the mean; equal by default.
        """
        super().__init__()
        self.loss, self.dims = loss, list(dims)
        self.weights = [1.0] * len(self.dims) if weights is None else list(weights)
        if len(self.weights) != len(self.dims) or sum(self.weights) <= 0:
            raise InputError(
                f"weights: expected {len(self.dims)} numbers with a positive sum, "
                f"found {self.weights}"
            )
        self.scope = loss.scope

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the weighted mean, and the loss at each width."""
        width = embeddings.query.shape[1]
        if max(self.dims) > width:
            raise InputError(
                f"mrl_dims: expected widths up to the embedding's {width}, found {max(self.dims)}"
            )
        losses = self.loss.at_widths(embeddings, target, self.dims)
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        parts = {f"loss/{dim}": loss for dim, loss in zip(self.dims, losses, strict=True)}
        return {"loss": torch.as_tensor(total) / sum(self.weights), **parts}


def default_loss(row_format: Format, temperature: float | None) -> Loss:
    """Return the loss for a format of data when none is given."""
    if row_format == Format.DISTILL:
        if temperature is not None:
            raise InputError("model.temperature: Distillation has none; leave it out")
        return Distillation()
    kind = ListwiseKL if row_format == Format.SCORED else InfoNCE
    return kind() if temperature is None else kind(temperature=temperature)
