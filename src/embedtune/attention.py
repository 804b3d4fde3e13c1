"""Attention over texts that lie one after another, without padding between them, on a CPU.

Flash attention's variable-length kernels do this on GPUs. Here each text is attended to by itself,
texts of one length together, so that neither the linear layers nor attention compute any padding.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "embedtune_varlen"
"""The name under which transformers finds this attention; padded inputs go to its own ``sdpa``."""

LEVELS = 1 << 16
"""Dropout compares 16 random bits: four times as many masks a second as with one draw each."""


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; transformers' attention interface.

    Args:
        module: The attention layer.
        query: ``[1, heads, tokens, width]``; ``key`` and ``value`` may have fewer heads.
        key: See ``query``.
        value: See ``query``.
        attention_mask: Of padded inputs.
        dropout: Share of the attention probabilities that is dropped.
        scaling: Multiplies the products; 1 / sqrt(width) by default.
        is_causal: Whether a token sees those before it alone; the module's own by default.
        cu_seq_lens_q: Where each text starts, and the end, ``[texts + 1]``; without it the input is
            padded.
        sliding_window: A token sees those less far away than this; None is all.
        kwargs: What only padded inputs take.

    Returns:
        ``[1, tokens, heads, width]``, and no attention probabilities.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **kwargs,
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    lengths = cu_seq_lens_q.diff().tolist()
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # One split and one concatenation: the gradient of each slice would be as large as the whole.
    parts = [states[0].transpose(0, 1).split(sizes) for states in (query, key, value)]
    attended = []
    for (length, count), *states in zip(runs, *parts, strict=True):
        q, k, v = (s.reshape(count, length, *s.shape[1:]).transpose(1, 2) for s in states)
        mask = _window_mask(length, sliding_window, causal)
        output = _attend(q, k, v, mask, dropout, scaling, causal and mask is None)
        attended.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None], None


def _window_mask(length: int, window: int | None, causal: bool) -> Tensor | None:
    if window is None or length <= window:
        return None
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
) -> Tensor:
    """Attend within texts of one length, ``[texts, heads, length, width]``."""
    if dropout and not causal and query.shape[1] == key.shape[1]:
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        scores = (query * scale) @ key.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        dropped, kept_share = dropout_mask(probabilities.shape, dropout)
        return (probabilities.masked_fill(dropped, 0.0) @ value) / kept_share
    kind = query.dtype
    if kind == torch.bfloat16:
        # torch's fused backward for bfloat16 takes several times as long as that for float32.
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(kind)


def dropout_mask(shape: Sequence[int], dropout: float) -> tuple[Tensor, float]:
    """Draw which elements dropout zeroes from torch's CPU generator.

    torch draws them one by one in one thread, which takes longer than attention itself.

    Returns:
        bool of ``shape``, and the share of elements that is kept: ``1 - dropout`` to 16 bits.
    """
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped_levels = round(dropout * LEVELS)
    levels = bits.view(torch.int16)[:count].view(*shape)
    return levels < dropped_levels - LEVELS // 2, 1 - dropped_levels / LEVELS


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
