"""Measure what a run that was stopped after a step had not come to measure."""

from typing import Any, cast

import lightning.pytorch as pl

from embedtune.checkpoints.resume import validates_at
from embedtune.training.module import EmbeddingModule


class MissedValidation(pl.Callback):
    """Validate before the first step where a checkpoint was saved after a step, and no more.

    A validation that was due there would be lost for good: for the best model, for the patience of
    early stopping, and for the curves.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run it as Lightning does within an epoch."""
        module, running = cast(EmbeddingModule, pl_module), cast(Any, trainer)
        is_measured = bool(module.metrics) or not trainer.enable_validation
        if trainer.ckpt_path is None or is_measured or not validates_at(module.place, trainer):
            return
        running.validating = True
        validation = running.fit_loop.epoch_loop.val_loop
        epochs, ended = running.fit_loop.epoch_progress.current, module.place.batch == 0
        epochs.completed -= ended  # it is of the epoch before, for callbacks and their file names
        validation.restarting = False  # else it would count the batches of the one before as done
        validation.run()
        epochs.completed += ended
        running.training = True
