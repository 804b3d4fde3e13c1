"""Refuse a fit in a run folder where another one is writing."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from embedtune.errors import InputError
from embedtune.whole_files import hold, release


class OneFit(pl.Callback):
    """Hold the run folder while a fit runs: of two the model would be anybody's.

    A process that ends, however it ends, holds nothing any more. It must come before the callbacks
    that write.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the folder.

        Raises:
            InputError: Another process has it; on every rank.
        """
        if stage != "fit" or cast(Any, trainer).fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        is_free = hold(folder) if trainer.is_global_zero else True
        if not trainer.strategy.broadcast(is_free):
            raise InputError(
                "trainer.default_root_dir: expected a folder of its own, found a fit running in "
                f"{folder}"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give it back."""
        release(Path(trainer.default_root_dir))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give it back where the fit has failed."""
        release(Path(trainer.default_root_dir))
