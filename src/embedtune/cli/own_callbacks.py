"""What callbacks of the user's own may not share with others: a state, and files of checkpoints."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from embedtune.cli.paths import AnyMetric
from embedtune.errors import InputError


def refuse_what_clashes(callbacks: Sequence[pl.Callback], config: Any, logger: Any) -> None:
    """Refuse callbacks that cannot be side by side.

    Args:
        callbacks: Of the run, but for ``checkpoint``.
        config: The configuration of the command, instantiated.
        logger: That of the run, or several.

    Raises:
        InputError: A checkpoint could not tell two apart, or one would delete what another keeps.
    """
    keeps = config.trainer.enable_checkpointing is not False
    every = [*callbacks, *([config.checkpoint] if keeps else [])]
    _refuse_twins(every)
    first = next(iter(logger), None) if isinstance(logger, list | tuple) else logger
    is_of_run = isinstance(first, CSVLogger | TensorBoardLogger) and first.name == ""
    own = Path(config.trainer.default_root_dir, "checkpoints")
    _refuse_same_files(every, None if first and not is_of_run else own)


def _refuse_twins(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse callbacks whose states have one name in a checkpoint."""
    seen: set[str] = set()
    for callback in callbacks:
        if type(callback).state_dict is pl.Callback.state_dict:
            continue
        if callback.state_key in seen:
            raise InputError(
                f"trainer.callbacks: expected one {type(callback).__name__} of these settings, "
                "found two; the keys checkpoint and early_stopping_patience bring their own"
            )
        seen.add(callback.state_key)


def _refuse_same_files(callbacks: Sequence[pl.Callback], default: Path | None) -> None:
    """Refuse what would save under one name.

    Args:
        callbacks: Of the run.
        default: Folder of those that name none; None where a logger of the user's own does.
    """
    seen: set[str] = set()
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_top_k == 0:
            continue
        folder = callback.dirpath or default
        if folder is None:
            continue
        numbers: Any = AnyMetric(epoch=0, step=0)
        name = callback.format_checkpoint_name(numbers)  # below its folder, if it names one
        path = os.path.realpath(name if callback.dirpath else Path(folder, name))
        if path in seen:
            found = callback.filename or "{epoch}-{step}"
            raise InputError(
                "checkpoint.filename and that of each ModelCheckpoint in trainer.callbacks: "
                f"expected one of its own in {folder}, found {found} twice: one would delete what "
                "the other keeps"
            )
        seen.add(path)
