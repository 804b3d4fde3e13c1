"""Settle what of a run depends on its data: the loss, and how the projection starts."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from embedtune.batch import Collator
from embedtune.datamodule import EmbeddingDataModule
from embedtune.encoder import Encoder
from embedtune.errors import InputError
from embedtune.losses import Distillation, ListwiseKL, Loss, Matryoshka, default_loss
from embedtune.projection import ProjectionInit, init_projection, projection_dim
from embedtune.records import Format
from embedtune.sampler import Key

log = logging.getLogger("embedtune")

PCA_EXAMPLES = 512
"""Examples whose texts PCA looks at, or as many as the encoder is wide where that is more."""
PCA_MAX_LEN = 128
"""Tokens of each of these texts: its beginning is enough to find the principal axes."""


def settle_loss(
    loss: Loss | None,
    temperature: float | None,
    mrl_dims: list[int] | None,
    data: EmbeddingDataModule,
) -> Loss:
    """Return the loss of a run.

    Args:
        loss: What the user asked for, None for the format's own.
        temperature: Of the format's own loss; None is its default.
        mrl_dims: Widths to train; None trains the full width alone.
        data: The opened data.

    Raises:
        InputError: The loss does not take the data.
    """
    row_format = data.format
    assert row_format is not None, "only predict has no format"
    loss = loss or default_loss(row_format, temperature)
    if row_format not in loss.formats:
        raise InputError(
            f"model.loss: {type(loss).__name__} takes {' or '.join(sorted(loss.formats))} "
            f"data, found {row_format} rows"
        )
    if isinstance(loss, ListwiseKL) and loss.over == "list":
        _refuse_singleton_lists(data)
    if mrl_dims is None:
        return loss
    if isinstance(loss, Distillation):
        loss.mrl_dims = loss.mrl_dims or mrl_dims
        return loss
    return Matryoshka(loss, mrl_dims)


def _refuse_singleton_lists(data: EmbeddingDataModule) -> None:
    for opened in data.datasets.values():
        rows = opened.rows
        lengths = rows.list_lengths
        if lengths.min() < 2:
            raise InputError(
                f"{rows.place(int(lengths.argmin()))}: a list of one text carries no signal "
                "for ListwiseKL; use model.loss: embedtune.losses.CoSENT (sentence pairs with "
                "scores), or ListwiseKL with over: batch"
            )


def settle_projection(
    encoder: Encoder,
    init: ProjectionInit,
    mrl_dims: list[int] | None,
    data: EmbeddingDataModule,
    device: torch.device,
    broadcast: Callable[[Any], Any],
) -> None:
    """Append the projection that a run needs, if it needs one.

    Args:
        encoder: Gets the projection.
        init: How it starts.
        mrl_dims: Widths to train; None trains the full width alone.
        data: The opened data.
        device: Where PCA's sample is embedded.
        broadcast: Returns rank 0's object on every rank.
    """
    teacher_dim = data.teacher_dim if data.format == Format.DISTILL else None
    width = projection_dim(encoder, init, mrl_dims, teacher_dim)
    if width is None:
        return
    sample = sample_embeddings(encoder, data, device) if init == "pca" else None
    linear = encoder.append_projection(width).linear
    init_projection(linear, init, sample)
    # Every rank has drawn or computed its own.
    linear.load_state_dict(broadcast(linear.state_dict()))


def sample_embeddings(encoder: Encoder, data: EmbeddingDataModule, device: torch.device) -> Tensor:
    """Embed queries and positives of a fixed sample of the examples, ``[n, hidden]``."""
    train = data.datasets["train"]
    count = min(len(train), max(PCA_EXAMPLES, encoder.width))
    indices = np.linspace(0, len(train) - 1, count).astype(int).tolist()
    collate = Collator(encoder, PCA_MAX_LEN, PCA_MAX_LEN, data.tokens_per_chunk)
    log.info("finding the principal axes of the texts of %s examples", f"{count:,}")
    encoder.to(device).eval()
    examples = [
        example._replace(positives=example.positives[:1], negatives=(), scores=(), tokens=None)
        for example in train.__getitems__([Key(0, index) for index in indices])
    ]
    # One batch, whatever the batch size and the ranks: its chunks are as small as any.
    chunks = move_data_to_device(collate(examples).chunks, device)
    # Flash attention takes half precision alone.
    needs_half = "flash" in (encoder.attn_implementation or "")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=needs_half):
        return torch.cat([encoder(features) for features in chunks]).cpu()
