"""Make one chunk of the token features of several texts: packed one after another, or padded."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from embedtune.models.towers import UNLIMITED, longest_input, positions

PACKED_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What tells attention where each text of a packed chunk starts, by transformers' names."""


class Layout(NamedTuple):
    """Where the tokens of a packed chunk lie once its texts are padded.

    Made with the chunk, on the CPU: a GPU would have to be waited for.

    Attributes:
        real: bool ``[texts, longest]``: which tokens are no padding.
        place: int64 ``[tokens]``: the place of each token among all of them.
    """

    real: Tensor
    place: Tensor


CHUNK_COST, GPU_CHUNK_COST = 32, 4096
"""What a padded chunk costs whatever is in it, in tokens: on a GPU starting its kernels takes the
time of thousands of them."""

LONGEST_TRIAL = 1024
"""Tokens up to which packing is tried: on a text longer than a sliding window or than the length at
which rotary positions are scaled, and on more tokens together than a text has positions."""


def join_packed(rows: Sequence[dict[str, Tensor]], first_position: int) -> dict[str, Any]:
    """Lay single texts' features, each tensor ``[t]``, one after another as ``[1, tokens]``.

    Args:
        rows: The features of each text.
        first_position: The number of a text's first position.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    joined = {k: torch.cat([r[k] for r in rows])[None] for k in rows[0]}
    joined.pop("attention_mask")
    values = starts, starts, max(lengths), max(lengths)
    positions = torch.arange(max(lengths)).expand(len(rows), -1)
    real = positions < torch.tensor(lengths)[:, None]
    return {
        **joined,
        "position_ids": first_position + positions[real][None],
        "layout": Layout(real, real.flatten().nonzero().flatten()),
        **dict(zip(PACKED_INPUTS, values, strict=True)),
    }


def unpack(features: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Pad what a packed chunk became, for the modules after the transformer."""
    kept = {k: v for k, v in features.items() if k not in (*PACKED_INPUTS, "position_ids")}
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


def join_padded(rows: Sequence[dict[str, Tensor]], tokenizer: Any) -> dict[str, Tensor]:
    """Pad single texts' features, each tensor ``[t]``, to ``[n, longest]`` as a tokenizer does."""
    values = {
        "input_ids": getattr(tokenizer, "pad_token_id", 0),
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    return {
        name: pad_sequence(
            [row[name] for row in rows],
            batch_first=True,
            padding_value=values.get(name, 0),
            padding_side=getattr(tokenizer, "padding_side", "right"),
        )
        for name in rows[0]
    }


def has_plain_attention(transformer: nn.Module) -> bool:
    """Tell whether attention goes through transformers' interface and is of a kind that packs."""
    if not isinstance(transformer, Transformer) or transformer.backend != "torch":
        return False
    if not getattr(transformer.model, "is_backend_compatible", lambda: False)():
        return False
    kinds = set(getattr(transformer.config, "layer_types", None) or ["full_attention"])
    known = kinds <= {"full_attention", "sliding_attention"}
    is_tried = turning_point(transformer) <= LONGEST_TRIAL
    return transformer.config._attn_implementation == "sdpa" and known and is_tried


def turning_point(transformer: nn.Module) -> int:
    """Return the tokens up to which a text says nothing of how longer ones are encoded.

    A sliding window shows beyond its width, and rotary positions that are scaled for the longest
    text of a batch beyond the length from which they are.
    """
    config: Any = transformer.config
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = config.sliding_window if has_window else 0
    longest_unscaled = unscaled(transformer)
    reach = max(longest_input(transformer) or UNLIMITED, positions(transformer) or UNLIMITED)
    return max(window or 0, longest_unscaled if longest_unscaled < reach else 0)


def unscaled(transformer: nn.Module) -> int:
    """Return the tokens beyond which a batch's longest text scales the positions of all."""
    config: Any = getattr(transformer, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters.values() if "rope_type" not in parameters else [parameters]
    found = [UNLIMITED]
    for kind in (kind for kind in kinds if isinstance(kind, dict)):
        if kind.get("rope_type") == "dynamic":
            found.append(config.max_position_embeddings)
        elif kind.get("rope_type") == "longrope":
            found.append(kind["original_max_position_embeddings"])
    return min(found)
