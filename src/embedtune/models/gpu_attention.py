"""Attention over packed texts on a GPU, by torch's own kernels for texts of unequal length.

The operators below ``scaled_dot_product_attention``; docs/architecture.md says why. They are
wrapped as one operator with its own gradient, which torch.compile takes as a whole.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CAUSAL_FROM_TOP_LEFT = 1
"""What the memory-efficient kernel calls a mask in which a token sees those before it."""
SHORT = 48
"""Mean tokens of a text up to which the memory-efficient kernel, whose tiles are smaller, is the
faster one: twice as fast at 18 tokens, half as fast at 350 (H200, bfloat16)."""


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
    """Attend within each text.

    In half precision, also under autocast, long texts go to FlashAttention-2 (Dao 2023), all others
    to memory-efficient attention (Rabe and Staats 2021).

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
    reach = 0 if window is None or longest <= window else window
    head_dim = query.shape[2]
    is_half = value.dtype in (torch.float16, torch.bfloat16)
    can_flash = is_half and head_dim % 8 == 0 and head_dim <= 256 and _has_flash()
    flash = can_flash and (reach > 0 or query.shape[0] > SHORT * (starts.shape[0] - 1))
    if reach and not flash:
        return None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not flash:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    texts = starts, longest
    output, *_ = attend_texts(query, key, value, *texts, dropout, scale, causal, reach, flash)
    return output


@torch.compiler.assume_constant_result
def _has_flash() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


@torch.library.custom_op("embedtune::attend_texts", mutates_args=(), device_types="cuda")
def attend_texts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
    scale: float,
    causal: bool,
    window: int,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as :func:`attend_on_gpu`, by one of the two kernels; a window of 0 is none.

    Returns:
        The output, the logarithms of the sums, and int64 ``[2]``, the generator's state, which
        the memory-efficient kernel reads on the CPU.
    """
    texts = starts, starts, longest, longest
    if flash:
        output, log_sums, state, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *texts, dropout, causal, False, scale=scale, **_sides(window, causal)
        )
        state = state.view(torch.int64) if state.numel() == 2 else starts.new_zeros(2).long()
        return output.contiguous(), log_sums, state
    output, log_sums, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,
        *texts,
        dropout,
        CAUSAL_FROM_TOP_LEFT if causal else 0,
        compute_log_sumexp=True,
        scale=scale,
    )
    state = torch.stack([seed, offset]) if dropout else torch.zeros(2, dtype=torch.int64)
    return output.squeeze(0).contiguous(), log_sums, state


@attend_texts.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
    scale: float,
    causal: bool,
    window: int,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = query.shape
    padded = (starts.shape[0] - 1, heads, (longest + 31) // 32 * 32)
    return (
        query.new_empty(query.shape),
        query.new_empty((heads, tokens) if flash else padded, dtype=torch.float32),
        query.new_empty(2, dtype=torch.int64, device=query.device if flash else "cpu"),
    )


@torch.library.custom_op("embedtune::attend_texts_backward", mutates_args=(), device_types="cuda")
def attend_texts_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    state: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
    scale: float,
    causal: bool,
    window: int,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, the same in every run."""
    texts = starts, starts, longest, longest
    if flash:
        random = state.view(torch.uint64), torch.empty((), dtype=torch.uint64, device=state.device)
        with _deterministic():
            gradients = torch.ops.aten._flash_attention_backward(
                gradient,
                query,
                key,
                value,
                output,
                log_sums,
                *texts,
                dropout,
                causal,
                *random,
                scale=scale,
                **_sides(window, causal),
            )
    else:
        *found, _ = torch.ops.aten._efficient_attention_backward(
            gradient.unsqueeze(0),
            query.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            None,
            output.unsqueeze(0),
            *texts,
            log_sums,
            dropout,
            *state.unbind(),
            CAUSAL_FROM_TOP_LEFT if causal else 0,
            False,
            scale=scale,
            num_splits_key=1,
        )
        gradients = [states.squeeze(0) for states in found]
    dq, dk, dv = (states.contiguous() for states in gradients)
    return dq, dk, dv


@attend_texts_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(states.new_empty(states.shape) for states in (query, key, value))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = inputs[4:]


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    query, key, value, starts, *found = ctx.saved_tensors
    states = query, key, value, *found
    gradients = attend_texts_backward(gradient.contiguous(), *states, starts, *ctx.settings)
    return *gradients, *[None] * 7


attend_texts.register_autograd(_backward, setup_context=_setup_context)


def _sides(window: int, causal: bool) -> dict[str, int]:
    """Return how many tokens are seen on each side, as flash attention is told."""
    if not window:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}


@contextmanager
def _deterministic() -> Iterator[None]:
    """Add up in one order: flash attention asks torch's setting, and has no argument for it."""
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)
        settings.fill_uninitialized_memory = fills
