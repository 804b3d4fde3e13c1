"""Lay out packed tokens for attention, with padding between them, and take them out again."""

from typing import Any

import torch
from torch import Tensor


def spread(states: Tensor, source: Tensor, place: Tensor) -> Tensor:
    """Lay out tokens with padding.

    Nothing depends on what is there, so it has no gradient.

    Args:
        states: ``[tokens, ..]``.
        source: int64 ``[padded]``: the token that comes to each place; any one where it is padding.
        place: int64 ``[tokens]``: the place that each token comes to.

    Returns:
        ``[padded, ..]``.
    """
    return _Spread.apply(states, source, place)


def gather_back(states: Tensor, place: Tensor) -> Tensor:
    """Take the tokens out of the padded layout, ``[padded, ..]``; see :func:`spread`."""
    return _GatherBack.apply(states, place)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return states.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, place), None, None


class _GatherBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.padded = len(states)
        return states.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (place,), gradient = ctx.saved_tensors, grad_outputs[0]
        padded = gradient.new_zeros(ctx.padded, *gradient.shape[1:])
        return padded.index_copy_(0, place, gradient), None
