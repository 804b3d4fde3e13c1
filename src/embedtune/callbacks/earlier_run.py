"""Put aside what an earlier run has left in the run folder, once a fit really trains.

A fit that is refused before its first step, or tries one batch alone, leaves everything as it was.
"""

import glob
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

from embedtune.checkpoints.find import last_checkpoint, places_of
from embedtune.checkpoints.write import CHECKPOINTS
from embedtune.reports.curves import read_rows
from embedtune.training.module import EmbeddingModule
from embedtune.whole_files import sweep, sweep_together

log = logging.getLogger("embedtune")

NAME = "checkpoints"
"""Folder in the run folder, of epochs' exports and, unless they go elsewhere, checkpoints."""


class MetricsFile(CSVLogger):
    """Writes ``metrics.csv``, and leaves an earlier run's alone until it is told to start.

    CSVLogger would delete that one when a fit begins to read its data.
    """

    def __init__(self, folder: Path) -> None:
        """Hold rows back that are logged before.

        Args:
            folder: The run folder.
        """
        super().__init__(folder, name="", version="")
        self._held: list[tuple[Mapping[str, Any], int | None]] | None = []

    @property
    def experiment(self) -> Any:
        """Return what writes the file; before the start, what writes nothing."""
        return DummyExperiment() if self._held is not None else super().experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        if self._held is None:
            super().log_metrics(cast(Any, metrics), step)
        else:
            self._held.append((metrics, step))

    @rank_zero_only
    def start(self, step: int, changed_sets: Sequence[str] = ()) -> None:
        """Rename the file of an earlier run, and write the rows held back.

        Args:
            step: Steps of that run which this one goes on from; what it tells of them comes first.
            changed_sets: What it tells of these is left out: it was measured on other data.
        """
        if self._held is None:
            return
        earlier = _set_aside(Path(self.save_dir) / "metrics.csv")
        held, self._held = self._held, None
        begins = tuple(f"{name}/" for name in changed_sets)
        # What a killed run had measured after its last save is measured once more by now.
        again = {(at, name) for row, at in held for name in row if name.startswith("val/")}
        for row in read_rows(earlier) if earlier and step else ():
            is_base = "epoch" not in row.values  # though its step is that of the first validation
            values = {
                name: value
                for name, value in row.values.items()
                if not name.startswith(begins) and (is_base or (row.step, name) not in again)
            }
            if row.step < step and values.keys() - {"epoch"}:
                self.log_metrics(values, row.step)
        self.save()  # before a kill could leave less than there was
        for metrics, at in held:
            self.log_metrics(metrics, at)


class EarlierRun(pl.Callback):
    """Rename the metrics of an earlier run in this folder and, of another run, its checkpoints.

    It must come after the callbacks that may refuse a fit.
    """

    def __init__(self) -> None:
        """Have renamed nothing yet."""
        self._has_begun = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self._has_begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rename what is there."""
        self._has_begun = True
        if cast(Any, trainer).fast_dev_run:
            return
        _start_files(trainer, cast(EmbeddingModule, pl_module))
        self._keep_earlier(trainer)
        trainer.strategy.barrier()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rename it for a fit that had nothing left to train, too.

        Its metrics stay, but for those that were measured on other data.
        """
        if self._has_begun:
            return
        module = cast(EmbeddingModule, pl_module)
        if module.changed_sets and goes_on_here(trainer) and not cast(Any, trainer).fast_dev_run:
            _start_files(trainer, module)
        self._keep_earlier(trainer)

    def _keep_earlier(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not goes_on_here(trainer):
            places = set(places_of(trainer.checkpoint_callbacks))
            _keep_earlier(Path(trainer.default_root_dir), places)


def _start_files(trainer: pl.Trainer, module: EmbeddingModule) -> None:
    step = module.place.step if goes_on_here(trainer) else 0
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.start(step, module.changed_sets)


def goes_on_here(trainer: pl.Trainer) -> bool:
    """Tell whether a fit goes on from a checkpoint of the run whose folders it writes to."""
    if trainer.ckpt_path is None:
        return False
    path, places = Path(trainer.ckpt_path).resolve(), places_of(trainer.checkpoint_callbacks)
    deepest = max(places.values(), default=0)  # a metric's name makes folders
    own = {Path(trainer.default_root_dir, NAME).resolve(), *places}
    return not own.isdisjoint(path.parents[: deepest + 1])


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Return where the checkpoints of earlier runs are that were saved in ``folder``."""
    beside = folder.parent.glob(f"{glob.escape(folder.name)}-*")
    return [path for path in sorted([*beside, *folder.glob(f"{NAME}-*")]) if last_checkpoint(path)]


def _keep_earlier(run_folder: Path, places: set[Path]) -> None:
    """Rename the checkpoints of an earlier run, and what was measured of them.

    Args:
        run_folder: Its folder of checkpoints is renamed as a whole.
        places: Where this run saves. Others may keep files there, so checkpoints alone are moved.
    """
    _set_aside(run_folder / "metrics.json")
    own = run_folder / NAME
    _sweep(own)
    if own.is_dir() and any(own.iterdir()):
        aside = _set_aside(own)
        log.warning("%s: an earlier run's checkpoints are now in %s", run_folder, aside)
    for folder in places - {own.resolve()}:
        _sweep(folder)
        if found := list(folder.glob(f"{CHECKPOINTS}*")):
            aside = _free(folder / NAME)
            aside.mkdir()
            for path in found:
                path.rename(aside / path.name)
            log.warning("%s: an earlier run's checkpoints are now in %s", folder, aside)


def _sweep(folder: Path) -> None:
    sweep(folder)
    sweep_together(folder, CHECKPOINTS)


def _set_aside(path: Path) -> Path | None:
    """Rename a file or folder to the first of NAME-1, NAME-2, .. that is free."""
    return path.rename(_free(path)) if path.exists() else None


def _free(path: Path) -> Path:
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return next(other for other in numbered if not other.exists())
