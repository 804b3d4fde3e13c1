"""Which model of a fit is the best."""

from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from embedtune.checkpoints.read import read_facts


def best_keeper(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the callback that has kept the best checkpoint by a metric, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback
    return None


def describe_choice(trainer: pl.Trainer) -> str:
    """Return a sentence that says which model ``model/`` is."""
    keeper = best_keeper(trainer)
    if keeper is None:
        last = f"model/ is the model of the last step, {trainer.global_step:,}"
        asked = [getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks]
        if any(asked):
            return f"{last}: {next(filter(None, asked))} was not measured"
        return f"{last}; checkpoint.monitor makes it the best by a metric of data.val_path"
    step = read_facts(Path(keeper.best_model_path))["global_step"]
    score = float(cast(Tensor, keeper.best_model_score))
    return f"model/ is the model of step {step:,}, the best by {keeper.monitor} ({score:.4f})"
