"""Make one chunk of the token features of several texts: packed one after another, or padded."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from embedtune.models.gpu_attention import LARGEST_BLOCK
from embedtune.models.towers import UNLIMITED, longest_input, positions

TextFeatures = dict[str, np.ndarray]
"""Features of one text, each ``[tokens, ..]``: arrays, for a batch has thousands of them, and a
tensor takes ten times as long to make."""

PACKED_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What tells attention where each text of a packed chunk starts, by transformers' names."""

BLOCK_INPUTS = ("block_source", "block_place", "block_bias")
"""What tells it where they lie in blocks: :class:`embedtune.models.gpu_attention.Blocks`."""


class Layout(NamedTuple):
    """Where the tokens of a packed chunk lie once its texts are padded.

    Made with the chunk, on the CPU: a GPU would have to be waited for.

    Attributes:
        real: bool ``[texts, longest]``: which tokens are no padding.
        place: int64 ``[tokens]``: the place of each token among all of them.
    """

    real: Tensor
    place: Tensor


SMALL_BLOCK = 64
"""Tokens of the smallest block of texts, of which all others are multiples."""

CHUNK_COST, GPU_CHUNK_COST = 32, 4096
"""What a padded chunk costs whatever is in it, in tokens: on a GPU starting its kernels takes the
time of thousands of them."""

LONGEST_TRIAL = 1024
"""Tokens up to which packing is tried: on a text longer than a sliding window or than the length at
which rotary positions are scaled, and on more tokens together than a text has positions."""


