"""The keys beside ``model``, ``data`` and ``trainer``, and what the Trainer's keys default to."""

import inspect
import math
import pkgutil
from collections.abc import Mapping
from typing import Any, get_args

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from embedtune.cli.best_checkpoint import keep_the_best
from embedtune.cli.run_folder import LoggerName
from embedtune.errors import InputError, require_not_negative, require_positive

EPOCHS = 2
"""Of a fit that is given neither ``trainer.max_epochs`` nor ``max_steps``."""

LONGEST_TIMEOUT = 10**6
"""Seconds, twelve days."""

POSITIVE = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
NOT_NEGATIVE = ("log_every_n_steps", "min_epochs", "min_steps")
"""Numbers of the Trainer that Lightning takes whatever they are."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "run",
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


KEYS: dict[str, tuple[Any, Any, str]] = {
    "save_on_epoch_end": (bool, True, "Write an exported folder an epoch."),
    "num_max_checkpoints": (int, 5, "Epochs' exported folders that are kept."),
    "log_with": (
        LoggerName | list[LoggerName] | None,
        None,
        "Loggers; csv and tensorboard by default. trainer.logger wins over it.",
    ),
    "early_stopping_patience": (
        int | None,
        None,
        "Validations without a better checkpoint.monitor after which a fit ends.",
    ),
    "skip_nonfinite": (
        int,
        0,
        "Steps whose gradient is no number that are left out before a fit ends.",
    ),
    "rank_timeout": (
        float,
        1800.0,
        "Seconds for which a rank waits for the others before the run ends.",
    ),
    "anchors": (
        dict[str, float] | None,
        None,
        "By how much sets of data.val_path may fall below the base model, by name.",
    ),
}
"""Type, default and meaning of the keys of a run."""

SETTLED = ("checkpoint.mode", "trainer.max_epochs")
"""Keys that are null unless they are given: they follow from others, see :func:`settle`."""


def add_keys(parser: LightningArgumentParser) -> None:
    """Add the keys of a run."""
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    ours = {"checkpoint.save_last": "link", "checkpoint.enable_version_counter": False}
    parser.set_defaults({**ours, **dict.fromkeys(SETTLED)})
    for name, (kind, default, meaning) in KEYS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=_data_seed)


def settle(config: Any) -> None:
    """Give keys that the user left alone the values that follow from others.

    Args:
        config: The configuration of a command; changed.
    """
    trainer, checkpoint = config.trainer, config.checkpoint
    if trainer.max_epochs is None:
        # An asked max_steps means that many, however many epochs they take.
        trainer.max_epochs = EPOCHS if trainer.max_steps < 0 else -1
    if checkpoint.monitor:
        keep_the_best(checkpoint)
    elif checkpoint.save_on_train_epoch_end is None:
        checkpoint.save_on_train_epoch_end = True  # though an epoch may end without a validation
    checkpoint.mode = checkpoint.mode or "min"
    if trainer.fast_dev_run:
        checkpoint.save_last = False  # the one that Lightning would write, too


def refuse_values(config: Any) -> None:
    """Refuse values that Lightning takes, or refuses too late or for those of other keys.

    Raises:
        InputError: A number is out of range, or a run is to leave nothing.
    """
    if config.trainer.barebones:
        raise InputError("trainer.barebones: expected false, for a run logs and saves, found true")
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise InputError(f"seed_everything: expected a number from 0 to 2**32 - 1, found {seed}")
    for keys, require in ((POSITIVE, require_positive), (NOT_NEGATIVE, require_not_negative)):
        for key in keys:
            if isinstance(config.trainer[key], int | float):  # neither null nor a time
                require(f"trainer.{key}", config.trainer[key])
    if not 0 < config.rank_timeout <= LONGEST_TIMEOUT:
        raise InputError(
            f"rank_timeout: expected seconds above 0, at most {LONGEST_TIMEOUT:,}, "
            f"found {config.rank_timeout}"
        )
    clip = config.trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise InputError(f"trainer.gradient_clip_val: expected a number from 0 on, found {clip}")


def refuse_nulls(config: Any, sections: Mapping[str, type]) -> None:
    """Refuse null, which the parser takes for most keys, where a value of another type is needed.

    Args:
        config: The values of a command.
        sections: The class whose arguments the keys of each section are.

    Raises:
        InputError: It names the key.
    """
    needed = {name: (kind, default) for name, (kind, default, _) in KEYS.items()}
    for section, kind in sections.items():
        for name, argument in inspect.signature(kind).parameters.items():
            if argument.default is not argument.empty:
                needed[f"{section}.{name}"] = argument.annotation, argument.default
    for key, (hint, default) in needed.items():
        is_known = hint not in (Any, inspect.Parameter.empty) and not isinstance(hint, str)
        takes_null = not is_known or type(None) in get_args(hint) or key in SETTLED
        if not takes_null and config.get(key, default) is None:
            raise InputError(f"{key}: expected a value such as {default}, found null")


def named_classes(key: str, value: Any) -> dict[str, type]:
    """Return the classes that a value and its arguments name, by the key of the arguments of each.

    Args:
        key: That of the value.
        value: As it was parsed; of other values there are none.
    """
    if not isinstance(value, Namespace) or "init_args" not in value:
        return {}
    key += ".init_args"
    found = {key: pkgutil.resolve_name(value.class_path)}
    for name, argument in vars(value.init_args).items():
        found |= named_classes(f"{key}.{name}", argument)
    return found


def _data_seed(seed_everything: bool | int) -> int:
    return 666 if isinstance(seed_everything, bool) else seed_everything
