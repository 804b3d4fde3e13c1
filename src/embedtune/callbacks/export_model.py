"""Export at the end of every epoch and of the fit."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor

from embedtune.callbacks.best_model import best_keeper, tell_choice
from embedtune.callbacks.earlier_run import goes_on_here
from embedtune.checkpoints.write import CHECKPOINTS
from embedtune.distributed.fsdp import FSDP
from embedtune.distributed.strategies import whole_weights
from embedtune.distributed.zero import ZeRO
from embedtune.errors import ExportError, InputError
from embedtune.export.folder import (
    LOOSE_TOLERANCE,
    TOLERANCE,
    export_encoder,
    is_verified,
    refuse_to_replace,
)
from embedtune.export.probes import embed_probes
from embedtune.export.rebuild import export_checkpoint, rebuild
from embedtune.models.spec import Features
from embedtune.training.before_fit import AVERAGING, averaged
from embedtune.training.facts import training_facts
from embedtune.training.module import EmbeddingModule
from embedtune.whole_files import sweep, sweep_together

log = logging.getLogger("embedtune")

TRIAL = "export-trial"
"""Folder in the run folder that the untouched model is exported to before the first step."""


def export_running(trainer: pl.Trainer, module: EmbeddingModule, folder: Path) -> None:
    """Export the model of a running fit; all ranks must call it, and rank 0 alone may fail."""
    strategy, encoder = trainer.strategy, module.encoder
    training, facts = encoder.training, training_facts(trainer, module)
    try:
        # Attention that was asked for may be one that a CPU does not have.
        if isinstance(strategy, FSDP | ZeRO) or encoder.attn_implementation is not None:
            trained = _embed_probes_in_training(trainer, module)
            weights = whole_weights(strategy, encoder)
            if trainer.is_global_zero:
                exact = strategy.root_device.type == "cpu" and trainer.precision == "32-true"
                tolerance = TOLERANCE if exact else LOOSE_TOLERANCE
                whole = rebuild(encoder.spec, weights, "the weights of all ranks")
                _log_export(folder, export_encoder(whole, folder, trained, tolerance, facts))
        elif trainer.is_global_zero:
            device = module.device
            try:
                _log_export(folder, export_encoder(encoder, folder, facts=facts))
            finally:
                encoder.to(device)
    finally:
        module.train(training)


def _log_export(folder: Path, difference: float) -> None:
    if folder.name == TRIAL:
        log.info("the untouched model exports exactly (largest difference %.1e)", difference)
    else:
        log.info("exported and verified %s (largest difference %.1e)", folder, difference)


def try_export(trainer: pl.Trainer, module: EmbeddingModule) -> None:
    """Export the untouched model and throw the folder away; all ranks must call it.

    Raises:
        InputError: It cannot be exported as it is trained, which no training would change.
    """
    folder = Path(trainer.default_root_dir) / TRIAL
    try:
        export_running(trainer, module, folder)
    except ExportError as error:
        if error.reason is None:
            raise
        raise InputError(
            f"model.model_name_or_path: {module.encoder.spec.model_name_or_path}: cannot be "
            f"exported as it is trained, hence nothing was trained: {error.reason}"
        ) from error
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
    trainer.strategy.barrier()


def _embed_probes_in_training(trainer: pl.Trainer, module: EmbeddingModule) -> Tensor:
    strategy = trainer.strategy

    def forward(chunks: list[Features]) -> Tensor:
        batch = module.transfer_batch_to_device(chunks, strategy.root_device, 0)
        # Through the wrapper, which gathers the parameters of every layer where they are sharded.
        with trainer.precision_plugin.val_step_context():
            return cast(Any, strategy.model)(batch)

    module.eval()
    return embed_probes(module.encoder, forward)


class ExportModel(pl.Callback):
    """Export at the end of every epoch and of the fit.

    ``<default_root_dir>/model`` is the best checkpoint where ``checkpoint.monitor`` tells which is,
    else the model of the last step; ``checkpoints/epoch-1``, ``epoch-2``, .. are those of the
    epochs. An epoch that cannot be exported is logged; a fit that cannot be is an error.
    """

    def __init__(self, save_on_epoch_end: bool = True, num_max_checkpoints: int = 5) -> None:
        """Describe what is written.

        Args:
            save_on_epoch_end: Write an exported folder an epoch.
            num_max_checkpoints: Epochs' folders that are kept, the last ones.
        """
        if num_max_checkpoints < 1:
            raise InputError(
                f"num_max_checkpoints: expected at least 1, found {num_max_checkpoints}"
            )
        self.save_on_epoch_end, self.num_max_checkpoints = save_on_epoch_end, num_max_checkpoints
        self._ended_epoch: int | None = None
        self._has_ended = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what the exports would replace, which the end of a fit would tell too late.

        Raises:
            InputError: The base model lies where this run writes, ``model`` is another's, or the
                weights are changed after they are exported.
        """
        if stage != "fit":
            return
        callbacks = cast(Any, trainer).callbacks
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, AVERAGING):
                raise InputError(
                    f"callbacks: expected ExportModel after {type(callback).__name__}, which "
                    "averages the weights when the fit ends, found it before"
                )
        base = cast(EmbeddingModule, pl_module).encoder.spec.model_name_or_path
        places = (_model_folder(trainer), _epoch_folder(trainer, 1).parent)
        written = [os.path.realpath(place) for place in places]  # of a loop, too
        if any(Path(base).resolve().is_relative_to(place) for place in written):
            raise InputError(
                "model.model_name_or_path: expected a model outside of what this run writes, found "
                f"{base}; give another trainer.default_root_dir than {trainer.default_root_dir}"
            )
        if not cast(Any, trainer).fast_dev_run:
            refuse_to_replace(_model_folder(trainer), base)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before, and sweep what was left of it by a kill."""
        self._ended_epoch, self._has_ended = None, False
        if trainer.is_global_zero:
            run_folder = Path(trainer.default_root_dir)
            checkpoints = _epoch_folder(trainer, 1).parent
            sweep(run_folder)
            sweep(checkpoints)
            sweep_together(checkpoints, CHECKPOINTS)
            shutil.rmtree(run_folder / TRIAL, ignore_errors=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try an export, or make up for that of the epoch before which a stopped run has left.

        Raises:
            InputError: The model cannot be exported as it is trained.
        """
        module = cast(EmbeddingModule, pl_module)
        if trainer.ckpt_path is None and not cast(Any, trainer).fast_dev_run:
            try_export(trainer, module)
        self._ended_epoch = self._missing_epoch(trainer, module)
        if goes_on_here(trainer):
            self._delete_older(trainer, module.place.epoch)

    def _missing_epoch(self, trainer: pl.Trainer, module: EmbeddingModule) -> int | None:
        """Return the epoch at whose end this run goes on, from 1 on, if it has no whole folder."""
        if not self.save_on_epoch_end or not goes_on_here(trainer):
            return None
        place = module.place
        ended = place.epoch + (place.batch == place.batches)
        if not ended or place.batch not in (0, place.batches):
            return None
        is_there = is_verified(_epoch_folder(trainer, ended))
        return None if trainer.strategy.broadcast(is_there) else ended

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the epoch: Lightning saves checkpoints after this hook, whatever the order."""
        is_exported = self.save_on_epoch_end and not cast(Any, trainer).fast_dev_run
        self._ended_epoch = trainer.current_epoch + 1 if is_exported else None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the epoch before."""
        self._export_epoch(trainer, cast(EmbeddingModule, pl_module))

    def _export_epoch(self, trainer: pl.Trainer, module: EmbeddingModule) -> None:
        """Export the epoch that has ended, and delete the folder that is one too many."""
        number, self._ended_epoch = self._ended_epoch, None
        if number is None:
            return
        try:
            with averaged(trainer, module):
                export_running(trainer, module, _epoch_folder(trainer, number))
        except (ExportError, InputError) as error:
            log.error("epoch %d is not exported: %s", number, error)
        trainer.strategy.barrier()
        self._delete_older(trainer, number)

    def _delete_older(self, trainer: pl.Trainer, number: int) -> None:
        """Delete the folders of epochs too many, also what is left of one that a kill spared."""
        oldest = number - self.num_max_checkpoints
        if trainer.is_global_zero:
            for epoch in range(oldest, 0, -1):
                shutil.rmtree(_epoch_folder(trainer, epoch), ignore_errors=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the last epoch and the final model: the best, or what the strategy still holds."""
        module = cast(EmbeddingModule, pl_module)
        self._export_epoch(trainer, module)
        self._has_ended = True
        if cast(Any, trainer).fast_dev_run:
            return
        keeper = best_keeper(trainer)
        if keeper is None:
            export_running(trainer, module, _model_folder(trainer))
        else:
            _export_saved(trainer, module, Path(keeper.best_model_path), _model_folder(trainer))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            tell_choice(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export what a fit went on from that had nothing left to train.

        It may have been killed before its model was exported. Lightning calls no other hook of its
        end, and by now the strategy holds nothing.

        Raises:
            InputError: There was nothing to train from the start.
        """
        if self._has_ended:
            return
        if trainer.ckpt_path is None:
            raise InputError(
                "trainer.max_epochs, max_steps, max_time, limit_train_batches: expected a step to "
                "train, found none"
            )
        module, last = cast(EmbeddingModule, pl_module), Path(trainer.ckpt_path)
        missing, keeper = self._missing_epoch(trainer, module), best_keeper(trainer)
        if missing is not None:
            try:
                _export_saved(trainer, module, last, _epoch_folder(trainer, missing))
            except (ExportError, InputError) as error:
                log.error("epoch %d is not exported: %s", missing, error)
        if goes_on_here(trainer):
            self._delete_older(trainer, module.place.epoch)
        path = last if keeper is None else Path(keeper.best_model_path)
        _export_saved(trainer, module, path, _model_folder(trainer))
        if trainer.is_global_zero:
            tell_choice(trainer)


def _model_folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "model"


def _epoch_folder(trainer: pl.Trainer, number: int) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / f"epoch-{number}"


def _export_saved(
    trainer: pl.Trainer, module: EmbeddingModule, checkpoint: Path, folder: Path
) -> None:
    """Export a checkpoint, on rank 0; it was saved by this fit, which knows what it trusts."""
    if trainer.is_global_zero:
        spec = module.encoder.spec
        difference = export_checkpoint(
            checkpoint, folder, spec.trust_remote_code, spec.model_name_or_path
        )
        _log_export(folder, difference)
