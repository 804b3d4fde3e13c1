"""End a fit whose loss or gradient is no number, before a weight is touched by it."""

import logging
import math
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW

from embedtune.checkpoints.find import folder_of, last_checkpoint
from embedtune.checkpoints.read import read_facts
from embedtune.data.batch import Batch
from embedtune.distributed import exchange
from embedtune.distributed.zero import ZeRO
from embedtune.errors import InputError, TrainingError
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")

MOST_PLACES = 5
"""Rows of a batch that are named."""


class Asked(NamedTuple):
    """What a GPU was asked of a step, and answers while it computes the next.

    Attributes:
        ready: When the answer is there.
        values: float32 ``[2]``, in pinned memory: the loss, and the norm of the gradient.
        step: The step.
        batch: Its batch.
    """

    ready: torch.cuda.Event
    values: Tensor
    step: int
    batch: Batch


class Finite(pl.Callback):
    """End the fit in the step in which its loss or its gradient is not finite.

    A GPU is not waited for: from that step on it leaves every step of the optimiser out, and the
    fit ends where the answer arrives, before the next step or before anything is saved.

    With float16 gradients overflow at times, and the scaler leaves those steps out by itself.
    """

    def __init__(self, skip_nonfinite: int = 0) -> None:
        """Describe what is tolerated.

        Args:
            skip_nonfinite: So many optimiser steps are left out before the fit ends.
        """
        if skip_nonfinite < 0:
            raise InputError(f"skip_nonfinite: expected 0 or more, found {skip_nonfinite}")
        self.skip_nonfinite = skip_nonfinite
        self._forget()

    def _forget(self) -> None:
        self._skipped, self._is_first = 0, True
        self._batch: Batch | None = None
        self._loss: Tensor | None = None
        self._asked: Asked | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what DeepSpeed cannot do."""
        if self.skip_nonfinite and isinstance(trainer.strategy, ZeRO):
            raise InputError("skip_nonfinite: expected 0 under ZeRO, which leaves no step out")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self._forget()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch, to name its rows."""
        self._batch = batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """End the fit at a loss that is no number; the same on every rank."""
        self._loss = exchange.sum_over_ranks(loss.detach())
        if not self._is_first and _runs_ahead(trainer) and not self.skip_nonfinite:
            return
        value = float(self._loss)
        if self._is_first and value == 0:
            self._warn_of_zero()
        self._is_first = False
        if math.isfinite(value):
            return
        if self.skip_nonfinite and _has_scaler(trainer):  # which leaves the step out by itself
            self._count_skipped(trainer, "loss", value)
        elif not self.skip_nonfinite:
            raise self._error(trainer, "loss", value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """End the fit at a gradient that is no number, or leave the step out."""
        if _has_scaler(trainer) or isinstance(trainer.strategy, ZeRO):  # it holds them elsewhere
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        # FSDP may give a rank no part of what is trained: it exchanges as the others do.
        own = torch.zeros((), device=pl_module.device)
        if gradients:
            own = torch.stack(torch._foreach_norm(gradients)).sum()
        norm = exchange.sum_over_ranks(own.float())
        if _runs_ahead(trainer) and not self.skip_nonfinite:
            self._ask(trainer, optimizer, norm)
            return
        value = float(norm)
        if math.isfinite(value):
            return
        self._count_skipped(trainer, "gradient", value)
        optimizer.zero_grad(set_to_none=True)

    def _count_skipped(self, trainer: pl.Trainer, what: str, value: float) -> None:
        """Tell that a step is left out; end the fit if it is one too many."""
        self._skipped += 1
        if self._skipped > self.skip_nonfinite:
            raise self._error(trainer, what, value)
        log.warning(
            "step %s is left out (%s of %s that are tolerated): its %s is %s; %s",
            *(f"{trainer.global_step + 1:,}", self._skipped, self.skip_nonfinite, what, value),
            self._places(cast(EmbeddingModule, trainer.lightning_module)),
        )

    def _ask(self, trainer: pl.Trainer, optimizer: Any, norm: Tensor) -> None:
        """Let the optimiser leave out what is not finite, and read the answer later."""
        assert self._loss is not None
        assert self._batch is not None
        self._hear(trainer)
        found = torch.stack([self._loss.float(), norm])
        is_bad = (~torch.isfinite(found)).any().float()
        former = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = is_bad if former is None else torch.maximum(former, is_bad)
        values = torch.empty(2, pin_memory=found.is_cuda).copy_(found, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self._asked = Asked(ready, values, trainer.global_step + 1, self._batch)

    def _hear(self, trainer: pl.Trainer) -> None:
        """End the fit if what was asked of the step before is not finite."""
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        asked.ready.synchronize()
        for what, value in zip(("loss", "gradient"), asked.values.tolist(), strict=True):
            if not math.isfinite(value):
                raise self._error(trainer, what, value, asked)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save nothing that comes after a step that was left out."""
        self._hear(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate, export and end after a step whose answer was heard."""
        self._hear(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do so within an epoch as well."""
        self._hear(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Ask DeepSpeed, which keeps gradients to itself, before anything is saved."""
        strategy = trainer.strategy
        norm = strategy.gradient_norm() if isinstance(strategy, ZeRO) else None
        if norm is not None and not math.isfinite(norm):
            raise self._error(trainer, "gradient", norm)

    def _warn_of_zero(self) -> None:
        log.warning(
            "the loss of the first batch is 0: the model tells its texts apart already, or there "
            "is nothing to tell apart (no negative, or scores that are all alike)"
        )

    def _error(
        self, trainer: pl.Trainer, what: str, value: float, asked: Asked | None = None
    ) -> TrainingError:
        module = cast(EmbeddingModule, trainer.lightning_module)
        step = trainer.global_step + 1
        if asked is not None:
            step, self._batch = asked.step, asked.batch
        message = f"step {step:,}: the {what} is {value}; {self._places(module)}"
        folder = folder_of(trainer.checkpoint_callbacks)
        good = None if folder is None else last_checkpoint(folder)
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


def _has_scaler(trainer: pl.Trainer) -> bool:
    """Tell whether gradients are scaled, and steps whose gradients overflow left out by that."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _runs_ahead(trainer: pl.Trainer) -> bool:
    """Tell whether the optimiser can leave a step out without being told so by the host."""
    optimizers: list[Any] = trainer.optimizers
    is_fused = all(type(o) is AdamW and o.defaults["fused"] for o in optimizers)
    is_plain = not _has_scaler(trainer) and not isinstance(trainer.strategy, ZeRO)
    return trainer.strategy.root_device.type == "cuda" and is_plain and is_fused
