"""End a fit that no longer gets better, also one that goes on after it was ended so."""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks

log = logging.getLogger("embedtune")


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, whose patience is the configuration's, and which does not start to wait anew."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was counted, but not the patience that it was counted against."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train nothing more where the patience was at its end."""
        if trainer.ckpt_path is not None and self.wait_count >= self.patience:
            trainer.should_stop = True
            log.info(
                "early stopping has ended this fit: %s validations without a better %s; a larger "
                "early_stopping_patience goes on",
                *(self.wait_count, self.monitor),
            )
