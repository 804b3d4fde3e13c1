"""Which model of a fit is the best."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from embedtune.checkpoints.read import read_facts
from embedtune.training.facts import monitored

log = logging.getLogger("embedtune")


def best_keeper(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the callback that has kept the best checkpoint by a metric, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback
    return None


def describe_choice(trainer: pl.Trainer, base: Mapping[str, float]) -> str:
    """Return a sentence that says which model ``model/`` is, and if the base model is better.

    Args:
        trainer: Of the fit.
        base: Metrics of the base model.
    """
    keeper, monitor = best_keeper(trainer), monitored(trainer)
    if keeper is None:
        last = f"model/ is the model of the last step, {trainer.global_step:,}"
        if monitor:
            return f"{last}: {monitor} was not measured"
        return f"{last}; checkpoint.monitor makes it the best by a metric of data.val_path"
    step = read_facts(Path(keeper.best_model_path))["global_step"]
    score = _score(keeper)
    best = f"model/ is the model of step {step:,}, the best by {monitor} ({score:.4f})"
    if not _is_worse(keeper, base):
        return best
    side = "below" if keeper.mode == "max" else "above"
    return f"{best}, which is {side} the base model's {base[str(monitor)]:.4f}"


def tell_choice(trainer: pl.Trainer, base: Mapping[str, float]) -> None:
    """Log that sentence, as a warning where no checkpoint was as good as the base model."""
    keeper = best_keeper(trainer)
    is_worse = keeper is not None and _is_worse(keeper, base)
    log.log(logging.WARNING if is_worse else logging.INFO, describe_choice(trainer, base))


def _is_worse(keeper: ModelCheckpoint, base: Mapping[str, float]) -> bool:
    """Tell whether the base model's value of the monitored metric is the better one."""
    lead = base.get(str(keeper.monitor), math.nan) - _score(keeper)
    return lead > 0 if keeper.mode == "max" else lead < 0


def _score(keeper: ModelCheckpoint) -> float:
    return float(cast(Tensor, keeper.best_model_score))
