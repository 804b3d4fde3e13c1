"""InfoNCE: the own positive against negatives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embedtune.data.records import Format
from embedtune.errors import require_choice, require_positive
from embedtune.losses import functional
from embedtune.losses.contract import Loss
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.scope import Over, Scope
from embedtune.losses.similarity import inverse_prefix_norms, nested_cosine_similarities

BLOCK_ELEMENTS = 2**24  # that a block of queries may take in similarities and what follows them
MIN_BLOCK_ROWS = 16  # with fewer, a product costs more to read than to compute
MATRICES_PER_WIDTH = 6  # of similarities, their logits and masks, and the gradients


class InfoNCE(Loss):
    """Cross-entropy of the own positive against negatives (van den Oord et al. 2018).

    Candidates that are known positives of a query (see :func:`~functional.known_positive_mask`) are
    never its negatives, nor are those with its own text, whatever the prompts. Similarities are
    computed a block of queries at a time, and again in the backward pass (Chen et al. 2016), so
    that memory grows with the texts, not with queries x documents.
    """

    formats = frozenset({Format.PAIR, Format.TRIPLET})

    def __init__(
        self,
        temperature: float = 0.05,
        in_batch_positives: bool = False,
        multi_positive: bool = False,
        over: Over = "global",
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
        require_choice("over", over, Over)
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
        norms = inverse_prefix_norms(documents, dims)
        b = len(embeddings.query)
        own = torch.arange(b, device=documents.device) if target.own is None else target.own
        matrices = MATRICES_PER_WIDTH * len(dims)
        rows = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // (matrices * len(documents)))

        def block_loss(query: Tensor, start: int) -> Tensor:
            block = slice(start, start + rows)
            similarities = nested_cosine_similarities(query, documents, dims, norms)
            known = _no_negatives(target, block)
            own_text = _own_text(target, block) if self.multi_positive else None
            losses = [
                functional.info_nce(
                    similarity,
                    self.temperature,
                    in_batch_positives=self.in_batch_positives,
                    own=own[block],
                    num_positives=num_positives,
                    known=known,
                    left_out=own_text,
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


def _no_negatives(target: Target, block: slice) -> Tensor | None:
    """Return which candidates are known positives or the text of a query, ``[rows, n]``."""
    ids = _candidate_ids(target)
    if ids is None:
        return None
    given: Any = target  # its hashes come together
    return functional.known_positive_mask(
        given.query_id[block],
        ids,
        given.never_negative_id(block),
        given.positive_query_id,
        given.own[block],
    )


def _own_text(target: Target, block: slice) -> Tensor | None:
    """Return which candidates have the text of a query, ``[rows, n]``."""
    ids = _candidate_ids(target)
    if ids is None or target.query_text_id is None:
        return None
    return target.query_text_id[block, None] == ids


def _candidate_ids(target: Target) -> Tensor | None:
    if target.positive_id is None:
        return None
    return torch.cat([i for i in (target.positive_id, target.negative_id) if i is not None])


def candidates(embeddings: Embeddings) -> Tensor:
    """Return the positives and then the hard negatives, ``[n, d]``."""
    documents = [e for e in (embeddings.positive, embeddings.negative) if e is not None]
    return torch.cat(documents)
