"""The commands that train or run a model under Lightning's Trainer."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from embedtune.callbacks.earlier_run import earlier_checkpoints
from embedtune.callbacks.out_of_memory import out_of_memory_said
from embedtune.checkpoints.find import best_checkpoint, last_checkpoint, names_of
from embedtune.checkpoints.read import read_facts, read_spec
from embedtune.cli.assembly import (
    callbacks_of,
    latest_beside_best,
    picked_strategy,
    sort_callbacks,
    trainer_settings,
)
from embedtune.cli.config_files import refuse_broken_configs
from embedtune.cli.keys import (
    TRAINER_DEFAULTS,
    add_keys,
    named_classes,
    refuse_nulls,
    refuse_values,
    settle,
)
from embedtune.cli.log_lines import quiet_libraries
from embedtune.cli.lost_ranks import lost_rank_said, tell_of_dead_ranks
from embedtune.cli.mistakes import first_line, tell_of_threads
from embedtune.cli.own_callbacks import refuse_what_clashes
from embedtune.cli.parser import Parser
from embedtune.cli.paths import CHECKPOINT_NAMES, refuse_paths
from embedtune.cli.processes import end_with_rank_0
from embedtune.cli.run_folder import SaveConfig, refuse_withheld
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.distributed import exchange
from embedtune.distributed.strategies import refuse_checkpoint, set_timeout
from embedtune.errors import InputError, TrainingError
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")

SECTIONS = {
    "model": EmbeddingModule,
    "data": EmbeddingDataModule,
    "trainer": pl.Trainer,
    "checkpoint": ModelCheckpoint,
}
"""The class that each section of a configuration builds."""

REFUSALS = (MisconfigurationException, ValueError, TypeError, ImportError)
"""What the Trainer raises of arguments that it does not take."""


class TrainerParser(Parser, LightningArgumentParser):
    """The parser of a command with a Trainer."""


class TrainerCLI(LightningCLI):
    """LightningCLI with embedtune's classes, defaults and callbacks, for one command."""

    def __init__(self, command: str, **settings: Any) -> None:
        """Run a command.

        Args:
            command: ``fit``, ``validate``, ``test`` or ``predict``.
            **settings: Of LightningCLI.
        """
        self._command = command
        super().__init__(**settings)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the command and the arguments of its method that are no options.

        A parser for each of the others would take three times as long to make as this one.
        """
        return {self._command: super().subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside ``model``, ``data`` and ``trainer``."""
        add_keys(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what :func:`main` was given, which need not be the process's own arguments.

        Raises:
            InputError: A YAML file is broken, a secret withheld, a value null that must not be, or
                one that does not do.
        """
        refuse_broken_configs(args)
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        refuse_withheld(config)
        refuse_nulls(config, SECTIONS | named_classes("model.loss", config.model.loss))
        refuse_values(config)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint but its state: YAML and flags win."""

    def before_instantiate_classes(self) -> None:
        """Check the paths of the run, and settle what follows from other keys.

        The run folder keeps the keys as they were given: with other flags other values follow.

        Raises:
            InputError: A folder or a file name is none, or the checkpoint is not there.
        """
        config = self.config[self.subcommand]
        refuse_paths(config)
        if not isinstance(config.seed_everything, bool):
            config.data.seed = config.seed_everything  # which may have been drawn
        self.save_config_kwargs["given"] = config.clone()
        settle(config)

    def instantiate_classes(self) -> None:
        """Build module, data module and Trainer.

        Raises:
            InputError: A value is refused, also where jsonargparse wraps the refusal in its own.
            MisconfigurationException: A class of Lightning's has refused it.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            refusal: BaseException | None = error
            refusals = InputError | MisconfigurationException  # that of Lightning's classes
            while refusal is not None and not isinstance(refusal, refusals):
                refusal = refusal.__cause__ or refusal.__context__
            raise refusal or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with the loggers and callbacks of a run folder."""
        command = str(self.subcommand)
        config = self.config_init[command]
        folder = Path(config.trainer.default_root_dir)
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(folder / "checkpoints")
        self._checkpoint = self._find_checkpoint()
        if config.trainer.enable_checkpointing is False:
            if config.checkpoint.monitor and config.early_stopping_patience is None:
                raise InputError(
                    "checkpoint.monitor: expected checkpoints to keep the best of, found "
                    "trainer.enable_checkpointing false"
                )
            self._parser(command).callback_keys.remove("checkpoint")
        asked = self.config[command].checkpoint
        latest = latest_beside_best(config, asked) if command == "fit" else []
        try:
            picked = picked_strategy(config, command, self.model, self._checkpoint)
            settings = trainer_settings(config, picked, is_fit=command == "fit")
            callbacks = callbacks_of(config, command, picked)
            logger = settings.get("logger", config.trainer.logger)
            refuse_what_clashes([*callbacks, *latest], config, logger)
            trainer: Any = super().instantiate_trainer(callbacks=callbacks, **settings, **kwargs)
        except InputError:
            raise
        except REFUSALS as error:
            raise InputError(f"trainer: {first_line(error)}") from error
        set_timeout(trainer.strategy, config.rank_timeout)
        trainer.callbacks += latest  # last, so that it also saves which is the best
        sort_callbacks(trainer.callbacks, config.checkpoint)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, from a checkpoint where one is given."""
        self._run("fit", **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Measure the sets of ``data.val_path``; the table is our own."""
        self._run("validate", **{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Measure the sets of ``data.test_path``."""
        self._run("test", **{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Predict without gathering in memory what is written to disk."""
        self._run("predict", **{**kwargs, "return_predictions": False})

    def _find_checkpoint(self) -> Path | None:
        """Return the path that ``ckpt_path`` comes to.

        Raises:
            InputError: There is no such checkpoint.
        """
        config = self.config_init[self.subcommand]
        asked, folder = config.ckpt_path, Path(config.checkpoint.dirpath)
        if asked is None:
            return None
        if asked not in CHECKPOINT_NAMES:
            return Path(asked)
        saves = config.checkpoint
        names = names_of(saves.filename, saves.auto_insert_metric_name)
        path = best_checkpoint(folder) if asked == "best" else last_checkpoint(folder, names)
        if path is not None:
            read_facts(path)  # what is damaged is told before the base model is measured
            return path
        earlier = ", ".join(map(str, earlier_checkpoints(folder)))
        elsewhere = f"; those of earlier runs are in {earlier}" if earlier else ""
        if self.subcommand != "fit" or asked != "last":
            kept = " that checkpoint.monitor has kept" if asked == "best" else ""
            raise InputError(
                f"ckpt_path: {asked}: expected a checkpoint{kept} in {folder}, "
                f"found none{elsewhere}"
            )
        level = logging.WARNING if earlier else logging.INFO
        log.log(level, "ckpt_path: last: there is no checkpoint yet%s", elsewhere)
        return path

    def _run(self, command: str, ckpt_path: str | None = None, **kwargs: Any) -> None:
        path = self._checkpoint  # which ckpt_path comes to
        if path is not None:
            refuse_checkpoint(self.trainer.strategy, path)
            if command != "fit":
                self.model.encoder.match(read_spec(path))
        try:
            getattr(self.trainer, command)(ckpt_path=path, **kwargs)
            exchange.leave()
        except Exception as error:
            timeout = self.config_init[self.subcommand].rank_timeout
            said = out_of_memory_said(error, self.trainer)
            said = said or lost_rank_said(error, self.trainer, timeout)
            if said is None:
                raise
            raise TrainingError(said) from error


def trainer_command(argv: Sequence[str]) -> None:
    """Run ``embedtune fit | validate | test | predict``."""
    quiet_libraries()
    tell_of_threads()
    end_with_rank_0()
    tell_of_dead_ranks()
    try:
        _run_trainer(list(argv))
    except MisconfigurationException as error:
        raise InputError(first_line(error)) from error


def _run_trainer(args: list[str]) -> None:
    TrainerCLI(
        args[0],
        model_class=EmbeddingModule,
        datamodule_class=EmbeddingDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=666,
        parser_class=TrainerParser,
        parser_kwargs={"prog": "embedtune"},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
    )
