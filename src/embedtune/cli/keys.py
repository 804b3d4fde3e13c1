"""The keys beside ``model``, ``data`` and ``trainer``, and what the Trainer's keys default to."""

import math
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from embedtune.cli.run_folder import LoggerName
from embedtune.errors import InputError, require_positive

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "run",
    "max_epochs": 2,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


def add_keys(parser: LightningArgumentParser) -> None:
    """Add the keys of a run."""
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    parser.set_defaults(
        {"checkpoint.save_last": "link", "checkpoint.enable_version_counter": False}
    )
    parser.add_argument(
        "--save_on_epoch_end",
        type=bool,
        default=True,
        help="Write an exported folder an epoch.",
    )
    parser.add_argument(
        "--num_max_checkpoints",
        type=int,
        default=5,
        help="Epochs' exported folders that are kept.",
    )
    parser.add_argument(
        "--log_with",
        type=LoggerName | list[LoggerName] | None,
        default=None,
        help="Loggers; csv and tensorboard by default. trainer.logger wins over it.",
    )
    parser.add_argument(
        "--early_stopping_patience",
        type=int | None,
        default=None,
        help="Validations without a better checkpoint.monitor after which a fit ends.",
    )
    parser.add_argument(
        "--anchors",
        type=dict[str, float] | None,
        default=None,
        help="By how much sets of data.val_path may fall below the base model, by name.",
    )
    parser.link_arguments("seed_everything", "data.seed", compute_fn=_data_seed)


def refuse_numbers(config: Any) -> None:
    """Refuse numbers that Lightning takes, or refuses too late, in the values of a command.

    Raises:
        InputError: One is out of range.
    """
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise InputError(f"seed_everything: expected a number from 0 to 2**32 - 1, found {seed}")
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if config.trainer[key] is not None:
            require_positive(f"trainer.{key}", config.trainer[key])
    clip = config.trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise InputError(f"trainer.gradient_clip_val: expected a number from 0 on, found {clip}")


def _data_seed(seed_everything: bool | int) -> int:
    return 666 if isinstance(seed_everything, bool) else seed_everything
