"""Print what a model was measured at, and write it to a file."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from embedtune.errors import InputError
from embedtune.evaluation.compare import Result
from embedtune.reports.curves import arrange
from embedtune.reports.model_table import format_table
from embedtune.training.module import EmbeddingModule
from embedtune.whole_files import write_text

log = logging.getLogger("embedtune")


class WriteMetrics(pl.Callback):
    """Print the table of ``embedtune evaluate``, and write ``<default_root_dir>/metrics.json``.

    Of ``embedtune validate`` and ``test``, whose metrics these are. The file is that of the last of
    them, and tells which: an object of ``command``, ``model``, ``checkpoint`` (null where the model
    itself was measured), ``width`` (that of a name without one) and ``metrics`` by name, null where
    one is not finite.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to measure nothing: Lightning would end without a word.

        Raises:
            InputError: A limit leaves all batches out.
        """
        part = {TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test"}.get(
            cast(TrainerFn, trainer.state.fn)
        )
        if part is not None and getattr(trainer, f"limit_{part}_batches") == 0:
            raise InputError(f"trainer.limit_{part}_batches: expected batches to measure, found 0")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell about a validation that is no part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            _tell(trainer, cast(EmbeddingModule, pl_module))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell about a test."""
        _tell(trainer, cast(EmbeddingModule, pl_module))


def _tell(trainer: pl.Trainer, module: EmbeddingModule) -> None:
    if not trainer.is_global_zero:
        return
    model = module.encoder.spec.model_name_or_path
    results = _results(module, str(trainer.ckpt_path or model))
    if results:
        sys.stdout.write(format_table(results, are_paths=False) + "\n")
    if cast(Any, trainer).fast_dev_run:
        return
    told: dict[str, Any] = {
        "command": cast(TrainerFn, trainer.state.fn).value,
        "model": model,
        "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        "width": module.encoder.width,
        "metrics": {k: v if math.isfinite(v) else None for k, v in module.metrics.items()},
    }
    path = Path(trainer.default_root_dir) / "metrics.json"
    write_text(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    part = "val" if trainer.state.fn == TrainerFn.VALIDATING else "test"
    names = dict.fromkeys(f"{part}/{result.data}/{result.main}" for result in results)
    main = ", ".join(f"{name} {module.metrics[name]:.4f}" for name in names)
    log.info("wrote %s: %s", path, main or "nothing was measured")


def _results(module: EmbeddingModule, name: str) -> list[Result]:
    """Return what the table shows of a model: the main metric of each set, and a loss beside it."""
    results = []
    for data, by_metric in arrange(module.metrics, module.encoder.width).items():
        main = next(iter(by_metric))
        for metric in dict.fromkeys([main, *(["loss"] if "loss" in by_metric else [])]):
            results += [
                Result(name, data, width, {metric: value})
                for width, value in by_metric[metric].items()
            ]
    return results
