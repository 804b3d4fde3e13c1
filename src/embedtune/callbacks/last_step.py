"""Save the last step of a fit, wherever it ends."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from embedtune.checkpoints.find import LAST, folder_of, step_of


def save_last(trainer: pl.Trainer) -> Path | None:
    """Save ``last.ckpt`` now, and return it; None where a fit saves no checkpoints.

    All ranks must call it.
    """
    folder = folder_of(trainer.checkpoint_callbacks)
    if folder is None:
        return None
    path = folder / LAST
    if trainer.is_global_zero and path.is_symlink():
        path.unlink()  # torch's writer would follow it, to the best checkpoint
    trainer.save_checkpoint(path)
    return path


class LastStep(pl.Callback):
    """Let ``last.ckpt`` be of the last step, before the model of that is exported.

    ``checkpoint.every_n_train_steps`` and the like may have saved an earlier one last.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it where it is not saved."""
        folder = folder_of(trainer.checkpoint_callbacks)
        if folder is None or cast(Any, trainer).fast_dev_run:
            return
        last = folder / LAST
        is_older = last.exists() and step_of(last) < trainer.global_step
        if trainer.strategy.broadcast(is_older):
            save_last(trainer)