def join_packed(rows: Sequence[TextFeatures], first_position: int) -> dict[str, Any]:
    """Lay single texts' features one after another as ``[1, tokens]``.

    Args:
        rows: The features of each text.
        first_position: The number of a text's first position; where it is not 0, the one before is
            that of padding, and its token.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    ends = np.cumsum(lengths)
    longest = int(lengths.max())
    starts = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    names = [name for name in rows[0] if name != "attention_mask"]
    joined = {k: _whole(np.concatenate([row[k] for row in rows]))[None] for k in names}
    # Each token's number in its text, and the place of its text's first one once padded.
    numbers = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    place = numbers + np.repeat(np.arange(len(rows)) * longest, lengths)
    positions = first_position + numbers
    # Models that start after the padding do not count it, also where a text spells it out.
    is_padding = joined["input_ids"][0].numpy() == first_position - 1
    if first_position and is_padding.any():
        counted = np.cumsum(is_padding)
        before = np.concatenate([[0], counted])[ends - lengths]
        positions -= counted - np.repeat(before, lengths)
        positions[is_padding] = first_position - 1
    real = torch.from_numpy(np.arange(longest) < lengths[:, None])
    values = starts, starts, longest, longest
    return {
        **joined,
        "position_ids": torch.from_numpy(positions)[None],
        "layout": Layout(real, torch.from_numpy(place)),
        **dict(zip(PACKED_INPUTS, values, strict=True)),
    }


def lay_in_blocks(lengths: np.ndarray, only_short: bool) -> dict[str, Tensor]:
    """Lay texts in blocks of one size, the longest first, and the shortest behind them.

    A kernel takes about as long for a text of 16 tokens as for one of 64 (on an H100 blocks take
    half of flash attention's time at 18 tokens, and as long at 48 to 64).

    Args:
        lengths: Tokens of each text.
        only_short: Lay long texts in none.

    Returns:
        The first two of BLOCK_INPUTS, int64, and ``block_text``, int32 ``[blocks, size]``: the
        number of each place's text, -1 for padding. All made on the CPU, for a GPU would have to be
        waited for. Empty where texts are too long.
    """
    size = -(-int(lengths.max()) // SMALL_BLOCK) * SMALL_BLOCK
    is_short = size <= SMALL_BLOCK or (size <= LARGEST_BLOCK and lengths.mean() <= SMALL_BLOCK / 2)
    if only_short and not is_short:
        return {}
    order = np.argsort(-lengths, kind="stable").tolist()
    known = lengths.tolist()
    first = np.empty(len(lengths), np.int64)
    blocks, front, back = 0, 0, len(order) - 1
    while front <= back:
        at, end = blocks * size, (blocks + 1) * size
        while front <= back and at + known[order[front]] <= end:
            first[order[front]] = at
            at, front = at + known[order[front]], front + 1
        while front <= back and at + known[order[back]] <= end:
            first[order[back]] = at
            at, back = at + known[order[back]], back - 1
        blocks += 1
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1])
    place = tokens + np.repeat(first - (ends - lengths), lengths)
    source, text = np.zeros(blocks * size, np.int64), np.full(blocks * size, -1, np.int32)
    source[place], text[place] = tokens, np.repeat(np.arange(len(lengths)), lengths)
    laid = {"block_source": source, "block_place": place, "block_text": text.reshape(blocks, size)}
    return {name: torch.from_numpy(values) for name, values in laid.items()}


def _whole(values: np.ndarray) -> Tensor:
    """Return a tensor of int64 where values are whole numbers: what models look rows up by."""
    is_whole = np.issubdtype(values.dtype, np.integer)
    return torch.from_numpy(values.astype(np.int64) if is_whole else values)


def unpack(features: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Pad what a packed chunk became, for the modules after the transformer."""
    kept = {
        k: v
        for k, v in features.items()
        if k not in (*PACKED_INPUTS, *BLOCK_INPUTS, "position_ids")
    }
    for name in ("input_ids", "token_embeddings"):
        packed = features[name][0]
        # Moved at once: text by text, the gradient of each would be as large as the whole.
        padded = packed.new_zeros(layout.real.numel(), *packed.shape[1:])
        padded = padded.index_copy(0, layout.place, packed)
        kept[name] = padded.unflatten(0, layout.real.shape)
    kept["attention_mask"] = layout.real.long()
    return kept


def to_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the features of a chunk on ``device``."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
    if "layout" in moved:
        moved["layout"] = Layout(*(tensor.to(device) for tensor in moved["layout"]))
    return moved


def join_padded(rows: Sequence[TextFeatures], tokenizer: Any) -> dict[str, Tensor]:
    """Pad single texts' features to ``[n, longest, ..]`` as a tokenizer does."""
    values = {
        "input_ids": getattr(tokenizer, "pad_token_id", 0),
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    lengths = np.array([len(row["input_ids"]) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    if getattr(tokenizer, "padding_side", "right") == "left":
        real = real[:, ::-1]
    joined = {}
    for name in rows[0]:
        found = np.concatenate([row[name] for row in rows])
        padded = np.full((*real.shape, *found.shape[1:]), values.get(name, 0), found.dtype)
        padded[real] = found
        joined[name] = _whole(padded)
    return joined


def has_plain_attention(transformer: nn.Module) -> bool:
    """Tell whether attention goes through transformers' interface and is of a kind that packs."""
    if not isinstance(transformer, Transformer) or transformer.backend != "torch":
        return False
    if not getattr(transformer.model, "is_backend_compatible", lambda: False)():
        return False
    config: Any = transformer.config.get_text_config()  # of a model of texts and images, too
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    known = kinds <= {"full_attention", "sliding_attention"}
    is_tried = turning_point(transformer) <= LONGEST_TRIAL
    return transformer.config._attn_implementation == "sdpa" and known and is_tried


def turning_point(transformer: nn.Module) -> int:
    """Return the tokens up to which a text says nothing of how longer ones are encoded.

    A sliding window shows beyond its width, and rotary positions that are scaled for the longest
    text of a batch beyond the length from which they are.
    """
    config: Any = cast(Any, transformer).config.get_text_config()
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = config.sliding_window if has_window else 0
    longest_unscaled = unscaled(transformer)
    reach = max(longest_input(transformer) or UNLIMITED, positions(transformer) or UNLIMITED)
    return max(window or 0, longest_unscaled if longest_unscaled < reach else 0)


def unscaled(transformer: nn.Module) -> int:
    """Return the tokens beyond which a batch's longest text scales the positions of all."""
    config: Any = getattr(transformer, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else None
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters.values() if "rope_type" not in parameters else [parameters]
    found = [UNLIMITED]
    for kind in (kind for kind in kinds if isinstance(kind, dict)):
        if kind.get("rope_type") == "dynamic":
            found.append(config.max_position_embeddings)
        elif kind.get("rope_type") == "longrope":
            found.append(kind["original_max_position_embeddings"])
    return min(found)
