"""Whether a fit compiles the layers of its model."""

import os
import shutil
from importlib.util import find_spec
from typing import Literal

import lightning.pytorch as pl

from embedtune.distributed.strategies import shards_parameters

BATCHES_TO_PAY = 2000
"""Batches after which compiling has taken less time than it has saved (docs/benchmarks.md)."""


def compiles(wanted: bool | Literal["auto"], trainer: pl.Trainer, batches: int) -> bool:
    """Tell whether a fit compiles.

    Args:
        wanted: What ``model.compile`` says; auto is on a GPU, where the fit is long enough.
        trainer: Its strategy and device.
        batches: Batches of the whole fit.
    """
    if wanted != "auto":
        return wanted
    has_compiler = find_spec("triton") and (os.environ.get("CC") or shutil.which("cc"))
    return (
        trainer.strategy.root_device.type == "cuda"
        and not shards_parameters(trainer.strategy)
        and bool(has_compiler)
        and batches >= BATCHES_TO_PAY
    )
