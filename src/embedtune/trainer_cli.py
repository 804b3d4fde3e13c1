"""The commands that train or run a model under Lightning's Trainer."""

import ctypes
import itertools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from embedtune import gather
from embedtune.baseline import Baseline
from embedtune.checkpoint import (
    SavesFolders,
    WholeFiles,
    best_checkpoint,
    last_checkpoint,
    read_spec,
)
from embedtune.datamodule import EmbeddingDataModule
from embedtune.errors import InputError, require_positive
from embedtune.export import ExportModel
from embedtune.module import EmbeddingModule
from embedtune.parser import Parser
from embedtune.precision import default_precision
from embedtune.predict import WriteEmbeddings
from embedtune.progress import RunSummary, Throughput
from embedtune.run_report import RunReport
from embedtune.strategies import named_strategy, refuse_checkpoint

log = logging.getLogger("embedtune")

LoggerName = Literal["csv", "tensorboard", "wandb"]

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "run",
    "max_epochs": 2,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

CHECKPOINT_NAMES = ("last", "best", "hpc", "registry")
"""Values of ``ckpt_path`` that are no paths; the last two are resolved by Lightning."""


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration of a fit to ``<default_root_dir>/config.yaml``."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; only a fit that runs again in the same folder overwrites it."""
        if stage != "fit":
            return
        path = Path(trainer.default_root_dir) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True)


