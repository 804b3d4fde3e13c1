"""Dropout on a CPU: fast masks, and attention that drops probabilities block by block.

torch draws dropout masks one element at a time in one thread, which takes longer than attention
itself, and turns attention with dropout into operations on tensors that no cache holds.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import SFC64
from torch import Tensor
from torch.autograd.function import once_differentiable

LEVELS = 1 << 16
"""Dropout compares 16 random bits: four times as many masks a second as with one draw each."""

BLOCK = 1 << 18
"""Probabilities that a thread computes at a time: 1 MiB in float32, what its cache holds."""


def draw_kept(kept: Tensor, dropout: float) -> float:
    """Draw which elements dropout keeps.

    torch's CPU generator draws the seed of numpy's SFC64, which draws twice as fast.

    Args:
        kept: Filled with 1 where an element is kept and 0 where it is dropped; multiplying by
            floating-point numbers takes a tenth of the time that a bool mask takes.
        dropout: Share that is dropped.

    Returns:
        The share that is kept: ``1 - dropout`` to 16 bits.
    """
    count, dropped_levels = kept.numel(), round(dropout * LEVELS)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = torch.from_numpy(SFC64(seed).random_raw(-(-count // 4)).view(np.int16))
    levels = bits[:count].view(kept.shape)
    torch.ge(levels, dropped_levels - LEVELS // 2, out=kept)
    return 1 - dropped_levels / LEVELS


class FastDropout(torch.nn.Dropout):
    """Dropout with masks of :func:`draw_kept`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training."""
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        return _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, dropout: float) -> Tensor:
        kept = torch.empty_like(states, requires_grad=False)
        ctx.kept_share = draw_kept(kept, dropout)
        ctx.save_for_backward(kept.to(torch.uint8))
        return kept.mul_(states).div_(ctx.kept_share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (kept,), (gradient,) = ctx.saved_tensors, grad_outputs
        return kept.to(gradient.dtype).mul_(gradient).div_(ctx.kept_share), None


def use_fast_dropout(model: torch.nn.Module) -> None:
    """Replace every plain dropout below ``model``."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout and not child.inplace:
                setattr(module, name, FastDropout(child.p).train(child.training))


def attend_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """Attend, with dropout of the attention probabilities.

    Args:
        query: ``[texts, heads, length, width]``, as ``key`` and ``value``.
        key: See ``query``.
        value: See ``query``.
        mask: bool, ``[length, length]`` or ``[texts, 1, length or 1, length]``: which tokens
            (second to last) see which (last); None is all. Each token must see one.
        dropout: Share of the probabilities that is dropped.
        scale: Multiplies the products of queries and keys.

    Returns:
        ``[texts, heads, length, width]``.
    """
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias.expand(len(query), 1, -1, -1)[:, 0]
    # One product a text and head.
    flat = [states.reshape(-1, *states.shape[-2:]) for states in (query, key, value)]
    return _AttentionWithDropout.apply(*flat, bias, dropout, scale).view(query.shape)


class _AttentionWithDropout(torch.autograd.Function):
    """``dropout(softmax(scale q k' + bias)) v``, each block in the memory of the last."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        dropout: float,
        scale: float,
    ) -> Tensor:
        rows, length, _ = query.shape
        probabilities = query.new_empty(rows, length, length)
        kept_bytes = probabilities.new_empty(probabilities.shape, dtype=torch.uint8)
        output = torch.empty_like(value)
        ctx.kept_share = 1.0
        for block, (scores, kept) in _blocks(probabilities, 2):
            q, k, v, p = query[block], key[block], value[block], probabilities[block]
            torch.baddbmm(scores, q, k.mT, beta=0, alpha=scale, out=scores)
            if bias is not None:
                texts = torch.arange(block.start, block.stop) * len(bias) // rows
                scores.add_(bias[texts])
            torch.softmax(scores, dim=-1, out=p)
            ctx.kept_share = draw_kept(kept, dropout)
            kept_bytes[block] = kept
            torch.mul(p, kept, out=scores)
            out = output[block]
            torch.baddbmm(out, scores, v, beta=0, alpha=1 / ctx.kept_share, out=out)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, probabilities, kept_bytes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, kept_bytes = ctx.saved_tensors
        (gradient,) = grad_outputs
        gradients = [torch.empty_like(states) for states in (query, key, value)]
        share = 1 / ctx.kept_share
        for block, (scores, kept, of_scores) in _blocks(probabilities, 3):
            q, k, v, p = query[block], key[block], value[block], probabilities[block]
            g, (dq, dk, dv) = gradient[block], (states[block] for states in gradients)
            kept.copy_(kept_bytes[block])
            torch.mul(p, kept, out=scores)
            torch.baddbmm(dv, scores.mT, g, beta=0, alpha=share, out=dv)
            torch.baddbmm(scores, g, v.mT, beta=0, alpha=share, out=scores)
            scores.mul_(kept)
            torch._softmax_backward_data(scores, p, -1, p.dtype, grad_input=of_scores)
            torch.baddbmm(dq, of_scores, k, beta=0, alpha=ctx.scale, out=dq)
            torch.baddbmm(dk, of_scores.mT, q, beta=0, alpha=ctx.scale, out=dk)
        return *gradients, None, None, None


def _blocks(probabilities: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield blocks of the rows of ``[rows, length, length]``, each with as many buffers."""
    rows, *shape = probabilities.shape
    size = min(rows, max(1, torch.get_num_threads() * BLOCK // math.prod(shape)))
    buffers = [probabilities.new_empty(size, *shape) for _ in range(count)]
    for start in range(0, rows, size):
        block = slice(start, min(rows, start + size))
        yield block, [buffer[: block.stop - start] for buffer in buffers]
