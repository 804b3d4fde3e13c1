"""What follows from ``checkpoint.monitor``."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune.callbacks.early_stopping import EarlyStopping
from embedtune.errors import InputError, require_positive
from embedtune.evaluation.metric_name import parse_name


def keep_the_best(checkpoint: Any) -> None:
    """Settle what follows from ``checkpoint.monitor`` where the user does not say otherwise."""
    name = parse_name(checkpoint.monitor)
    if checkpoint.mode is None:  # what is no metric of a test set is a loss, or a part of one
        checkpoint.mode = "min" if name is None or name.is_loss else "max"
    if checkpoint.monitor.startswith("val/") and checkpoint.save_on_train_epoch_end is None:
        checkpoint.save_on_train_epoch_end = False  # but with the validation, before any export
    checkpoint.filename = checkpoint.filename or "best-{epoch}-{step}"


def with_each_validation(asked: Any, folder: str) -> ModelCheckpoint:
    """Return what keeps the best checkpoints of a metric that validations measure.

    Asked to save as often as it likes, Lightning's callback would take what is saved between two
    validations for as good as what the last of them has measured.

    Args:
        asked: The keys of ``checkpoint``.
        folder: Where to save.
    """
    settings = {**asked, "dirpath": folder, "every_n_train_steps": None}
    return ModelCheckpoint(**{**settings, "train_time_interval": None})


def keep_the_latest(asked: Any, folder: str) -> ModelCheckpoint:
    """Return what saves the latest checkpoint as often as ``asked`` looks for the best."""
    return ModelCheckpoint(
        folder,
        save_last=asked.save_last,
        enable_version_counter=False,
        every_n_train_steps=asked.every_n_train_steps,
        every_n_epochs=asked.every_n_epochs,
        train_time_interval=asked.train_time_interval,
        save_on_train_epoch_end=True,  # though an epoch may end without a validation
    )


def early_stopping(config: Any) -> list[EarlyStopping]:
    """Return what ends a fit after ``early_stopping_patience`` validations, if that is given."""
    patience, monitor = config.early_stopping_patience, config.checkpoint.monitor
    if patience is None:
        return []
    if monitor is None:
        raise InputError(
            "early_stopping_patience: expected checkpoint.monitor to name the metric, found null"
        )
    require_positive("early_stopping_patience", patience)
    return [
        EarlyStopping(
            monitor,
            patience=patience,
            mode=config.checkpoint.mode,
            # With each validation, for an epoch may end without one.
            check_on_train_epoch_end=not monitor.startswith("val/"),
        )
    ]
