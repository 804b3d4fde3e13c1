"""Batches of embeddings for the tests of losses."""

import torch

from embedtune.losses import Embeddings, Target


def retrieval_batch(b=7, m=7, k=2, width=16, dtype=torch.float64):
    """Return a batch with known positives and own texts.

    With more positives than queries it is what one rank has."""
    generator = torch.Generator().manual_seed(b + m + k)
    shapes = [(b, width), (m, width), (m * k, width)][: 3 if k else 2]
    embeddings = Embeddings(
        *(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    )
    own = torch.randperm(m, generator=generator)[:b] if m > b else torch.arange(b)
    query_id = torch.arange(m) % (m - 1)  # the last query is the first one again
    positive_id = 100 + torch.arange(m) % (m - 2)  # the last positives are the first ones again
    negative_id = 200 + torch.arange(m * k) if k else None
    known = torch.stack([positive_id[own], 200 + torch.arange(b), torch.zeros(b).long()], dim=1)
    target = Target(
        own=own,
        query_id=query_id[own],
        positive_id=positive_id,
        negative_id=negative_id,
        positive_query_id=query_id,
        known_positive_id=known,
        query_text_id=positive_id[own].roll(1),  # says what the positive of the one before says
    )
    return embeddings, target
