"""Assemble the Trainer of a run: strategy, precision, loggers, and callbacks in their order."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO

from embedtune.callbacks.baseline import Baseline
from embedtune.callbacks.earlier_run import EarlierRun
from embedtune.callbacks.end_on_signal import EndOnSignal
from embedtune.callbacks.export_model import ExportModel
from embedtune.callbacks.finite import Finite
from embedtune.callbacks.last_step import LastStep
from embedtune.callbacks.missed_validation import MissedValidation
from embedtune.callbacks.one_fit import OneFit
from embedtune.callbacks.out_of_memory import OutOfMemory
from embedtune.callbacks.progress_bar import ProgressBar
from embedtune.callbacks.run_report import RunReport
from embedtune.callbacks.run_summary import RunSummary
from embedtune.callbacks.shared_folder import SharedFolder
from embedtune.callbacks.stop_on_signal import StopOnSignal
from embedtune.callbacks.throughput import Throughput
from embedtune.callbacks.unfinished_save import UnfinishedSave
from embedtune.callbacks.write_embeddings import WriteEmbeddings
from embedtune.callbacks.write_metrics import WriteMetrics
from embedtune.checkpoints.write import SavesFolders, WholeFiles
from embedtune.cli.best_checkpoint import early_stopping, keep_the_latest, with_each_validation
from embedtune.cli.run_folder import SaveConfig, make_loggers
from embedtune.distributed.pick import AUTO, Picked, find_devices, pick_strategy, strategy_of
from embedtune.distributed.strategies import named_strategy
from embedtune.errors import InputError
from embedtune.training.module import EmbeddingModule
from embedtune.training.precision import default_precision

ORDER: dict[type, int] = {ExportModel: 1, EarlierRun: 2, SaveConfig: 2, RunReport: 3, Throughput: 4}
"""Callbacks that come after the others, those that save checkpoints among them: at the end of a fit
a failing export must not cost a checkpoint. An earlier run's files are touched when the export was
tried. Throughput comes last, so that what the others do after a step is not taken for waiting."""


def picked_strategy(
    config: Any, command: str, module: EmbeddingModule, checkpoint: Path | None
) -> Picked | None:
    """Return the strategy of a run that names none; None where one is named, or Lightning's does.

    Args:
        config: The configuration of the command, instantiated.
        command: A fit divides what it trains; the others need what a checkpoint was saved with.
        module: What is trained.
        checkpoint: What the run goes on from.
    """
    asked = config.trainer
    if asked.strategy != AUTO or (command != "fit" and checkpoint is None):
        return None
    given = ("accelerator", "devices", "num_nodes", "plugins")
    devices = find_devices({key: asked[key] for key in given})
    if checkpoint is not None:
        return strategy_of(checkpoint, devices)
    precision = asked.precision or default_precision(str(asked.accelerator))
    if module.compiles:
        return Picked(AUTO, "for model.compile, which FSDP does not take")
    clips_values = asked.gradient_clip_algorithm == "value"
    return pick_strategy(module.encoder, devices, str(precision), clips_values)


def trainer_settings(config: Any, picked: Picked | None, is_fit: bool) -> dict[str, Any]:
    """Return what the configuration leaves to embedtune among the Trainer's arguments.

    Args:
        config: The configuration of the command, instantiated.
        picked: The strategy where none is named.
        is_fit: Whether the run trains.

    Raises:
        InputError: A plugin saves checkpoints later than it says.
    """
    settings: dict[str, Any] = {}
    asked = config.trainer
    if asked.logger is None:
        folder = Path(asked.default_root_dir)
        settings["logger"] = make_loggers(config.log_with, folder) if is_fit else False
    if isinstance(asked.strategy, str):
        settings["strategy"] = named_strategy(picked.name if picked else asked.strategy)
    if asked.precision is None and is_fit:
        settings["precision"] = default_precision(str(asked.accelerator))
    if not isinstance(settings.get("strategy", asked.strategy), SavesFolders):
        settings["plugins"] = _with_whole_files(asked.plugins)
    return settings


def _with_whole_files(asked: Any) -> list[Any]:
    """Return the plugins of a run, with what saves its checkpoints where none of them does."""
    plugins = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if any(isinstance(plugin, AsyncCheckpointIO) for plugin in plugins):
        raise InputError(
            "trainer.plugins: expected checkpoints that are there once they are saved, for the "
            "former ones are removed then, found AsyncCheckpointIO"
        )
    saves = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if saves else [*plugins, WholeFiles()]


def callbacks_of(config: Any, command: str, picked: Picked | None) -> list[pl.Callback]:
    """Return the callbacks of a command beside those that save checkpoints."""
    own = config.trainer.callbacks or []
    callbacks = [*(own if isinstance(own, list) else [own]), OutOfMemory()]
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    if config.trainer.enable_progress_bar is not False and not has_bar:
        callbacks.append(ProgressBar())
    if command == "fit":
        baseline, summary = Baseline(config.anchors), RunSummary(picked)
        callbacks += [SharedFolder(), OneFit()]
        callbacks += [UnfinishedSave()] if config.ckpt_path == "last" else []
        callbacks += [MissedValidation()]
        callbacks += [Finite(config.skip_nonfinite), StopOnSignal()]
        callbacks += [baseline, summary, Throughput(), *early_stopping(config)]
        callbacks += [RunReport(summary, baseline), LastStep()]
        callbacks += [ExportModel(config.save_on_epoch_end, config.num_max_checkpoints)]
        callbacks += [EarlierRun()]
    elif command == "predict":
        callbacks += [EndOnSignal(), SharedFolder(), WriteEmbeddings()]
    else:
        callbacks += [EndOnSignal(), WriteMetrics()]
    return callbacks


def latest_beside_best(config: Any, asked: Any) -> list[ModelCheckpoint]:
    """Return what keeps the latest checkpoint of a fit where ``checkpoint`` keeps the best.

    ``last.ckpt`` would be the best one alone, but a run goes on from the latest.

    Args:
        config: The configuration of the fit, instantiated; its ``save_last`` is taken over, and the
            best of what validations measure are kept with each of them.
        asked: Its ``checkpoint`` as it was given.
    """
    keeps, monitor = config.trainer.enable_checkpointing is not False, config.checkpoint.monitor
    if not (keeps and monitor):
        return []
    if monitor.startswith("val/"):
        given = with_each_validation(asked.as_dict(), str(config.checkpoint.dirpath))
        config.checkpoint = given
    if not config.checkpoint.save_last:
        return []
    config.checkpoint.save_last = False
    return [keep_the_latest(asked, str(config.checkpoint.dirpath))]


def sort_callbacks(callbacks: list[pl.Callback], checkpoint: ModelCheckpoint) -> None:
    """Bring the callbacks of a run into the order that they rely on.

    Args:
        callbacks: Of the Trainer; changed.
        checkpoint: What keeps the best by ``checkpoint.monitor``, which ``model/`` is whatever else
            a callback of the user's own keeps: the first one is taken.
    """
    if checkpoint.monitor and checkpoint in callbacks:
        callbacks.remove(checkpoint)
        keepers = (n for n, other in enumerate(callbacks) if isinstance(other, ModelCheckpoint))
        callbacks.insert(next(keepers, len(callbacks)), checkpoint)
    callbacks.sort(key=lambda callback: ORDER.get(type(callback), 0))
