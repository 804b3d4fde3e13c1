"""Show how far the fit is."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

SECONDS = 0.5
"""Between two looks at the loss: whoever reads it waits for the GPU."""
SHOWN = ("train/loss", "train/examples_per_s")


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the loss, which is read now and then."""

    def __init__(self) -> None:
        """Start with nothing read."""
        super().__init__()
        self._read = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move on, unless that was a moment ago."""
        now, is_last = time.monotonic(), batch_idx + 1 == self.total_train_batches
        if is_last or now - self._read >= SECONDS:
            self._read = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what is shown beside the steps."""
        metrics = super().get_metrics(trainer, pl_module)
        found = trainer.callback_metrics
        return metrics | {name: float(found[name]) for name in SHOWN if name in found}
