"""Encode any number of chunks in the memory of one, in one ordinary backward."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embedtune.models import freed_memory
from embedtune.models.encoder import Encoder
from embedtune.models.spec import Features

CHUNKS_PER_TRIM = 8
"""Chunks after which a CPU's freed memory is given back: after each, mapping it anew would take
longer than computing."""


class GradientCache:
    """Gradient caching (Gao et al. 2021): keep one chunk's activations at a time.

    A chunk is computed again, dropout included, when its gradient is due.
    """

    def __init__(self) -> None:
        """Start with nothing encoded."""
        self._encoded = 0

    def encode(self, encoder: Encoder, chunks: list[Features]) -> Tensor:
        """Return the embeddings of all chunks, ``[n, width]``."""

        def encode_again(features: Features) -> Tensor:
            self._return_freed(features["input_ids"].device)
            return encoder(features)

        *cached, last = chunks
        # Backward starts with the last chunk, so its activations are gone before any others come.
        encoded = [checkpoint(encode_again, features, use_reentrant=False) for features in cached]
        return torch.cat([*encoded, encoder(last)])

    def _return_freed(self, device: torch.device) -> None:
        self._encoded += 1
        if device.type == "cpu" and self._encoded % CHUNKS_PER_TRIM == 0:
            # Chunks of many shapes leave holes, which add up to more than a chunk takes.
            freed_memory.return_freed()
