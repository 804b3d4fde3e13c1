"""Say what did not fit into memory, what did, and which keys make it less."""

import re
from typing import Any, cast

import lightning.pytorch as pl

from embedtune.data.batch import Batch
from embedtune.errors import is_out_of_memory
from embedtune.training.module import EmbeddingModule

ASKED = re.compile(r"allocate (\d[\d.,]* ?(?:bytes|[KMGT]i?B))")


class OutOfMemory(pl.Callback):
    """Remember the batch of a step, and the largest one that fitted."""

    def __init__(self) -> None:
        """Start with none."""
        self._batch: Batch | None = None
        self._fitted = (0, 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch while it is computed."""
        self._batch = batch

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Remember its size where it was the largest yet."""
        self._batch = None
        tokens, longest = _sizes(batch)
        self._fitted = max(self._fitted[0], tokens), max(self._fitted[1], longest)

    def describe(self, trainer: pl.Trainer) -> str:
        """Return what is known: the step's batch and chunks, the keys, what fitted, what helps."""
        module = cast(EmbeddingModule, trainer.lightning_module)
        data, cache = module.data, str(module.grad_cache).lower()
        keys = (
            f"data.batch_size is {data.batch_size}, data.tokens_per_chunk "
            f"{data.tokens_per_chunk:,}, model.grad_cache {cache}"
        )
        if self._batch is None:  # not in a step
            return f"{keys}; give a lower data.tokens_per_chunk"
        tokens, longest = _sizes(self._batch)
        told = [
            f"its batch is {tokens:,} tokens in {len(self._batch.chunks):,} chunks, the largest "
            f"of {longest:,}",
            keys,
        ]
        if self._fitted[0]:
            batch, chunk = self._fitted
            told.append(f"batches of {batch:,} tokens in chunks of {chunk:,} have fitted")
        if module.grad_cache:
            told.append("give a lower data.tokens_per_chunk")
        else:
            told.append(
                "give model.grad_cache true, which keeps one chunk at a time in memory, or a lower "
                "data.batch_size"
            )
        return "; ".join([f"step {trainer.global_step + 1:,}", *told])


def out_of_memory_said(error: Exception, trainer: pl.Trainer) -> str | None:
    """Return what to say where memory has not sufficed, None for other errors."""
    if not is_out_of_memory(error):
        return None
    asked = ASKED.search(str(error))
    said = "out of memory" + (f" (asked for {asked[1]} more)" if asked else "")
    callbacks = cast(Any, trainer).callbacks
    return "; ".join(
        [said, *(c.describe(trainer) for c in callbacks if isinstance(c, OutOfMemory))]
    )


def _sizes(batch: Batch) -> tuple[int, int]:
    """Return the tokens of a batch and of its largest chunk, with padding."""
    chunks = [chunk["input_ids"].numel() for chunk in batch.chunks]
    return sum(chunks), max(chunks)
