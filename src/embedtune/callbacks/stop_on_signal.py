"""End a fit that is told to stop as one that can go on: the step is finished, and saved."""

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from embedtune.callbacks.last_step import save_last
from embedtune.distributed import exchange

log = logging.getLogger("embedtune")

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Of schedulers, of the keyboard, and of SLURM before a job's time ends."""


def takes_signals() -> bool:
    """Tell whether this thread may say what a signal does: a process's first alone may."""
    return threading.current_thread() is threading.main_thread()


class StopOnSignal(pl.Callback):
    """Finish the step, save ``last.ckpt``, say how to go on, and exit with 128 + the signal.

    A signal to any rank stops all; a second one to this process ends it at once. One in the last
    step stops nothing: a validation is left, which a run that goes on would lack, and the export.

    Attributes:
        said: What it has said of that; empty as long as no signal has stopped the fit.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self._received, self.said = 0, ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning from saving within a signal of SLURM, in the middle of a step."""
        environment = cast(Any, trainer)._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, but for a SIGUSR1 that somebody else handles already.

        Lightning gives all of them back when a fit ends, however it ends.
        """
        self._received, self.said = 0, ""
        if not takes_signals():
            log.info("signals: none stops this fit, for it runs in a thread that cannot take them")
            return
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGUSR1" and signal.getsignal(number) != signal.SIG_DFL):
                continue
            signal.signal(number, self._receive_in(os.getpid()))

    def _receive_in(self, process: int) -> Any:
        def receive(number: int, frame: FrameType | None) -> None:
            if self._received or os.getpid() != process:  # a loader's worker has no step to finish
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._received = number

        return receive

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stop on every rank where one was told to."""
        number = self._received
        if exchange.is_distributed():  # alone, a GPU need not be waited for
            told = torch.tensor(number, device=pl_module.device)
            number = int(exchange.max_over_ranks(told))
        if not number:
            return
        self._received = number  # on every rank, so that another signal ends it
        name, step = signal.Signals(number).name, f"{trainer.global_step:,}"
        saved = save_last(trainer)
        kept = f"saved {saved}" if saved else "nothing is saved"
        if _is_last_step(trainer):
            if trainer.is_global_zero:
                log.warning(
                    "%s: step %s was the last: %s; the fit ends as ever, and at once if it is told "
                    "again",
                    *(name, step, kept),
                )
            return
        for keeper in trainer.checkpoint_callbacks:  # whose turn would come after this hook
            keeper.on_train_batch_end(trainer, pl_module, *args)
        _log_step(trainer)
        more = "; go on with --ckpt_path last" if saved else ""
        self.said = f"{name}: stopped after step {step}: {kept}{more}"
        if trainer.is_global_zero:
            log.warning(self.said)
        sys.exit(128 + number)


def _log_step(trainer: pl.Trainer) -> None:
    """Log the step that has ended, as Lightning does after the hook in which the fit is stopped."""
    step, every = trainer.global_step, cast(Any, trainer).log_every_n_steps
    if not every or step % every or trainer.fit_loop._should_accumulate():
        return
    found = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")}
    for logger in trainer.loggers:
        logger.log_metrics({**found, "epoch": trainer.current_epoch}, step - 1)


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Tell whether a fit has nothing left to train; Lightning counts an epoch after this step."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    return trainer.is_last_batch and trainer.current_epoch + 1 == epochs
