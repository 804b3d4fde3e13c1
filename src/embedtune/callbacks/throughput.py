"""Say while training how fast it goes."""

import time
from typing import Any

import lightning.pytorch as pl
import torch


class Throughput(pl.Callback):
    """Log how fast the epoch goes so far, and what it costs beside the model.

    ``train/examples_per_s`` is over all ranks; of this rank are ``train/padding_efficiency``, the
    share of the computed tokens that are no padding, and ``train/input_wait``, the share of the
    time in which the step waited for its batch.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._restart()

    def _restart(self) -> None:
        self._examples, self._waited = 0, 0.0
        self._real_tokens, self._tokens = 0, 0
        self._since = self._ended = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also for a run that goes on in the middle of an epoch."""
        self._restart()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time between epochs (validation, export) out of the count."""
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a validation in the middle of an epoch out as well."""
        now = time.perf_counter()
        self._since += now - self._ended
        self._ended = now

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the step before as waiting."""
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch, and log where the Trainer logs."""
        self._examples += len(batch.example_id) * trainer.world_size
        real, computed = batch.tokens
        self._real_tokens += real
        self._tokens += computed
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "padding_efficiency": self._real_tokens / self._tokens,
            "input_wait": self._waited / elapsed,
        }
        # Numbers would be copied to a GPU, which waits for it; a tensor stays where it is.
        for name, rate in rates.items():
            pl_module.log(f"train/{name}", torch.tensor(rate), batch_size=1)
        examples_per_s = torch.tensor(self._examples / elapsed)
        pl_module.log("train/examples_per_s", examples_per_s, batch_size=1)
        self._ended = time.perf_counter()
