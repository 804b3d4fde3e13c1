"""Export at the end of every epoch and of the fit."""

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor

from embedtune.callbacks.best_model import best_keeper, describe_choice
from embedtune.distributed.fsdp import FSDP
from embedtune.distributed.strategies import whole_weights
from embedtune.distributed.zero import ZeRO
from embedtune.errors import InputError
from embedtune.export.folder import LOOSE_TOLERANCE, TOLERANCE, export_encoder
from embedtune.export.probes import embed_probes
from embedtune.export.rebuild import export_checkpoint, rebuild
from embedtune.models.spec import Features
from embedtune.training.facts import training_facts
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")


def export_running(trainer: pl.Trainer, module: EmbeddingModule, folder: Path) -> None:
    """Export the model of a running fit; all ranks must call it."""
    strategy, encoder = trainer.strategy, module.encoder
    training, facts = encoder.training, training_facts(trainer, module)
    # Attention that was asked for may be one that a CPU does not have.
    if isinstance(strategy, FSDP | ZeRO) or encoder.attn_implementation is not None:
        trained = _embed_probes_in_training(trainer, module)
        weights = whole_weights(strategy, encoder)
        if trainer.is_global_zero:
            exact = strategy.root_device.type == "cpu" and trainer.precision == "32-true"
            tolerance = TOLERANCE if exact else LOOSE_TOLERANCE
            whole = rebuild(encoder.spec, weights, "the weights of all ranks")
            difference = export_encoder(whole, folder, trained, tolerance, facts)
    elif trainer.is_global_zero:
        device = module.device
        difference = export_encoder(encoder, folder, facts=facts)
        encoder.to(device)
    module.train(training)
    if trainer.is_global_zero:
        log.info("exported and verified %s (largest difference %.1e)", folder, difference)
    strategy.barrier()


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
    epochs.
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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the epoch, and delete the folder that is one too many."""
        if not self.save_on_epoch_end:
            return
        epochs = Path(trainer.default_root_dir) / "checkpoints"
        number = trainer.current_epoch + 1
        export_running(trainer, cast(EmbeddingModule, pl_module), epochs / f"epoch-{number}")
        oldest = number - self.num_max_checkpoints
        if oldest >= 1 and trainer.is_global_zero:
            shutil.rmtree(epochs / f"epoch-{oldest}", ignore_errors=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the final model: the best checkpoint, or what the strategy still holds."""
        if cast(Any, trainer).fast_dev_run:
            return
        folder = Path(trainer.default_root_dir) / "model"
        keeper = best_keeper(trainer)
        if keeper is None:
            export_running(trainer, cast(EmbeddingModule, pl_module), folder)
        else:
            if trainer.is_global_zero:
                difference = export_checkpoint(Path(keeper.best_model_path), folder)
                log.info("exported and verified %s (largest difference %.1e)", folder, difference)
            trainer.strategy.barrier()
        if trainer.is_global_zero:
            log.info(describe_choice(trainer))
