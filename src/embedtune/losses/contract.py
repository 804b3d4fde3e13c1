"""What a loss is, and what a loss of your own has to be."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedtune.data.records import Format
from embedtune.errors import InputError
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.scope import Scope


class Loss(nn.Module):
    """What a loss is: a function of embeddings that never sees the model.

    A loss of your own derives from this class, implements ``forward`` and is named in the YAML by
    its import path.

    Attributes:
        formats: The formats of data it can be trained on; all by default.
        scope: What it sees where several ranks share a batch (see
            :data:`~embedtune.losses.scope.Scope`); with the default every loss has the gradient of
            one process.
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
        cut = (self(embeddings.cut(dim), target) for dim in dims)
        return [require_parts(self, parts)["loss"] for parts in cut]


def losses_at_widths(
    loss: Loss, embeddings: Embeddings, target: Target, dims: Sequence[int]
) -> list[Tensor]:
    """Return the loss of the embeddings' prefixes of each width in ``dims``.

    By its ``at_widths``, unless a subclass has a ``forward`` of its own beside the ``at_widths``
    that it inherits, which knows nothing of it.
    """
    methods = {"at_widths", "forward"}
    own = next(vars(kind) for kind in type(loss).__mro__ if vars(kind).keys() & methods)
    if "at_widths" in own:
        return loss.at_widths(embeddings, target, dims)
    return Loss.at_widths(loss, embeddings, target, dims)


def _is_scalar(value: Any) -> bool:
    return not value.dim() if isinstance(value, Tensor) else isinstance(value, int | float)


def require_parts(loss: Loss, parts: Any) -> dict[str, Tensor]:
    """Return what a loss has returned.

    Raises:
        InputError: It is not what a loss returns, or nothing is learnt by it.
    """
    total = parts.get("loss") if isinstance(parts, dict) else None
    found = None
    if not isinstance(parts, dict):
        found = f"a {type(parts).__name__}"
    elif not isinstance(total, Tensor):
        found = f"{type(total).__name__} in it" if "loss" in parts else f"{sorted(parts)}"
    elif total.dim():
        found = f'"loss" of the shape {list(total.shape)}'
    elif torch.is_grad_enabled() and not total.requires_grad:
        found = 'a "loss" that does not depend on the embeddings'
    elif "lr" in parts:  # that part of the log is the learning rate's
        found = 'a part called "lr"'
    else:
        others = [name for name, value in parts.items() if not _is_scalar(value)]
        found = f'"{others[0]}", which is no scalar' if others else None
    if found is not None:
        raise InputError(
            f"model.loss: expected {type(loss).__name__}.forward to return a dict with a scalar "
            f'tensor "loss" to be learnt from, found {found}'
        )
    return parts
