"""Save the last step of a fit, wherever it ends."""

import contextlib
import logging
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from embedtune.checkpoints.find import LAST, folder_of
from embedtune.checkpoints.read import read_facts
from embedtune.errors import InputError
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")


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

    ``checkpoint.every_n_train_steps`` and the like may have saved an earlier one last, or this one
    before it was validated: without what was measured then, such as which model is the best. It
    also says what ends a fit before its time, or lets it train nothing at all.
    """

    def __init__(self) -> None:
        """Have trained nothing yet."""
        self._trains = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self._trains = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know that something is left to train."""
        self._trains = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it where it is not saved."""
        if _is_time_up(trainer):
            steps = f"{trainer.global_step:,} of {cast(EmbeddingModule, pl_module).num_steps:,}"
            log.warning("trainer.max_time: the fit ends after step %s", steps)
        folder = folder_of(trainer.checkpoint_callbacks)
        keeps = any(getattr(keeper, "save_last", None) for keeper in trainer.checkpoint_callbacks)
        if folder is None or not keeps or cast(Any, trainer).fast_dev_run:
            return
        last = folder / LAST
        lacks = _lacks(last, trainer, cast(EmbeddingModule, pl_module)) if last.exists() else ""
        lacks = trainer.strategy.broadcast(lacks)
        if lacks == "step":
            save_last(trainer)
        elif lacks:  # what it is a link to is of this step
            trainer.save_checkpoint(last.resolve())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why a fit that goes on has trained nothing."""
        if self._trains or trainer.ckpt_path is None:
            return
        why = "trainer.max_epochs or max_steps is reached"
        if _is_time_up(trainer):
            why = "trainer.max_time, which counts the time before too, is used up"
        log.warning("nothing is left to train after step %s: %s", f"{trainer.global_step:,}", why)


def _lacks(last: Path, trainer: pl.Trainer, module: EmbeddingModule) -> str:
    """Return what a checkpoint lacks: the last ``step`` or its ``metrics``; empty where nothing."""
    facts: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # it is damaged
        facts = read_facts(last)
    if facts.get("global_step", -1) < trainer.global_step:
        return "step"
    is_measured = bool(facts.get("training_facts", {}).get("metrics"))
    return "metrics" if module.metrics and not is_measured else ""


def _is_time_up(trainer: Any) -> bool:
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
    return any((timer.time_remaining() or 1) <= 0 for timer in timers)
