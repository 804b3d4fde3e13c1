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
        self._has_ended = False
        self._forget()

    def _forget(self) -> None:
        self._best: tuple[str, float] | None = None
        self._last: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder in the place of the report before the fit, not at its end."""
        if stage == "fit":
            refuse_folder(report_path(Path(trainer.default_root_dir)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the fit before."""
        self._has_ended = False
        self._forget()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the best model so far has found: one may be saved after its validation."""
        self._keep_of_best(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what this model has found, and write."""
        if trainer.sanity_checking or cast(Any, trainer).fast_dev_run:
            return
        module = cast(EmbeddingModule, pl_module)
        self._last = dict(module.evaluation.found)
        running = f"The fit is running: step {trainer.global_step:,} of {module.num_steps:,}"
        intervals = module.intervals
        self._write(trainer, module, running, module.metrics, intervals, module.evaluation.found)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write about the model that was exported."""
        self._has_ended = True
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

    def _keep_of_best(self, trainer: pl.Trainer) -> None:
        """Let what was found last be that of the best model, if that was saved since."""
        keeper, best = best_keeper(trainer), None
        if keeper is not None:  # by its score as well, for each may have the same name
            best = keeper.best_model_path, float(cast(Tensor, keeper.best_model_score))
        if best != self._best:
            self._best, self._found = best, self._last

    def _write_end(self, trainer: pl.Trainer, module: EmbeddingModule) -> None:
        if not trainer.is_global_zero:
            return
        self._keep_of_best(trainer)
        metrics, intervals, keeper = module.metrics, module.intervals, best_keeper(trainer)
        base = module.base_metrics
        if keeper is not None:
            facts = read_facts(Path(keeper.best_model_path))["training_facts"]
            metrics, intervals = facts["metrics"], facts.get("intervals") or {}
            # It may be an earlier run's, whose sets were others.
            base = {**base, **facts["base_metrics"]}
        told, found = choice(trainer).said, self._last if keeper is None else self._found
        if not metrics and (missing := _not_measured(trainer, module)):
            log.info(missing)
            # What was found is of another step.
            told, found = _and(told, missing), {}
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, EarlyStopping):
                told = _and(told, callback.said)
        self._write(trainer, module, told, metrics, intervals, found, base)
        log.info("wrote %s", Path(trainer.default_root_dir) / "report.html")

    def _write(
        self,
        trainer: pl.Trainer,
        module: EmbeddingModule,
        model_note: str,
        metrics: dict[str, float],
        intervals: Mapping[str, Interval],
        found: dict[str, Tensor],
        base: Mapping[str, float] | None = None,
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
            base=module.base_metrics if base is None else base,
            trained=metrics,
            width=module.encoder.width,
            model_note=model_note,
            comparisons=compared,
            intervals=intervals,
            monitor=monitored(trainer),
            base_width=self.baseline.width,
        )


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
