"""End a fit whose loss or gradient is no number, before a weight is touched by it."""

import logging
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from embedtune.checkpoints.find import last_checkpoint
from embedtune.checkpoints.read import read_facts
from embedtune.data.batch import Batch
from embedtune.distributed import exchange
from embedtune.distributed.zero import ZeRO
from embedtune.errors import InputError, TrainingError
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")

MOST_PLACES = 5
"""Rows of a batch that are named."""


class Finite(pl.Callback):
    """End the fit in the step in which its loss or its gradient is not finite.

    With float16 gradients overflow at times, and the scaler leaves those steps out by itself.
    """

    def __init__(self, skip_nonfinite: int = 0) -> None:
        """Describe what is tolerated.

        Args:
            skip_nonfinite: So many optimiser steps are left out before the fit ends.
        """
        if skip_nonfinite < 0:
            raise InputError(f"skip_nonfinite: expected 0 or more, found {skip_nonfinite}")
        self.skip_nonfinite, self._skipped = skip_nonfinite, 0
        self._batch: Batch | None = None
        self._is_first = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what DeepSpeed cannot do."""
        if self.skip_nonfinite and isinstance(trainer.strategy, ZeRO):
            raise InputError("skip_nonfinite: expected 0 under ZeRO, which leaves no step out")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch, to name its rows."""
        self._batch = batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """End the fit at a loss that is no number; the same on every rank."""
        value = float(exchange.sum_over_ranks(loss.detach()))
        if self._is_first and value == 0:
            self._warn_of_zero()
        self._is_first = False
        if not torch.isfinite(torch.tensor(value)) and not self.skip_nonfinite:
            raise self._error(trainer, "loss", value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """End the fit at a gradient that is no number, or leave the step out."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if has_scaler or not gradients:  # ZeRO holds them elsewhere
            return
        own = torch.stack(torch._foreach_norm(gradients)).sum()
        norm = float(exchange.sum_over_ranks(own.float()))
        if torch.isfinite(torch.tensor(norm)):
            return
        self._skipped += 1
        if self._skipped > self.skip_nonfinite:
            raise self._error(trainer, "gradient", norm)
        optimizer.zero_grad(set_to_none=True)
        log.warning(
            "step %s is left out (%s of %s that are tolerated): its gradient is %s; %s",
            *(f"{trainer.global_step + 1:,}", self._skipped, self.skip_nonfinite, norm),
            self._places(cast(EmbeddingModule, pl_module)),
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Ask DeepSpeed, which keeps gradients to itself, before anything is saved."""
        strategy = trainer.strategy
        norm = strategy.gradient_norm() if isinstance(strategy, ZeRO) else None
        if norm is not None and not torch.isfinite(torch.tensor(norm)):
            raise self._error(trainer, "gradient", norm)

    def _warn_of_zero(self) -> None:
        log.warning(
            "the loss of the first batch is 0: the model tells its texts apart already, or there "
            "is nothing to tell apart (no negative, or scores that are all alike)"
        )

    def _error(self, trainer: pl.Trainer, what: str, value: float) -> TrainingError:
        module = cast(EmbeddingModule, trainer.lightning_module)
        step = f"{trainer.global_step + 1:,}"
        message = f"step {step}: the {what} is {value}; {self._places(module)}"
        folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        folder = next(filter(None, folders), None)
        good = None if folder is None else last_checkpoint(Path(folder))
        if good is not None:
            message += f"; the last checkpoint is {good} (step {read_facts(good)['global_step']:,})"
        return TrainingError(f"{message}; a lower model.lr or trainer.gradient_clip_val may help")

    def _places(self, module: EmbeddingModule) -> str:
        assert self._batch is not None
        data = module.data.datasets["train"]
        ids = self._batch.example_id.tolist()
        named = ", ".join(data.place(example) for example in ids[:MOST_PLACES])
        more = f" and {len(ids) - MOST_PLACES} more" if len(ids) > MOST_PLACES else ""
        return f"its batch is of {named}{more}"
