"""Go on from the last checkpoint as if the run had not been killed while it saved that."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from embedtune.checkpoints.find import LAST
from embedtune.checkpoints.unfinished import finish_save


class UnfinishedSave(pl.Callback):
    """Finish the save, and let the checkpoint be replaced by the next as any other.

    For a run that goes on from ``last``. Lightning would keep what a run went on from, which is
    right for a file that the user has named.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish it before another is saved."""
        if trainer.ckpt_path is None or cast(Any, trainer).fast_dev_run:
            return
        self._finish(trainer)
        trainer.ckpt_path = str(Path(trainer.ckpt_path).parent / LAST)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish it where nothing was left to train."""
        if trainer.ckpt_path is not None and not cast(Any, trainer).fast_dev_run:
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            finish_save(cast(Any, trainer).checkpoint_callbacks, Path(str(trainer.ckpt_path)))
        trainer.strategy.barrier()
