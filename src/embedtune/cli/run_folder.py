"""What a fit keeps in its run folder beside checkpoints: configuration and loggers."""

import itertools
import logging
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from embedtune.checkpoints.write import CHECKPOINTS
from embedtune.errors import InputError
from embedtune.secrets import WITHHELD, withheld_keys, withhold
from embedtune.whole_files import sweep, sweep_together, write_text

log = logging.getLogger("embedtune")

LoggerName = Literal["csv", "tensorboard", "wandb"]


class SaveConfig(SaveConfigCallback):
    """Write the configuration of a fit, but its secrets, to ``<default_root_dir>/config.yaml``."""

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
    _set_aside(folder / "metrics.csv")


@rank_zero_only
def keep_earlier_checkpoints(folder: Path) -> None:
    """Rename the checkpoints of an earlier run in this folder, and what was measured of them."""
    checkpoints = folder / "checkpoints"
    sweep(checkpoints)
    sweep_together(checkpoints, CHECKPOINTS)
    _set_aside(folder / "metrics.json")
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        aside = _set_aside(checkpoints)
        log.warning("%s: an earlier run's checkpoints are now in %s", folder, aside)


def _set_aside(path: Path) -> Path | None:
    """Rename a file or folder to the first of NAME-1, NAME-2, .. that is free."""
    if not path.exists():
        return None
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return path.rename(next(other for other in numbered if not other.exists()))
