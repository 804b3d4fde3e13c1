"""Attention over packed texts on a GPU, by torch's own kernels for texts of unequal length.

The operators below ``scaled_dot_product_attention``; docs/architecture.md says why.
"""

import torch
from torch import Tensor

CAUSAL_FROM_TOP_LEFT = 1
"""What the memory-efficient kernel calls a mask in which a token sees those before it."""


def attend_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Attend within each text, in half precision (also under autocast) by flash attention.

    Args:
        query: ``[tokens, heads, head_dim]``; ``key`` and ``value`` may have fewer heads.
        key: See ``query``.
        value: See ``query``.
        starts: int32 ``[texts + 1]``: where each text starts, and the end.
        longest: Tokens of the longest text.
        dropout: Share of the attention probabilities that is dropped.
        scale: Multiplies the products; 1 / sqrt(head_dim) by default.
        causal: Whether a token sees those before it alone.
        window: A token sees those less far away than this; None is all.

    Returns:
        ``[tokens, heads, head_dim]``; None where no kernel can do this: a window in float32.
    """
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        # Rotary position embeddings leave float32 under autocast.
        query, key, value = query.to(half), key.to(half), value.to(half)
    if value.dtype in (torch.float16, torch.bfloat16):
        return _flash(query, key, value, starts, longest, dropout, scale, causal, window)
    if window is not None and longest > window:
        return None
    return _memory_efficient(query, key, value, starts, longest, dropout, scale, causal)


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
    dropout: float,
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Memory-efficient attention (Rabe and Staats 2021), which also takes float32."""
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
        dropout,
        CAUSAL_FROM_TOP_LEFT if causal else 0,
        compute_log_sumexp=torch.is_grad_enabled(),
        scale=scale,
    )
    return output[0]
