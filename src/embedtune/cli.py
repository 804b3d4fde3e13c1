"""The command line: Trainer commands by LightningCLI, the others as plain functions."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from embedtune.datamodule import EmbeddingDataModule
from embedtune.errors import InputError
from embedtune.export import ExportError, ExportModel, export_checkpoint
from embedtune.module import EmbeddingModule
from embedtune.parser import Parser, fail
from embedtune.precision import default_precision
from embedtune.predict import WriteEmbeddings
from embedtune.progress import RunSummary, Throughput
from embedtune.projection import parse_dims
from embedtune.strategies import named_strategy
from embedtune.teach import teach

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

CHECKPOINT_NAMES = ("last", "best", "hpc", "registry")
"""Values of ``ckpt_path`` that Lightning resolves itself."""

OVERVIEW = """\
usage: embedtune COMMAND ...

Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out.

  fit        train: embedtune fit --config run.yaml (any key also as a flag)
  validate   loss on data.val_path, of a model or of a checkpoint (--ckpt_path)
  test       the same on data.test_path
  predict    embeddings of the queries of data.predict_path, as .npy
  export     a training checkpoint as a sentence-transformers folder
  teach      a teacher's embeddings of a data set, for distillation
  evaluate   nDCG@10 of models at several widths on a retrieval test set
  demo-data  training and test data from the docstrings of installed packages

embedtune COMMAND --help tells the options of a command.
"""


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
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(folder / "checkpoints")
        if config.trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        callbacks = list(config.trainer.callbacks or [])
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(TQDMProgressBar())
        if is_fit:
            callbacks += [RunSummary(), Throughput()]
            callbacks += [ExportModel(config.save_on_epoch_end, config.num_max_checkpoints)]
        elif self.subcommand == "predict":
            callbacks += [WriteEmbeddings()]
        trainer: Any = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        # After the checkpoint: an export that fails must not cost the epoch.
        trainer.callbacks.sort(key=lambda callback: isinstance(callback, ExportModel))
        return trainer

    def predict(self, **kwargs: Any) -> None:
        """Predict without gathering in memory what is written to disk."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


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
        earlier = len(list(folder.glob("metrics-*.csv")))
        metrics.rename(folder / f"metrics-{earlier + 1}.csv")


# --- Commands without a Trainer ---------------------------------------------------------


def export_command(argv: Sequence[str]) -> None:
    """Run ``embedtune export CHECKPOINT OUT``."""
    parser = Parser(prog="embedtune export", description="Export a training checkpoint.")
    parser.add_argument("checkpoint", type=str, help="a .ckpt file of a fit")
    parser.add_argument("out", type=str, help="where the sentence-transformers folder goes")
    args = parser.parse_args(argv)
    difference = export_checkpoint(Path(args.checkpoint), Path(args.out))
    log.info("exported and verified %s (largest difference %.1e)", args.out, difference)


def teach_command(argv: Sequence[str]) -> None:
    """Run ``embedtune teach --model T --data f.jsonl --out store``."""
    parser = Parser(prog="embedtune teach")
    parser.add_function_arguments(teach)
    teach(**parser.parse_args(argv).as_dict())


def evaluate_command(argv: Sequence[str]) -> None:
    """Run ``embedtune evaluate MODEL.. --data FOLDER``."""
    from embedtune.evaluate import evaluate_models, format_table, read_beir, write_results

    parser = Parser(prog="embedtune evaluate", description="Compare models on a BEIR folder.")
    parser.add_argument("models", type=str, nargs="+", help="hub names or folders")
    parser.add_argument("--data", type=str, required=True, help="folder of the test set")
    parser.add_argument("--dims", type=str, default=None, help="widths, such as 384,128,64")
    parser.add_argument(
        "--out", type=str, default=None, help="folder for evaluation.json and a chart"
    )
    args = parser.parse_args(argv)
    dims = None if args.dims is None else parse_dims(args.dims, "dims")
    results = evaluate_models(args.models, read_beir(Path(args.data)), dims)
    sys.stdout.write(format_table(results) + "\n")
    if args.out is not None:
        write_results(results, Path(args.out))


def demo_data_command(argv: Sequence[str]) -> None:
    """Run ``embedtune demo-data --out DIR``."""
    from embedtune.demo import harvest

    parser = Parser(prog="embedtune demo-data", description="Harvest pairs from docstrings.")
    parser.add_argument("--out", type=str, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    log.info("wrote %s: %s", args.out, harvest(Path(args.out)))


def trainer_command(argv: Sequence[str]) -> None:
    """Run ``embedtune fit | validate | test | predict``."""
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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "export": export_command,
    "teach": teach_command,
    "evaluate": evaluate_command,
    "demo-data": demo_data_command,
}
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


class LinesAboveProgress(logging.Handler):
    """Write log lines to stderr without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line above the bar."""
        tqdm.write(self.format(record), file=sys.stderr)


def quiet_libraries() -> None:
    """Let embedtune's own lines through, and of the libraries what a user can act on."""
    logging.basicConfig(
        format="%(message)s", level=logging.WARNING, handlers=[LinesAboveProgress()]
    )
    log.setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Said whenever deepspeed is installed and imported, by transformers, on a CPU.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    disable_progress_bar()  # of loading and saving weights
    for message in (
        ".*does not have many workers",  # num_workers is documented where it is set
        ".*SpearmanCorrcoef. will save all targets",
        ".*Total length of `list` across ranks is zero",  # no validation set
        ".*custom batch sampler .GlobalBatchSampler. for prediction",  # it returns all
        ".*isinstance.treespec, LeafSpec.",  # Lightning with a newer torch
        ".*Checkpoint directory .* exists and is not empty",  # a run folder is run in again
        ".*Experiment logs directory .* exists and is not empty",
        ".*`torch.distributed..* is deprecated",  # DeepSpeed with a newer torch
        ".*DTensor instead and we are deprecating ShardedTensor",  # FSDP with a newer torch
        ".*`_get_pg_default_device` will be deprecated",
        ".*Multiple backends are registered with this ProcessGroup",
        ".*When saving the DeepSpeed Stage 3 checkpoint",  # embedtune export reads it
        ".*resuming from a checkpoint that ended before the epoch ended",  # the sampler goes on
    ):
        warnings.filterwarnings("ignore", message)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that ``argv`` (by default the process's own arguments) asks for."""
    args = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    sys.path.append(str(Path.cwd()))  # a loss of the user's own, named by its import path
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW)
        return
    command, rest = args[0], args[1:]
    try:
        if command in TRAINER_COMMANDS:
            trainer_command(args)
        elif command in COMMANDS:
            COMMANDS[command](rest)
        else:
            known = ", ".join((*TRAINER_COMMANDS, *COMMANDS))
            fail(f"expected a command ({known}), found {command!r}")
    except InputError as error:
        fail(str(error))
    except ExportError as error:
        fail(str(error), code=1)
