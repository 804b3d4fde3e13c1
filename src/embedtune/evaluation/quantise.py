"""Documents as an index of codes has them."""

import numpy as np
import torch
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor
from torch.nn import functional as F

PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}
"""Bits a number of a stored document takes."""
BLOCK = 8192
"""Documents that are quantised at once."""


def as_stored(documents: Tensor, precision: str) -> Tensor:
    """Return documents as an index of codes has them, for float32 queries to be compared with.

    Embeddings of length 1 are coded by sentence-transformers' ``quantize_embeddings``. A code of
    ``int8`` stands for the middle of its 255th of the coordinate's range over all documents, one
    of ``binary`` for its sign.

    Args:
        documents: float32 ``[n, d]``.
        precision: ``int8`` or ``binary``.

    Returns:
        float32 ``[n, d]``.
    """
    stored = F.normalize(documents, dim=-1)
    ranges = torch.stack([stored.amin(dim=0), stored.amax(dim=0)]).numpy()
    step = (ranges[1] - ranges[0]) / 255
    for block in stored.split(BLOCK):  # views
        if precision == "int8":
            codes = np.asarray(quantize_embeddings(block, "int8", ranges=ranges))
            values = ranges[0] + (codes + np.float32(128.5)) * step
        else:
            bits = np.unpackbits(quantize_embeddings(block, "ubinary"), axis=1, count=len(step))
            values = bits * np.float32(2) - 1
        block.copy_(torch.from_numpy(values))
    return stored


def megabytes(width: int, precision: str) -> int:
    """Return the MB (10^6 bytes) of a million embeddings, which is the bytes of one.

    >>> megabytes(384, "float32"), megabytes(384, "binary")
    (1536, 48)
    """
    return -(-width * PRECISIONS[precision] // 8)