class TrainerCLI(LightningCLI):
    """LightningCLI with embedtune's classes, defaults and callbacks."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside ``model``, ``data`` and ``trainer``."""
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what :func:`main` was given, which need not be the process's own arguments."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint but its state: YAML and flags win."""

    def before_instantiate_classes(self) -> None:
        """Check the paths of the run, and give the data a seed that was drawn.

        Raises:
            InputError: The run folder is a file, or the checkpoint is not there.
        """
        config = self.config[self.subcommand]
        folder, checkpoint = Path(config.trainer.default_root_dir), config.ckpt_path
        if folder.is_file():
            raise InputError(
                f"trainer.default_root_dir: expected a folder, found the file {folder}"
            )
        if checkpoint not in (None, *CHECKPOINT_NAMES) and not Path(checkpoint).exists():
            raise InputError(
                f"ckpt_path: expected a checkpoint or one of {', '.join(CHECKPOINT_NAMES)}, "
                f"found nothing at {checkpoint}"
            )
        if not isinstance(config.seed_everything, bool):
            config.data.seed = config.seed_everything
        if self.subcommand == "fit" and config.checkpoint.monitor:
            _keep_the_best(config.checkpoint)

    def instantiate_classes(self) -> None:
        """Build module, data module and Trainer.

        Raises:
            InputError: A value is refused, also where jsonargparse wraps the refusal in its own.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            refusal: BaseException | None = error
            while refusal is not None and not isinstance(refusal, InputError):
                refusal = refusal.__cause__ or refusal.__context__
            raise refusal or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with the loggers and callbacks of a run folder."""
        config = self.config_init[self.subcommand]
        folder = Path(config.trainer.default_root_dir)
        is_fit = self.subcommand == "fit"
        if config.trainer.logger is None:
            kwargs["logger"] = make_loggers(config.log_with, folder) if is_fit else False
        if isinstance(config.trainer.strategy, str):
            kwargs["strategy"] = named_strategy(config.trainer.strategy)
        if config.trainer.precision is None and is_fit:
            kwargs["precision"] = default_precision(str(config.trainer.accelerator))
        saves_files = not isinstance(kwargs.get("strategy", config.trainer.strategy), SavesFolders)
        if saves_files and config.trainer.plugins is None:
            kwargs["plugins"] = [WholeFiles()]
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(folder / "checkpoints")
        latest: list[ModelCheckpoint] = []
        if config.trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        elif is_fit and config.checkpoint.monitor and config.checkpoint.save_last:
            # Beside the best, of which alone last.ckpt would be: a run goes on from the latest.
            asked = self.config[self.subcommand].checkpoint
            latest = [_keep_the_latest(asked, str(config.checkpoint.dirpath))]
            config.checkpoint.save_last = False
        callbacks = list(config.trainer.callbacks or [])
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(TQDMProgressBar())
        if is_fit:
            baseline, summary = Baseline(config.anchors), RunSummary()
            callbacks += [baseline, summary, Throughput(), *_early_stopping(config)]
            callbacks += [RunReport(summary, baseline)]
            callbacks += [ExportModel(config.save_on_epoch_end, config.num_max_checkpoints)]
        elif self.subcommand == "predict":
            callbacks += [WriteEmbeddings()]
        trainer: Any = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        trainer.callbacks += latest  # last, so that it also saves which is the best
        # After the checkpoint: an export that fails must not cost the epoch. Throughput comes last,
        # so that what the others do after a step is not taken for waiting.
        order = {ExportModel: 1, RunReport: 2, Throughput: 3}
        trainer.callbacks.sort(key=lambda callback: order.get(type(callback), 0))
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, from a checkpoint where one is given."""
        self._run("fit", **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Measure the validation loss."""
        self._run("validate", **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Measure the test loss."""
        self._run("test", **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict without gathering in memory what is written to disk."""
        self._run("predict", **{**kwargs, "return_predictions": False})

    def _run(self, command: str, ckpt_path: str | None = None, **kwargs: Any) -> None:
        path: Path | str | None = ckpt_path
        if ckpt_path in ("last", "best"):
            folder = Path(self.config_init[self.subcommand].checkpoint.dirpath)
            path = last_checkpoint(folder) if ckpt_path == "last" else best_checkpoint(folder)
            if path is None and (command != "fit" or ckpt_path == "best"):
                kept = "" if ckpt_path == "last" else " that checkpoint.monitor has kept"
                raise InputError(
                    f"ckpt_path: {ckpt_path}: expected a checkpoint{kept} in {folder}, found none"
                )
            if path is None:
                log.info("ckpt_path: last: there is no checkpoint yet")
        if path is not None and str(path) not in CHECKPOINT_NAMES:
            refuse_checkpoint(self.trainer.strategy, Path(path))
            if command != "fit":
                self.model.match(read_spec(Path(path)))
        getattr(self.trainer, command)(ckpt_path=path, **kwargs)


def _keep_the_best(checkpoint: Any) -> None:
    """Settle what follows from ``checkpoint.monitor``."""
    metric = checkpoint.monitor.split("/")
    if metric[0] in ("train", "val"):
        checkpoint.mode = "min" if "loss" in metric else "max"
    if metric[0] == "val" and checkpoint.save_on_train_epoch_end is None:
        checkpoint.save_on_train_epoch_end = False  # but with the validation, before any export
    checkpoint.filename = checkpoint.filename or "best-{epoch}-{step}"


def _keep_the_latest(asked: Any, folder: str) -> ModelCheckpoint:
    """Return what saves the latest checkpoint as often as ``asked`` looks for the best."""
    return ModelCheckpoint(
        folder,
        save_last=asked.save_last,
        enable_version_counter=False,
        every_n_train_steps=asked.every_n_train_steps,
        every_n_epochs=asked.every_n_epochs,
        train_time_interval=asked.train_time_interval,
    )


def _early_stopping(config: Any) -> list[EarlyStopping]:
    patience, monitor = config.early_stopping_patience, config.checkpoint.monitor
    if patience is None:
        return []
    if monitor is None:
        raise InputError(
            "early_stopping_patience: expected checkpoint.monitor to name the metric, found null"
        )
    require_positive("early_stopping_patience", patience)
    return [EarlyStopping(monitor, patience=patience, mode=config.checkpoint.mode)]


def _data_seed(seed_everything: bool | int) -> int:
    return 666 if isinstance(seed_everything, bool) else seed_everything


def make_loggers(names: LoggerName | list[LoggerName] | None, folder: Path) -> list[Logger]:
    """Return the loggers of ``log_with``, all of which write into the run folder."""
    chosen = names or ["csv", "tensorboard"]
    loggers: list[Logger] = []
    for name in [chosen] if isinstance(chosen, str) else chosen:
        if name == "csv":
            keep_earlier_metrics(folder)
            loggers.append(CSVLogger(folder, name="", version=""))
        elif name == "tensorboard":
            loggers.append(TensorBoardLogger(folder, name="", version=""))
        else:
            try:
                loggers.append(WandbLogger(save_dir=folder, project="embedtune"))
            except ModuleNotFoundError:
                raise InputError("log_with: wandb needs pip install 'embedtune[wandb]'") from None
    return loggers


@rank_zero_only
def keep_earlier_metrics(folder: Path) -> None:
    """Rename the metrics of an earlier run in this folder, which CSVLogger would delete."""
    metrics = folder / "metrics.csv"
    if metrics.exists():
        numbered = (folder / f"metrics-{number}.csv" for number in itertools.count(1))
        metrics.rename(next(path for path in numbered if not path.exists()))


# --- Running ----------------------------------------------------------------------------


def trainer_command(argv: Sequence[str]) -> None:
    """Run ``embedtune fit | validate | test | predict``."""
    if gather.launched_rank() and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        _die_with_parent()  # rank 0; torchrun and SLURM see to those that they start
    TrainerCLI(
        EmbeddingModule,
        EmbeddingDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=666,
        parser_class=Parser,
        parser_kwargs={"prog": "embedtune"},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=list(argv),
    )
    gather.leave()


def _die_with_parent() -> None:
    """Let the kernel end this rank with rank 0, for which it would wait until a timeout."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
