"""Write the report of a fit while it runs and at its end."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from embedtune.callbacks.baseline import Baseline
from embedtune.callbacks.best_model import best_keeper, choice
from embedtune.callbacks.early_stopping import EarlyStopping
from embedtune.callbacks.run_summary import RunSummary
from embedtune.callbacks.stop_on_signal import StopOnSignal
from embedtune.checkpoints.read import read_facts
from embedtune.data.beir import RetrievalSet
from embedtune.evaluation.intervals import Interval
from embedtune.reports.changes import Comparison
from embedtune.reports.curves import last_validation, read_curves
from embedtune.reports.report import report_path, write_report
from embedtune.training.facts import monitored
from embedtune.training.module import EmbeddingModule
from embedtune.whole_files import refuse_folder

log = logging.getLogger("embedtune")


class RunReport(pl.Callback):
    """Write ``<default_root_dir>/report.html`` after each validation, and at the end.

    It must come after the callbacks that save checkpoints and export.
    """

    def __init__(self, summary: RunSummary, baseline: Baseline) -> None:
        """Take what other callbacks of the same fit know.

        Args:
            summary: What the run understood.
            baseline: What the base model found.
        """
        self.summary, self.baseline = summary, baseline
        self._best: Tensor | None = None
        self._found: dict[str, Tensor] = {}
        self._has_ended = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder in the place of the report before the fit, not at its end."""
        if stage == "fit":
            refuse_folder(report_path(Path(trainer.default_root_dir)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self._has_ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember which checkpoint was the best before a run goes on."""
        self._best = _best_score(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Follow a best checkpoint that is saved with a step."""
        self._follow_the_best(trainer, cast(EmbeddingModule, pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow one that was saved at the end of an epoch, which comes after all callbacks."""
        self._follow_the_best(trainer, cast(EmbeddingModule, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the best model so far has found, and write."""
        if trainer.sanity_checking or cast(Any, trainer).fast_dev_run:
            return
        module = cast(EmbeddingModule, pl_module)
        self._follow_the_best(trainer, module)
        running = f"The fit is running: step {trainer.global_step:,} of {module.num_steps:,}"
        intervals = module.intervals
        self._write(trainer, module, running, module.metrics, intervals, module.evaluation.found)

    def _follow_the_best(self, trainer: pl.Trainer, module: EmbeddingModule) -> None:
        """Keep what the model of the best checkpoint has found, if it was validated."""
        best = _best_score(trainer)
        if best is None or best is not self._best:
            self._best = best
            self._found = dict(module.evaluation.found) if module.metrics else {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write about the model that was exported."""
        self._has_ended = True
        self._follow_the_best(trainer, cast(EmbeddingModule, pl_module))
        if not cast(Any, trainer).fast_dev_run:
            self._write_end(trainer, cast(EmbeddingModule, pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write about a fit that had nothing left to train: Lightning calls no other hook of it."""
        if self._has_ended or trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        module = cast(EmbeddingModule, pl_module)
        self.summary.collect(trainer, module)
        self._write_end(trainer, module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Write that a signal has stopped the fit, which the last report calls running."""
        said = [c.said for c in cast(Any, trainer).callbacks if isinstance(c, StopOnSignal)]
        if not any(said) or cast(Any, trainer).fast_dev_run:
            return
        module = cast(EmbeddingModule, pl_module)
        last, found = module.last_measured, module.evaluation.found
        if not last.metrics:
            more = _not_measured(trainer, module)
        else:
            more = f"what is shown was measured after step {last.step:,}"
        told = _and("".join(said), more)
        try:
            self._write(trainer, module, told, last.metrics, last.intervals, found)
        except OSError as error:  # the exit code is to tell of the signal
            log.warning("the report is not of the last step: %s", error)

    def _write_end(self, trainer: pl.Trainer, module: EmbeddingModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics, intervals, keeper = module.metrics, module.intervals, best_keeper(trainer)
        if keeper is not None:
            facts = read_facts(Path(keeper.best_model_path))["training_facts"]
            metrics, intervals = facts["metrics"], facts.get("intervals") or {}
        told, found = choice(trainer).said, self._found
        if not metrics and (missing := _not_measured(trainer, module)):
            log.info(missing)
            # What was found is of another step.
            told, found = _and(told, missing), {}
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, EarlyStopping):
                told = _and(told, callback.said)
        self._write(trainer, module, told, metrics, intervals, found)
        log.info("wrote %s", Path(trainer.default_root_dir) / "report.html")

    def _write(
        self,
        trainer: pl.Trainer,
        module: EmbeddingModule,
        model_note: str,
        metrics: dict[str, float],
        intervals: Mapping[str, Interval],
        found: dict[str, Tensor],
    ) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()  # it holds rows back
        before = self.baseline.found
        compared = [
            Comparison(name.removeprefix("val/"), texts.testset, before[name], found[name])
            for name, texts in module.data.testsets.items()
            if isinstance(texts.testset, RetrievalSet) and name in before and name in found
        ]
        write_report(
            Path(trainer.default_root_dir),
            facts=self.summary.facts,
            base=module.base_metrics,
            trained=metrics,
            width=module.encoder.width,
            model_note=model_note,
            comparisons=compared,
            intervals=intervals,
            monitor=monitored(trainer),
            base_width=self.baseline.width,
        )


def _best_score(trainer: pl.Trainer) -> Tensor | None:
    """Return the score of the best checkpoint: each is a tensor of its own, where paths recur."""
    keeper = best_keeper(trainer)
    return None if keeper is None else keeper.best_model_score


def _and(told: str, more: str) -> str:
    return f"{told}. {more[0].upper()}{more[1:]}" if more else told


def _not_measured(trainer: pl.Trainer, module: EmbeddingModule) -> str:
    """Tell that the model at the end was not measured; nothing where no set ever was."""
    measured = last_validation(read_curves(Path(trainer.default_root_dir)))
    own = module.last_measured
    last = max(measured, own.step if own.metrics else 0)
    if not (last or module.base_metrics):
        return ""
    after = f"the last validation came after step {last:,}" if last else "no validation came"
    return f"this model was not measured: {after}"
