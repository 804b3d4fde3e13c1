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

    torch's CPU generator draws the seed of numpy's SFC64, which draws twice as fast; numpy also
    compares 16-bit numbers several times as fast.

    Args:
        kept: uint8, contiguous; filled with 1 where an element is kept and 0 where it is dropped.
        dropout: Share that is dropped.

    Returns:
        The share that is kept: ``1 - dropout`` to 16 bits.
    """
    count, dropped_levels = kept.numel(), min(round(dropout * LEVELS), LEVELS - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    levels = SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    out = kept.view(-1).numpy().view(np.bool_)
    np.greater_equal(levels, dropped_levels - LEVELS // 2, out=out)
    return 1 - dropped_levels / LEVELS


class FastDropout(torch.nn.Dropout):
    """Dropout with masks of :func:`draw_kept`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training."""
        if not self.training or self.p in (0, 1) or input.device.type != "cpu":
            return super().forward(input)
        return _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, dropout: float) -> Tensor:
        kept = torch.empty(states.shape, dtype=torch.uint8)
        ctx.keep_prob = draw_kept(kept, dropout)
        ctx.save_for_backward(kept)
        return _drop(states, kept, ctx.keep_prob)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (kept,), (gradient,) = ctx.saved_tensors, grad_outputs
        return _drop(gradient, kept, ctx.keep_prob), None


def _drop(states: Tensor, kept: Tensor, keep_prob: float) -> Tensor:
    # Multiplying by bytes or bools takes several times as long as by floating-point numbers.
    return kept.to(states.dtype).mul_(states).div_(keep_prob)


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

    In half precision everything between the given and the returned is float32: scores rounded to
    bfloat16 would be wrong by up to an eighth. Probabilities are rounded where they are kept for
    backward.

    Args:
        query: ``[texts, heads, length, head_dim]``, as ``key`` and ``value``.
        key: See ``query``.
        value: See ``query``; its type is that of the result, whatever the others' are.
        mask: bool, ``[length, length]`` or ``[texts, 1, length or 1, length]``: which tokens
            (second to last) see which (last); None is all. Each token must see one.
        dropout: Share of the probabilities that is dropped, below 1.
        scale: Multiplies the products of queries and keys.

    Returns:
        ``[texts, heads, length, head_dim]``.
    """
    # Rotary position embeddings leave float32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        bias = bias.expand(len(query), 1, -1, -1)[:, 0]
    # Products of matrices that lie apart, as heads do in one text, take twice as long.
    flat = [states.reshape(-1, *states.shape[-2:]).contiguous() for states in (query, key, value)]
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
        probabilities = value.new_empty(rows, length, length)
        kept = torch.empty(probabilities.shape, dtype=torch.uint8)
        q, k, v = _widen(query, key, value)
        output = torch.empty_like(v)
        for block, draws, scores, factors in _blocks(probabilities):
            p = probabilities[block]
            scores = p if p.dtype == scores.dtype else scores
            torch.baddbmm(scores, q[block], k[block].mT, beta=0, alpha=scale, out=scores)
            if bias is not None:
                texts = torch.arange(block.start, block.stop) * len(bias) // rows
                scores.add_(bias[texts])
            torch.softmax(scores, dim=-1, out=scores)
            if scores is not p:
                p.copy_(scores)
            for part in kept[block].split(draws):
                ctx.keep_prob = draw_kept(part, dropout)
            factors.copy_(kept[block]).mul_(scores)
            out = output[block]
            torch.baddbmm(out, factors, v[block], beta=0, alpha=1 / ctx.keep_prob, out=out)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, probabilities, kept)
        return output.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, kept = ctx.saved_tensors
        q, k, v, g = _widen(query, key, value, grad_outputs[0])
        gradients = [torch.empty_like(states) for states in (q, k, v)]
        scale = 1 / ctx.keep_prob
        for block, _, scores, factors in _blocks(probabilities):
            dq, dk, dv = (states[block] for states in gradients)
            p = probabilities[block].to(scores.dtype)
            factors.copy_(kept[block])
            torch.baddbmm(scores, g[block], v[block].mT, beta=0, alpha=scale, out=scores)
            scores.mul_(factors)
            torch.baddbmm(dv, factors.mul_(p).mT, g[block], beta=0, alpha=scale, out=dv)
            torch._softmax_backward_data(scores, p, -1, scores.dtype, grad_input=scores)
            torch.baddbmm(dq, scores, k[block], beta=0, alpha=ctx.scale, out=dq)
            torch.baddbmm(dk, scores.mT, q[block], beta=0, alpha=ctx.scale, out=dk)
        return *(states.to(value.dtype) for states in gradients), None, None, None


def _widen(*states: Tensor) -> list[Tensor]:
    return [s.to(torch.promote_types(s.dtype, torch.float32)) for s in states]


def _blocks(probabilities: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Go through the rows of ``[rows, length, length]`` in blocks.

    Yields:
        The rows of a block; of how many rows masks are drawn at once, which does not depend on the
        number of threads; and two buffers of the block's shape, float32 at least.
    """
    rows, *shape = probabilities.shape
    draws = max(1, BLOCK // math.prod(shape))
    size = min(rows, draws * torch.get_num_threads())
    kind = torch.promote_types(probabilities.dtype, torch.float32)
    buffers = probabilities.new_empty(2, size, *shape, dtype=kind)
    for start in range(0, rows, size):
        block = slice(start, min(rows, start + size))
        yield block, draws, *buffers[:, : block.stop - start]
