"""Attention over texts that lie one after another, without padding between them.

GPUs have kernels for this (:mod:`embedtune.models.gpu_attention`). On a CPU, and where these cannot
do what a model asks for, texts of about one length are attended to together, so that the layers
around attention, nearly all of the work, compute no padding, and attention hardly any.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embedtune.models.dropout import attend_with_dropout
from embedtune.models.gpu_attention import Blocks, attend_on_gpu
from embedtune.models.spread import gather_back, spread

VARLEN = "embedtune_varlen"
"""The name under which transformers finds this attention; padded inputs go to its own ``sdpa``."""


SLACK = 16
"""Tokens by which texts that attention pads to one length may differ: a bucket for each length of
short texts would cost more than the padding."""


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
    max_length_q: int = 0,
    sliding_window: int | None = None,
    block_source: Tensor | None = None,
    block_place: Tensor | None = None,
    block_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; transformers' attention interface.

    Args:
        module: The attention layer.
        query: ``[1, heads, tokens, head_dim]``; ``key`` and ``value`` may have fewer heads.
        key: See ``query``.
        value: See ``query``.
        attention_mask: Of padded inputs.
        dropout: Share of the attention probabilities that is dropped.
        scaling: Multiplies the products; 1 / sqrt(head_dim) by default.
        is_causal: Whether a token sees those before it alone; the module's own by default.
        cu_seq_lens_q: Where each text starts, and the end, ``[texts + 1]``; without it the input is
            padded.
        max_length_q: Tokens of the longest text.
        sliding_window: A token sees those less far away than this; None is all.
        block_source: With the next two the :class:`Blocks` of texts on a GPU.
        block_place: See ``block_source``.
        block_bias: See ``block_source``.
        kwargs: What only padded inputs take.

    Returns:
        ``[1, tokens, heads, head_dim]``, and no attention probabilities.

    Raises:
        ValueError: The window of the model is in the mask of padded inputs alone.
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
    if sliding_window is None:
        _refuse_masked_window(module)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    packed = [states[0].transpose(0, 1) for states in (query, key, value)]
    if query.is_cuda:
        blocks = None
        if block_source is not None and block_place is not None and block_bias is not None:
            blocks = Blocks(block_source, block_place, block_bias)
        q, k, v = packed
        texts = cu_seq_lens_q, max_length_q, blocks
        output = attend_on_gpu(q, k, v, *texts, dropout, scaling, causal, sliding_window)
        if output is not None:
            return output[None], None
    buckets = divide(tuple(cu_seq_lens_q.diff().tolist()), query.device)
    # Moved once, and split: the gradient of each slice would be as large as the whole.
    parts = [_spread(states, buckets) for states in packed]
    attended = []
    for bucket, *states in zip(buckets.shapes, *parts, strict=True):
        q, k, v = (s.unflatten(0, bucket.shape).transpose(1, 2) for s in states)
        mask = _mask(bucket, sliding_window, causal, query.device)
        output = _attend(q, k, v, mask, dropout, scaling, causal and mask is None)
        attended.append(output.transpose(1, 2).flatten(0, 1))
    return _gather_back(torch.cat(attended), buckets)[None], None


def _refuse_masked_window(module: torch.nn.Module) -> None:
    """Refuse a layer that may have a window and does not tell it: packed texts have no mask."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and not getattr(config, "layer_types", None):
        raise ValueError(f"expected the sliding window of {window} tokens, found none")


class Bucket(NamedTuple):
    """Neighbouring texts of about one length, which attention pads to the longest of them.

    Attributes:
        shape: Texts, and the length of the longest.
        real: bool ``[texts, 1, 1, length]``: which tokens are no padding; None if all are.
    """

    shape: tuple[int, int]
    real: Tensor | None


class Buckets(NamedTuple):
    """How the tokens of a chunk are laid out for attention.

    Attributes:
        shapes: The buckets.
        source: int64 ``[padded]``: the token that comes to each place; any one where it is padding.
        place: int64 ``[tokens]``: the place that each token comes to.
    """

    shapes: list[Bucket]
    source: Tensor
    place: Tensor


@lru_cache(maxsize=8)  # every layer asks again
@torch.inference_mode(False)  # what validation asks for first, training may need too
def divide(lengths: tuple[int, ...], device: torch.device) -> Buckets:
    """Divide the texts of a chunk, the longest first, into buckets of up to ``SLACK`` tokens less.

    >>> [bucket.shape for bucket in divide((40, 39, 7, 7), torch.device("cpu")).shapes]
    [(2, 40), (2, 7)]
    """
    shapes: list[Bucket] = []
    places: list[Tensor] = []
    start, padded = 0, 0
    while start < len(lengths):
        longest = lengths[start]
        end = start
        while end < len(lengths) and 0 <= longest - lengths[end] <= SLACK:
            end += 1
        real = torch.arange(longest) < torch.tensor(lengths[start:end])[:, None]
        places.append(padded + real.flatten().nonzero().flatten())
        mask = None if real.all() else real[:, None, None].to(device)
        shapes.append(Bucket((end - start, longest), mask))
        padded += real.numel()
        start = end
    place = torch.cat(places)
    source = torch.zeros(padded, dtype=torch.int64).index_copy(0, place, torch.arange(len(place)))
    return Buckets(shapes, source.to(device), place.to(device))


def _spread(states: Tensor, buckets: Buckets) -> tuple[Tensor, ...]:
    """Return the states of each bucket, ``[texts x length, heads, head_dim]``."""
    if len(buckets.source) > len(buckets.place):
        states = spread(states, buckets.source, buckets.place)
    return states.split([math.prod(bucket.shape) for bucket in buckets.shapes])


def _gather_back(states: Tensor, buckets: Buckets) -> Tensor:
    if len(buckets.source) == len(buckets.place):
        return states
    return gather_back(states, buckets.place)


def _mask(bucket: Bucket, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """Return which tokens see which, bool, or None where ``causal`` says all of it."""
    length = bucket.shape[1]
    if window is None or length <= window:
        # Padding comes last: no token sees it that sees only those before it.
        return None if causal else bucket.real
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    near = distance.abs() < window
    if causal:
        return near & (distance >= 0)
    if bucket.real is None:
        return near
    # Padding far from every token sees itself: its output is not used, but must be a number.
    return near & (bucket.real | (distance == 0))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
) -> Tensor:
    """Attend within texts of one padded length, ``[texts, heads, length, head_dim]``."""
    is_plain = not causal and query.shape[1] == key.shape[1]
    if 0 < dropout < 1 and is_plain and query.device.type == "cpu":
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        with torch.autocast("cpu", enabled=False):
            return attend_with_dropout(query, key, value, mask, dropout, scale)
    # A CPU's fused backward for bfloat16 takes several times as long as that for float32.
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).to(query.dtype)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
