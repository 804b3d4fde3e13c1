"""End a fit that no longer gets better, also one that goes on after it was ended so."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch import callbacks

from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, whose patience is the configuration's, and which does not start to wait anew.

    Attributes:
        said: Why it has ended the fit, and after which step; empty where it has not.
    """

    said = ""
    _before: Mapping[str, Any] = MappingProxyType({})  # the batches of a step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was counted, but not the patience that it was counted against."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self.said = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train nothing more where the patience was at its end."""
        self.stopping_reason_message = None  # a checkpoint brings that of a fit before
        if trainer.ckpt_path is not None and self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what was counted before the batches of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = self.state_dict()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save that between accumulated batches: who goes on validates between them once more."""
        if trainer.fit_loop._should_accumulate() and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = dict(self._before)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where it has ended the fit: one may go on for a while, by ``trainer.min_epochs``.

        It must come before the callback that writes the report.
        """
        done, steps = trainer.global_step, cast(EmbeddingModule, pl_module).num_steps
        if not trainer.should_stop or done >= steps:
            return
        if self.wait_count >= self.patience:
            kind = "validation" if self.monitor.startswith("val/") else "epoch"
            count = f"{self.wait_count} {kind}{'s' * (self.wait_count != 1)}"
            why = f"{count} without a better {self.monitor} than {float(self.best_score):.4f}; "
            why += "a larger early_stopping_patience goes on"
        elif self.stopping_reason_message:  # it was not finite
            why = self.stopping_reason_message
        else:
            return
        self.said = f"early stopping has ended this fit after step {done:,} of {steps:,}: {why}"
        if trainer.is_global_zero:
            log.info(self.said)
