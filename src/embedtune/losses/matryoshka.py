"""Any loss at every width of one embedding's prefixes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtune.errors import InputError
from embedtune.losses.contract import Loss, losses_at_widths
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.widths import refuse_wider, require_widths


class Matryoshka(Loss):
    """A loss at every width of one embedding's prefixes (MRL, Kusupati et al. 2022, eq. 1).

    A loss is called with the embeddings cut to each width, unless its ``at_widths`` knows better
    (:func:`~embedtune.losses.contract.losses_at_widths`).
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
        self.loss, self.dims = loss, require_widths("dims", dims)
        self.weights = [1.0] * len(self.dims) if weights is None else list(weights)
        are_weights = all(0 <= weight < math.inf for weight in self.weights)
        if len(self.weights) != len(self.dims) or not are_weights or sum(self.weights) <= 0:
            raise InputError(
                f"weights: expected {len(self.dims)} numbers from 0 on with a positive sum, "
                f"found {self.weights}"
            )
        self.scope = loss.scope

    def forward(self, embeddings: Embeddings, target: Target) -> dict[str, Tensor]:
        """Return the weighted mean, and the loss at each width."""
        refuse_wider(self.dims, embeddings.query.shape[1])
        losses = losses_at_widths(self.loss, embeddings, target, self.dims)
        total = sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))
        parts = {f"loss/{dim}": loss for dim, loss in zip(self.dims, losses, strict=True)}
        return {"loss": torch.as_tensor(total) / sum(self.weights), **parts}


def unwrapped(loss: Loss | None) -> Loss | None:
    """Return the loss that is computed at each width, of one that wraps none itself."""
    while isinstance(loss, Matryoshka):
        loss = loss.loss
    return loss
