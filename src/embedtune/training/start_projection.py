"""Append the projection that a run needs, and start it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from embedtune.data.batch import Batch
from embedtune.data.collate import Collator
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.data.records import Format
from embedtune.errors import require_choice
from embedtune.models.encoder import Encoder
from embedtune.models.projection import ProjectionInit, init_projection, projection_dim

log = logging.getLogger("embedtune")

PCA_EXAMPLES = 512
"""Examples whose texts PCA looks at, or as many as the encoder is wide where that is more."""
TEXTS_PER_COORDINATE = 4
"""Of the encoder's, for a start from the teacher. Fitted to fewer it would know the texts by heart,
and leave training little to learn from."""
SAMPLE_MAX_LEN = 128
"""Tokens of each text of a sample: its beginning is enough to tell how a model lays texts out."""


def start_projection(
    encoder: Encoder,
    init: ProjectionInit | None,
    mrl_dims: list[int] | None,
    data: EmbeddingDataModule,
    device: torch.device,
    broadcast: Callable[[Any], Any],
) -> None:
    """Append the projection that a run needs, if it needs one.

    Args:
        encoder: Gets the projection.
        init: How it starts; None is ``teacher`` for distillation of enough texts, else ``pca``.
        mrl_dims: Widths to train; None trains the full width alone.
        data: The opened data.
        device: Where a sample is embedded.
        broadcast: Returns rank 0's object on every rank.
    """
    teacher_dim = data.teacher_dim if data.format == Format.DISTILL else None
    enough = TEXTS_PER_COORDINATE * encoder.width
    is_given = init not in (None, "none")
    if init is None:
        has_enough = teacher_dim is not None and len(data.datasets["train"]) >= enough
        init = "teacher" if has_enough else "pca"
    require_choice("model.projection_init", init, ProjectionInit)
    width = projection_dim(encoder, init, mrl_dims, teacher_dim)
    if width is None:
        if is_given:
            log.info("projection_init %s starts nothing: no projection is appended", init)
        return
    sample, teacher = None, None
    if init in ("pca", "teacher"):
        count = enough if init == "teacher" else max(PCA_EXAMPLES, encoder.width)
        aim = "the principal axes" if init == "pca" else "the way to the teacher's embeddings"
        log.info("finding %s by the texts of up to %s examples", aim, f"{count:,}")
        sample, batch = _embed_sample(encoder, data, device, count)
        if init == "teacher":
            sample, teacher = sample[batch.query], batch.teacher
    linear = encoder.append_projection(width).linear
    init_projection(linear, init, sample, teacher)
    # Every rank has drawn or computed its own.
    linear.load_state_dict(broadcast(linear.state_dict()))


def sample_embeddings(
    encoder: Encoder, data: EmbeddingDataModule, device: torch.device, count: int
) -> Tensor:
    """Embed queries and positives of a fixed sample of ``count`` examples, ``[n, hidden]``."""
    return _embed_sample(encoder, data, device, count)[0]


def _embed_sample(
    encoder: Encoder, data: EmbeddingDataModule, device: torch.device, count: int
) -> tuple[Tensor, Batch]:
    """Return the embeddings of a sample, and the batch that says whose they are."""
    sample = data.datasets["train"].sample(count)
    collate = Collator(encoder, SAMPLE_MAX_LEN, SAMPLE_MAX_LEN, data.tokens_per_chunk)
    encoder.to(device).eval()
    examples = [
        example._replace(positives=example.positives[:1], negatives=(), scores=(), tokens=None)
        for example in sample
    ]
    # One batch, whatever the batch size and the ranks: its chunks are as small as any.
    batch = collate(examples)
    chunks = move_data_to_device(batch.chunks, device)
    # Flash attention takes half precision alone.
    needs_half = "flash" in (encoder.attn_implementation or "")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=needs_half):
        return torch.cat([encoder(features) for features in chunks]).cpu(), batch
