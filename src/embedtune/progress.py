"""Say before training what was understood, and while training how fast it goes."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np

from embedtune.batch import Text
from embedtune.datamodule import EmbeddingDataModule
from embedtune.model_card import describe_loss
from embedtune.module import EmbeddingModule
from embedtune.records import Example, Format
from embedtune.sampler import Key
from embedtune.strategies import describe
from embedtune.testsets import RetrievalSet
from embedtune.validation import main_metric

log = logging.getLogger("embedtune")

TRUNCATION_SAMPLE = 500


class RunSummary(pl.Callback):
    """Log what the run understood, before its first step.

    Attributes:
        facts: That, a text a label.
    """

    def __init__(self) -> None:
        """Start without facts."""
        self.facts: dict[str, str] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the summary, a line a fact."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EmbeddingModule)
        self.facts = {**_data_facts(pl_module.data, pl_module), **_run_facts(trainer, pl_module)}
        width = max(map(len, self.facts))
        lines = [f"  {name.ljust(width)}  {fact}" for name, fact in self.facts.items()]
        log.info("this run:\n%s", "\n".join(lines))


def _data_facts(data: EmbeddingDataModule, module: EmbeddingModule) -> dict[str, str]:
    train = data.datasets["train"]
    rows, sampler = train.rows, data.sampler("train")
    facts = {
        "data": ", ".join(map(str, rows.paths[:3]))
        + (f" and {len(rows.paths) - 3} more files" if len(rows.paths) > 3 else ""),
        "format": f"{rows.format}, {len(rows):,} rows, {len(train):,} examples",
    }
    if rows.ignored_fields:
        facts["ignored fields"] = ", ".join(rows.ignored_fields)
    if rows.prompt is not None:
        facts["query prompt"] = f"{rows.prompt!r}, of all rows; exported as prompts['query']"
    if rows.format == Format.TRIPLET:
        facts["negatives"] = f"{data.neg_nums} a query, drawn anew every epoch"
    elif rows.format == Format.PAIR:
        facts["negatives"] = (
            f"other queries' positives (data.neg_nums {data.neg_nums} has no effect on pair data)"
        )
    elif train.teacher is not None:
        origin = "" if data.teacher_embedding_dim else ", taken from the files' sizes"
        facts["teacher"] = f"width {train.teacher.width}{origin}"
    facts["global batch"] = (
        f"{sampler.global_batch_size} = {sampler.batch_size} x {sampler.num_ranks} rank(s)"
    )
    facts["truncated"] = _truncation(data, module)
    for name in dict.fromkeys(data.evaluated("val")):
        facts[name] = _describe_set(data, name)
    return facts


def _describe_set(data: EmbeddingDataModule, name: str) -> str:
    """Return what a set of ``data.val_path`` holds, and what is measured on it."""
    told = []
    if name in data.datasets:
        told.append(f"{len(data.datasets[name]):,} examples (loss)")
    if name in data.testsets:
        testset = data.testsets[name].testset
        if isinstance(testset, RetrievalSet):
            told.append(
                f"{len(testset.queries):,} queries, {len(testset.corpus):,} documents, qrels "
                f"{testset.split} ({main_metric(testset)})"
            )
        else:
            told.append(f"{len(testset.scores):,} scored pairs ({main_metric(testset)})")
    return ", ".join(told)


def _run_facts(trainer: pl.Trainer, module: EmbeddingModule) -> dict[str, str]:
    epochs = f"{trainer.max_epochs} epochs" if (trainer.max_epochs or -1) >= 0 else "max_steps"
    accumulated = trainer.accumulate_grad_batches
    assert module.loss is not None
    facts = {
        "steps": f"{module.num_steps:,} ({epochs}"
        + (f", each of {accumulated} accumulated batches)" if accumulated > 1 else ")"),
        "loss": describe_loss(module.loss),
        "embedding": f"width {module.encoder.width}",
        "device": f"{trainer.strategy.root_device.type}, {trainer.world_size} rank(s), "
        + describe(trainer.strategy),
        "precision": str(trainer.precision),
        "results": str(trainer.default_root_dir),
    }
    facts["chunks"] = (
        f"{module.data.tokens_per_chunk:,} tokens, "
        + ("without padding" if module.encoder.packs else "each padded to its longest text")
        + (", computed again in backward (grad_cache)" if module.grad_cache else "")
    )
    if module.use_mrl:
        facts["embedding"] += f", trained at {', '.join(map(str, module.mrl_dims))}"
    return facts


def _truncation(data: EmbeddingDataModule, module: EmbeddingModule) -> str:
    """Tell which share of a sample of the texts is longer than its limit."""
    train, collate = data.datasets["train"], data.collator(module.encoder)
    count = min(len(train), TRUNCATION_SAMPLE)
    indices = np.linspace(0, len(train) - 1, count).astype(int).tolist()
    examples: list[Example] = train.__getitems__([Key(0, index) for index in indices])
    queries = [collate.query(example) for example in examples]
    # One document an example, for a row may have hundreds of negatives.
    documents = [collate.document(e.positives[0]) for e in examples if e.positives]
    shares = []
    for name, texts in (("queries", queries), ("documents", documents)):
        if texts:
            share = np.mean([_is_truncated(module, text) for text in texts])
            shares.append(f"{share:.1%} of the {name} at {texts[0].max_len} tokens")
    return f"{', '.join(shares)} (of {count:,} examples)"


def _is_truncated(module: EmbeddingModule, text: Text) -> bool:
    features = module.encoder.tokenize([text.text], text.role, text.prompt, text.max_len + 1)
    return features["input_ids"].shape[-1] > text.max_len


class Throughput(pl.Callback):
    """Log how fast the epoch goes so far, and what it costs beside the model.

    ``train/examples_per_s`` is over all ranks; of this rank are ``train/padding_efficiency``, the
    share of the computed tokens that are no padding, and ``train/input_wait``, the share of the
    time in which the step waited for its batch.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._restart()

    def _restart(self) -> None:
        self._examples, self._waited = 0, 0.0
        self._real_tokens, self._tokens = 0, 0
        self._since = self._ended = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also for a run that goes on in the middle of an epoch."""
        self._restart()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time between epochs (validation, export) out of the count."""
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a validation in the middle of an epoch out as well."""
        now = time.perf_counter()
        self._since += now - self._ended
        self._ended = now

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the step before as waiting."""
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch, and log where the Trainer logs."""
        self._examples += len(batch.example_id) * trainer.world_size
        real, computed = batch.tokens
        self._real_tokens += real
        self._tokens += computed
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "padding_efficiency": self._real_tokens / self._tokens,
            "input_wait": self._waited / elapsed,
        }
        pl_module.log_dict({f"train/{k}": v for k, v in rates.items()}, batch_size=1)
        rate = self._examples / elapsed
        pl_module.log("train/examples_per_s", rate, prog_bar=True, batch_size=1)
        self._ended = time.perf_counter()
