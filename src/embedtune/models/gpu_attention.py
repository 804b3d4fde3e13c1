"""Attention over packed texts on a GPU, by torch's own kernels.

Those for texts of unequal length are the operators below ``scaled_dot_product_attention``;
docs/architecture.md says why. Short texts share blocks, as do those of which probabilities are
dropped in float32: the memory-efficient kernel would drop the same ones of every text and head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from embedtune.models.spread import gather_back, spread

CAUSAL_FROM_TOP_LEFT = 1
"""What the memory-efficient kernel calls a mask in which a token sees those before it."""
LARGEST_BLOCK = 128
"""Tokens of a block beyond which flash attention is faster."""


class Blocks(NamedTuple):
    """How packed texts lie in blocks of one size.

    Attributes:
        source: int64 ``[blocks x size]``: the token that comes to each place; any one where it is
            padding.
        place: int64 ``[tokens]``: the place that each token comes to.
        bias: ``[blocks, size, size]``: what is added to the products of two places, 0 or minus
            infinity. One for all layers, which keep it for backward.
    """

    source: Tensor
    place: Tensor
    bias: Tensor


def block_bias(text: Tensor, kind: torch.dtype) -> Tensor:
    """Return ``Blocks.bias``, which keeps texts apart.

    Args:
        text: int32 ``[blocks, size]``: the number of each place's text, -1 for padding.
        kind: The type that attention computes with outside autocast.
    """
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
    differs = text[:, :, None] != text[:, None]
    return torch.zeros(differs.shape, dtype=kind, device=text.device).masked_fill_(
        differs, float("-inf")
    )


def attend_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    blocks: Blocks | None,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Attend within each text, in half precision also where autocast asks for it.

    Args:
        query: ``[tokens, heads, head_dim]``; ``key`` and ``value`` may have fewer heads.
        key: See ``query``.
        value: See ``query``.
        starts: int32 ``[texts + 1]``: where each text starts, and the end.
        longest: Tokens of the longest text.
        blocks: Where the texts lie in blocks, if they were laid so.
        dropout: Share of the attention probabilities that is dropped.
        scale: Multiplies the products; 1 / sqrt(head_dim) by default.
        causal: Whether a token sees those before it alone.
        window: A token sees those less far away than this; None is all.

    Returns:
        ``[tokens, heads, head_dim]``; None where nothing here can do this: dropout or a window in
        float32, without blocks.
    """
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        # Rotary position embeddings leave float32 under autocast.
        query, key, value = query.to(half), key.to(half), value.to(half)
    if window is not None and longest <= window:
        window = None
    if value.dtype in (torch.float16, torch.bfloat16):
        if blocks is not None and blocks.bias.shape[1] <= LARGEST_BLOCK:
            return attend_in_blocks(query, key, value, blocks, dropout, scale, causal, window)
        return _flash(query, key, value, starts, longest, dropout, scale, causal, window)
    if dropout == 0 and window is None:
        return _memory_efficient(query, key, value, starts, longest, scale, causal)
    if blocks is not None:
        return attend_in_blocks(query, key, value, blocks, dropout, scale, causal, window)
    return None


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attend within each text, several of which lie in one block; see :func:`attend_on_gpu`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a mask no kernel takes fewer heads
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    bias = blocks.bias.to(query.dtype)
    q, k, v = (
        spread(states, blocks.source, blocks.place).unflatten(0, bias.shape[:2]).transpose(1, 2)
        for states in (query, key, value)
    )
    if causal or window is not None:
        place = torch.arange(bias.shape[1], device=bias.device)
        distance = place[:, None] - place
        if causal:
            bias = bias.masked_fill(distance < 0, float("-inf"))
        if window is not None:
            bias = bias.masked_fill(distance.abs() >= window, float("-inf"))
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[:, None], dropout_p=dropout, scale=scale
    )
    return gather_back(output.transpose(1, 2).flatten(0, 1), blocks.place)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """FlashAttention-2 (Dao 2023), which also drops probabilities and takes fewer key heads."""
    reach = None if window is None else window - 1  # tokens seen on each side
    output, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        dropout,
        causal,
        False,
        scale=scale,
        window_size_left=reach,
        window_size_right=0 if causal and reach is not None else reach,
    )
    return output


@torch.compiler.disable  # its backward cannot be traced (torch 2.11)
def _memory_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Memory-efficient attention (Rabe and Staats 2021), which also takes float32.

    Without dropout: where texts are of unequal length its numbers start anew for each text and
    head (torch 2.11).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    output, *_ = torch.ops.aten._efficient_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        starts,
        starts,
        longest,
        longest,
        0.0,
        CAUSAL_FROM_TOP_LEFT if causal else 0,
        compute_log_sumexp=torch.is_grad_enabled(),
        scale=scale,
    )
    return output[0]
