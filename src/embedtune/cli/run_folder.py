"""What a fit keeps in its run folder beside checkpoints: configuration and loggers."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from embedtune.callbacks.earlier_run import MetricsFile
from embedtune.errors import InputError
from embedtune.secrets import WITHHELD, withheld_keys, withhold
from embedtune.whole_files import write_text

LoggerName = Literal["csv", "tensorboard", "wandb"]


class SaveConfig(SaveConfigCallback):
    """Write the configuration of a fit, but its secrets, to ``<default_root_dir>/config.yaml``."""

    def __init__(self, parser: Any, settled: Any, given: Any, **settings: Any) -> None:
        """Take both forms of the configuration.

        Args:
            parser: That of the fit.
            settled: With the values that follow from others.
            given: Without them, as it is written.
            **settings: Of Lightning's callback.
        """
        super().__init__(parser, given, **settings)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave an earlier run's file alone: the fit may still be refused."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it of a fit that had nothing left to train, too."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; only a fit that runs again in the same folder overwrites it."""
        if stage != "fit":
            return
        whole = self.parser.dump(self.config, skip_none=False)
        header = [line for line in whole.splitlines() if line.startswith("#")]
        kept = yaml.safe_dump(withhold(yaml.safe_load(whole)), sort_keys=False, allow_unicode=True)
        path = Path(trainer.default_root_dir) / "config.yaml"
        write_text(path, "\n".join([*header, kept]))


def refuse_withheld(config: Any) -> None:
    """Refuse a configuration of a run folder whose secrets were not given again.

    Args:
        config: That of a command.

    Raises:
        InputError: It names the key.
    """
    for key in withheld_keys(config.as_dict()):
        raise InputError(
            f"{key}: expected a value, found {WITHHELD}: config.yaml of a run folder keeps no "
            "secrets; give it again, as a flag or in a second --config"
        )


def make_loggers(names: LoggerName | list[LoggerName] | None, folder: Path) -> list[Logger]:
    """Return the loggers of ``log_with``, all of which write into the run folder, one of a kind."""
    chosen = ["csv", "tensorboard"] if names is None else names
    loggers: list[Logger] = []
    for name in dict.fromkeys([chosen] if isinstance(chosen, str) else chosen):
        if name == "csv":
            loggers.append(MetricsFile(folder))
        elif name == "tensorboard":
            loggers.append(TensorBoardLogger(folder, name="", version=""))
        else:
            try:
                loggers.append(WandbLogger(save_dir=folder, project="embedtune"))
            except ModuleNotFoundError:
                raise InputError("log_with: wandb needs pip install 'embedtune[wandb]'") from None
    return loggers
