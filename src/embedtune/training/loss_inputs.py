"""What a batch trains towards, as a loss is given it."""

import torch

from embedtune.data.batch import Batch
from embedtune.losses.inputs import Target


def target_of(batch: Batch) -> Target:
    """Return the target of this rank's batch."""
    queries = torch.arange(len(batch.query), device=batch.query.device)
    return Target(
        scores=batch.scores,
        list_index=batch.list_index,
        own=torch.searchsorted(batch.list_index, queries),
        teacher=batch.teacher,
        query_id=batch.query_id,
        positive_id=batch.positive_id,
        negative_id=batch.negative_id if len(batch.negative_id) else None,
        positive_query_id=batch.query_id[batch.list_index],
        known_positive_id=batch.known_positive_id,
        query_text_id=batch.query_text_id,
    )
