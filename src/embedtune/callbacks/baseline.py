"""Measure the untouched base model before a fit, and compare what becomes of it."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.errors import InputError
from embedtune.evaluation.measure import main_metric, metric_names
from embedtune.evaluation.sharded import Evaluation
from embedtune.models.encoder import Encoder
from embedtune.training.before_fit import refuse_what_fails_later
from embedtune.training.facts import monitored
from embedtune.training.module import EmbeddingModule
from embedtune.training.precision import autocast_dtype

log = logging.getLogger("embedtune")


class Baseline(pl.Callback):
    """Measure the base model on ``data.val_path``, and say how the trained one compares.

    The base model is the one that was loaded: no projection is appended yet, and prompt and longest
    input are its own. Its metrics are the first row of every curve. Of a module that was trained
    before it is loaded again; its losses, which need the projection as it started, are not known.

    Attributes:
        found: What its queries found in each retrieval set, as ``found`` of
            :class:`~embedtune.evaluation.measure.Measured`.
        width: Its full width; None before it was measured.
    """

    def __init__(self, anchors: dict[str, float] | None = None) -> None:
        """Describe the drift guard.

        Args:
            anchors: Sets of ``data.val_path`` that stand for what the model must not forget, and
                by how much the main metric of each may fall below the base model's.
        """
        self.anchors = anchors or {}
        self.found: dict[str, Tensor] = {}
        self.width: int | None = None
        for name, fall in self.anchors.items():
            if not fall >= 0:
                raise InputError(f"anchors: {name}: expected a fall of 0 or more, found {fall}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Measure the test sets, before the module appends a projection."""
        module = cast(EmbeddingModule, pl_module)
        if stage != "fit":
            return
        module.base_metrics, module.base_per_query, self.found = {}, {}, {}  # of a fit before
        self._refuse_unknown_sets(module)
        _refuse_unknown_monitor(trainer, module)
        _refuse_unmeasured_monitor(trainer)
        if not _is_validated(trainer):
            return
        refuse_what_fails_later(trainer, module)  # before measuring, which may take hours
        encoder = module.encoder
        if not module.is_base and module.data.testsets:
            log.info("base model: loaded again, for this module was trained before")
            encoder = Encoder(encoder.spec.as_loaded, encoder.attn_implementation)
        evaluation, self.width = _measure(trainer, module.data, encoder), encoder.width
        # A projection may widen the embedding later.
        widths = [width for width in module.widths if width <= self.width]
        module.base_metrics = evaluation.collect(
            widths, trainer.strategy.root_device, encoder.compared_by
        )
        module.base_per_query, self.found = evaluation.per_query, evaluation.found
        for line in _describe(module, module.base_metrics):
            log.info("base model: %s", line)

    def _refuse_unknown_sets(self, module: EmbeddingModule) -> None:
        known = [name.removeprefix("val/") for name in module.data.testsets]
        for name in self.anchors:
            if name not in known:
                raise InputError(
                    "anchors: expected names of retrieval sets or scored sets of data.val_path "
                    f"({', '.join(known) or 'there are none'}), found {name!r}"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the losses before the first step, and log all as step 0."""
        module = cast(EmbeddingModule, pl_module)
        # A fit that was stopped within its first step has kept no step, hence no row either.
        goes_on = trainer.ckpt_path is not None and trainer.global_step > 0
        if goes_on or not _is_validated(trainer):
            return
        # A loss needs the projection, which starts from here.
        losses = _measure_losses(trainer, module)
        if module.is_base:
            module.base_metrics |= losses
        _refuse_unknown_monitor(trainer, module, losses)
        for logger in trainer.loggers:
            logger.log_metrics(module.base_metrics, step=0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how far the model has come, and warn of an anchor that fell at any width."""
        module = cast(EmbeddingModule, pl_module)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for line in _describe(module, module.metrics):
            log.info("step %s: %s", f"{trainer.global_step:,}", line)
        for name, allowed in self.anchors.items():
            main = f"val/{name}/{main_metric(module.data.testsets[f'val/{name}'].testset)}"
            for metric in (main, *(f"{main}/{width}" for width in _smaller_widths(module))):
                base, now = (m.get(metric) for m in (module.base_metrics, module.metrics))
                # What is not a number has not held either.
                if base is not None and now is not None and not base - now <= allowed:
                    log.warning(
                        "anchor %s: %s fell to %.4f, %.4f below the base model's %.4f "
                        "(allowed: %.4f)",
                        *(name, metric, now, base - now, base, allowed),
                    )


def _is_validated(trainer: pl.Trainer) -> bool:
    has_sets = bool(cast(Any, trainer).datamodule.evaluated("val"))
    return has_sets and trainer.limit_val_batches != 0 and not cast(Any, trainer).fast_dev_run


def _refuse_unknown_monitor(
    trainer: pl.Trainer, module: EmbeddingModule, measured: Mapping[str, float] | None = None
) -> None:
    """Refuse to monitor what is not measured; parts of a loss are known once it was computed."""
    data = module.data
    known = [
        f"{name}/{metric}"
        for name, texts in data.testsets.items()
        for metric in metric_names(texts.testset, module.widths)
    ]
    with_loss = [name for name in data.evaluated("val") if name in data.datasets]
    losses = [f"{name}/loss" for name in with_loss] if measured is None else list(measured)
    for callback in cast(Any, trainer).callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or monitor is None:
            continue
        may_be_part = measured is None and monitor.startswith(tuple(f"{n}/" for n in with_loss))
        is_unknown = monitor.startswith("val/") and monitor not in (*losses, *known)
        # Other names may be logged by callbacks of the user's own.
        lacks_stage = not monitor or f"val/{monitor}" in (*losses, *known)
        if (is_unknown and not may_be_part) or lacks_stage:
            raise InputError(
                "checkpoint.monitor: expected a metric of data.val_path "
                f"({', '.join([*losses, *known]) or 'which is not set'}), found {monitor!r}"
            )


def _refuse_unmeasured_monitor(trainer: pl.Trainer) -> None:
    """Refuse to monitor what the fit is too short to measure, or leaves out."""
    monitor, every, epochs = monitored(trainer), trainer.check_val_every_n_epoch, trainer.max_epochs
    if monitor is None or not monitor.startswith("val/") or cast(Any, trainer).fast_dev_run:
        return
    found = None
    if trainer.limit_val_batches == 0:
        found = "trainer.limit_val_batches 0"
    elif every is not None and epochs is not None and 0 <= epochs < every:
        found = f"trainer.check_val_every_n_epoch {every} of {epochs} epochs"
    if found is not None:
        raise InputError(f"checkpoint.monitor: {monitor} would never be measured, by {found}")


@torch.no_grad()
def _measure(trainer: pl.Trainer, data: EmbeddingDataModule, encoder: Encoder) -> Evaluation:
    device = trainer.strategy.root_device
    training = encoder.training
    half = autocast_dtype(str(trainer.precision))
    encoder.pack(device, half)
    encoder.to(device).eval()
    evaluation = Evaluation()
    with torch.autocast(device.type, half, enabled=half is not None):
        for name in data.testsets:
            texts = data.testsets[name]
            log.info("measuring the base model on %s (%s texts)", name, f"{len(texts):,}")
            for batch in data.text_loader(name, encoder):
                chunks = move_data_to_device(batch.chunks, device)
                encoded = torch.cat([encoder(features) for features in chunks])
                evaluation.add_texts(name, texts, batch, encoder.as_exported(encoded))
    encoder.train(training)
    return evaluation


@torch.no_grad()
def _measure_losses(trainer: pl.Trainer, module: EmbeddingModule) -> dict[str, float]:
    count = sum(
        name.startswith("val/") for name in module.data.datasets
    )  # their loaders come first
    strategy: Any = trainer.strategy
    training = module.training
    module.eval()
    module.evaluation.restart()
    limit = trainer.limit_val_batches
    for i, loader in enumerate(module.data.val_dataloader()[:count]):
        batches = limit if isinstance(limit, int) else int(len(loader) * limit)
        for j, batch in enumerate(islice(loader, batches)):
            strategy.validation_step(strategy.batch_to_device(batch, dataloader_idx=i), j, i)
    module.train(training)
    return module.evaluation.collect((), module.device)


def _smaller_widths(module: EmbeddingModule) -> list[int]:
    return [width for width in module.widths if width < module.encoder.width]


def _describe(module: EmbeddingModule, metrics: dict[str, float]) -> Iterator[str]:
    """Yield a line a set: its main metric at each width, and the difference from the base model."""
    base = module.base_metrics
    for name in dict.fromkeys(module.data.evaluated("val")):
        texts = module.data.testsets.get(name)
        metric = f"{name}/{'loss' if texts is None else main_metric(texts.testset)}"
        if metric not in metrics:
            continue
        values = []
        for width in ("", *(f"/{width}" for width in _smaller_widths(module))):
            key = f"{metric}{width}"
            if key in metrics:
                value = f"{metrics[key]:.4f}"
                is_new = metrics is not base and key in base
                value += f" ({metrics[key] - base[key]:+.4f})" if is_new else ""
                values.append(f"{value} at {width[1:]}" if width else value)
        yield f"{metric} {', '.join(values)}"
