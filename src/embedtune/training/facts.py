"""Collect what a fit tells of itself: in its summary, its checkpoints and its model card."""

import contextlib
import inspect
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from embedtune.checkpoints.training_facts import NOTHING_KNOWN, TrainingFacts
from embedtune.data.records import Format
from embedtune.distributed.strategies import describe_strategy
from embedtune.models.encoder import Encoder
from embedtune.secrets import withhold

LIBRARIES = ("embedtune", "torch", "lightning", "transformers", "sentence-transformers")


def training_facts(trainer: Any, module: Any) -> TrainingFacts:
    """Collect the facts of a running fit; each rank can, alone.

    Args:
        trainer: The Trainer.
        module: Its :class:`~embedtune.training.module.EmbeddingModule`.
    """
    if "train" not in module.data.datasets:  # a checkpoint may be saved without a fit
        return NOTHING_KNOWN
    place = module.place
    return TrainingFacts(
        data=data_facts(module.data, module.encoder),
        configuration=_configuration(trainer, module),
        mrl_dims=list(module.mrl_dims) if module.use_mrl else None,
        step=trainer.global_step,
        epoch=max(1, place.epoch + (place.batch > 0)),  # at a start: the one before
        base_metrics={name: float(value) for name, value in module.base_metrics.items()},
        metrics={name: float(value) for name, value in module.metrics.items()},
        intervals={name: list(ends) for name, ends in module.intervals.items()},
        monitor=monitored(trainer),
    )


def monitored(trainer: Any) -> str | None:
    """Return the metric of ``checkpoint.monitor``, None where it is not set."""
    asked = (getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks)
    return next(filter(None, asked), None)


def told_by_all(trainer: Any, module: Any) -> dict[str, str]:
    """Return what every rank of a fit must have alike, by what to call it in a message."""
    configuration = _configuration(trainer, module)
    versions = configuration.pop("versions")
    data = {k: v for k, v in data_facts(module.data, module.encoder).items() if k != "files"}
    # Ranks validate and save together.
    together = (
        getattr(trainer, "val_check_interval", None),  # there is none of a time
        trainer.check_val_every_n_epoch,
        *(trainer.limit_train_batches, trainer.limit_val_batches),
        *(callback.state_key for callback in trainer.checkpoint_callbacks),
    )
    return {
        "versions of libraries": versions,
        "configuration": repr((configuration, module.widths, module.data.shuffle, data, together)),
    }


def data_facts(data: Any, encoder: Encoder) -> dict[str, Any]:
    """Return what is known of the training data, as :attr:`TrainingFacts.data` describes it.

    Args:
        data: The opened :class:`~embedtune.data.datamodule.EmbeddingDataModule`.
        encoder: Whose positions may cap the longest inputs.
    """
    train = data.datasets["train"]
    rows = train.rows
    has_documents = rows.format != Format.DISTILL
    return {
        "files": [path.name for path in rows.paths],
        "format": str(rows.format),
        "rows": len(rows),
        "examples": len(train),
        "negatives": data.neg_nums if rows.format == Format.TRIPLET else None,
        "teacher_width": None if train.teacher is None else train.teacher.width,
        "query_prompt": rows.prompt,
        "query_max_len": encoder.cap(data.query_max_len, "query"),
        "passage_max_len": (
            encoder.cap(data.passage_max_len, "document") if has_documents else None
        ),
    }


def _configuration(trainer: Any, module: Any) -> dict[str, Any]:
    accumulated = trainer.accumulate_grad_batches
    values = {
        "loss": describe_loss(module.loss),
        "learning rate": module.lr,
        "schedule": module.lr_schedule,
        "warm-up": f"{module.warmup_proportion:.0%} of the steps",
        "weight decay": module.weight_decay,
        "gradient clipping": trainer.gradient_clip_val,
        "epochs": trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else None,
        "steps": module.num_steps,
        "batch size": module.data.batch_size * trainer.world_size,
        "accumulated batches": accumulated if accumulated > 1 else None,
        "precision": str(trainer.precision),
        "strategy": describe_strategy(trainer.strategy),
        "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        "seed": module.data.seed,
        "versions": _versions(),
    }
    return {label: value for label, value in values.items() if value is not None}


@cache  # looked for on disk
def _versions() -> str:
    found = []
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a source folder on the path
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def describe_loss(loss: nn.Module) -> str:
    """Return a loss with its parameters for people to read.

    >>> from embedtune.losses import CoSENT
    >>> describe_loss(CoSENT())
    'CoSENT(scale=20.0)'
    """
    given = inspect.signature(type(loss).__init__).parameters
    values = {k: v for k, v in vars(loss).items() if isinstance(v, bool | int | float | str)}
    shown = ", ".join(f"{k}={v}" for k, v in withhold(values).items() if k in given)
    inner = [describe_loss(child) for child in loss.children()]
    return f"{type(loss).__name__}({', '.join(inner + ([shown] if shown else []))})"
