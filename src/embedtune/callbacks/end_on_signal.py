"""End a validation, a test or a prediction that is told to stop."""

import signal
from typing import Any

import lightning.pytorch as pl

from embedtune.callbacks.stop_on_signal import takes_signals


class EndOnSignal(pl.Callback):
    """Let SIGTERM do what it did before Lightning took it over.

    Lightning's handler sets a flag that fits alone look at, and waits for the other ranks.
    """

    def __init__(self) -> None:
        """Start without a handler."""
        self._former: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handler: Lightning registers its own after this."""
        self._former = signal.getsignal(signal.SIGTERM)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signal back."""
        if takes_signals():
            signal.signal(signal.SIGTERM, self._former)

    on_test_start = on_predict_start = on_validation_start
