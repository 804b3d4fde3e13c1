"""Which model of a fit is the best."""

import logging
import math
from pathlib import Path
from typing import NamedTuple, cast

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


class Choice(NamedTuple):
    """Which model ``model/`` is.

    Attributes:
        said: That, in a sentence.
        is_worse: Whether it is the best checkpoint by a metric, and the base model is better.
    """

    said: str
    is_worse: bool


def choice(trainer: pl.Trainer) -> Choice:
    """Return which model of a fit ``model/`` is."""
    keeper, monitor = best_keeper(trainer), monitored(trainer)
    if keeper is None:
        last = f"model/ is the model of the last step, {trainer.global_step:,}"
        if monitor:
            is_measured = monitor in trainer.callback_metrics
            why = "kept no checkpoint" if is_measured else "was not measured"
            return Choice(f"{last}: {monitor} {why}", False)
        how = "checkpoint.monitor makes it the best by a metric of data.val_path"
        return Choice(f"{last}; {how}", False)
    saved = read_facts(Path(keeper.best_model_path))
    score = float(cast(Tensor, keeper.best_model_score))
    said = f"model/ is the model of step {saved['global_step']:,}, the best by {keeper.monitor}"
    # The callback's own score is rounded to float32.
    ours, of_base = (
        saved["training_facts"][kind].get(keeper.monitor, math.nan)
        for kind in ("metrics", "base_metrics")
    )
    is_worse = ours < of_base if keeper.mode == "max" else ours > of_base
    side = "below" if keeper.mode == "max" else "above"
    more = f", which is {side} the base model's {of_base:.4f}" if is_worse else ""
    return Choice(f"{said} ({score:.4f}){more}", is_worse)


def tell_choice(trainer: pl.Trainer) -> None:
    """Log it, as a warning where no checkpoint is as good as the base model."""
    said, is_worse = choice(trainer)
    log.log(logging.WARNING if is_worse else logging.INFO, said)
