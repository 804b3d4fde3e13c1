"""Say before the first step what was understood."""

import logging
from typing import Any

import lightning.pytorch as pl
import numpy as np

from embedtune.data.beir import RetrievalSet
from embedtune.data.chunks import Text
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.data.records import Format
from embedtune.distributed.pick import Picked
from embedtune.distributed.strategies import describe_strategy
from embedtune.evaluation.measure import main_metric
from embedtune.models.described import (
    describe_parameters,
    describe_pooling,
    describe_prompt,
    unused_prompts,
)
from embedtune.training.facts import data_facts, describe_loss
from embedtune.training.module import EmbeddingModule

log = logging.getLogger("embedtune")

TRUNCATION_SAMPLE = 500


class RunSummary(pl.Callback):
    """Log what the run understood, before its first step.

    Attributes:
        facts: That, a text a label.
    """

    def __init__(self, picked: Picked | None = None) -> None:
        """Start without facts.

        Args:
            picked: The strategy, where the user named none.
        """
        self.picked = picked
        self.facts: dict[str, str] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the summary, a line a fact."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EmbeddingModule)
        self.collect(trainer, pl_module)
        width = max(map(len, self.facts))
        lines = [f"  {name.ljust(width)}  {fact}" for name, fact in self.facts.items()]
        log.info("this run:\n%s", "\n".join(lines))

    def collect(self, trainer: pl.Trainer, module: EmbeddingModule) -> None:
        """Set the facts of a fit that has been set up."""
        self.facts = {
            **_about_model(module),
            **_about_data(module.data, module),
            **_about_run(trainer, module),
        }
        if self.picked is not None:
            self.facts["strategy"] += f", picked {self.picked.reason}"


def _about_model(module: EmbeddingModule) -> dict[str, str]:
    encoder = module.encoder
    embedding = f"width {encoder.width}, compared by {encoder.similarity}"
    if module.use_mrl:
        embedding += f", trained at {', '.join(map(str, module.mrl_dims))}"
    return {
        "base model": encoder.spec.model_name_or_path,
        "pooling": describe_pooling(encoder),
        "embedding": embedding,
        "parameters": describe_parameters(*module.num_parameters),
        "prompts": _prompts(module),
        "longest input": _longest_input(module),
    }


def _prompts(module: EmbeddingModule) -> str:
    """Tell what is put before queries and documents, and what is exported with the model."""
    encoder, rows = module.encoder, module.data.datasets["train"].rows
    query = describe_prompt(encoder, "query")
    if rows.has_prompts:
        query = f"{query}, of all rows" if rows.prompt else f"of each row, else {query}"
    line = f"queries {query}; documents {describe_prompt(encoder, 'document')}"
    unused = unused_prompts(encoder)
    is_asked = rows.has_prompts or set(module.data.prompts.values()) != {None}
    if unused and not is_asked:
        line += (
            f"; the model's {', '.join(unused)} not used: data.query_prompt and "
            "data.document_prompt set what is"
        )
    return line


def _longest_input(module: EmbeddingModule) -> str:
    """Tell how many tokens of a text count, in training and as exported."""
    encoder, data = module.encoder, module.data
    line = f"queries {encoder.cap(data.query_max_len, 'query')} tokens"
    if data.format != Format.DISTILL:
        line += f", documents {encoder.cap(data.passage_max_len, 'document')}"
    exported, own = (
        " and ".join(dict.fromkeys(str(length or "unlimited") for length in lengths))
        for lengths in (encoder.longest_inputs, module.own_longest_inputs)
    )
    if exported == own:
        return f"{line}; exported with the model's own {exported}"
    return f"{line}; exported with {exported}, as the longest text has, above the model's own {own}"


def _about_data(data: EmbeddingDataModule, module: EmbeddingModule) -> dict[str, str]:
    rows, sampler = data.datasets["train"].rows, data.sampler("train")
    known = data_facts(data, module.encoder)
    lines = {
        "data": ", ".join(map(str, rows.paths[:3]))
        + (f" and {len(rows.paths) - 3} more files" if len(rows.paths) > 3 else ""),
        "format": f"{known['format']}, {known['rows']:,} rows, {known['examples']:,} examples",
    }
    if rows.ignored_fields:
        lines["ignored fields"] = ", ".join(rows.ignored_fields)
    if known["negatives"] is not None:
        lines["negatives"] = f"{known['negatives']} a query, drawn anew every epoch"
    elif rows.format == Format.PAIR:
        lines["negatives"] = (
            f"other queries' positives (data.neg_nums {data.neg_nums} has no effect on pair data)"
        )
    elif known["teacher_width"] is not None:
        origin = "" if data.teacher_embedding_dim else ", taken from the files' sizes"
        teacher: Any = data.datasets["train"].teacher
        widths = " + ".join(map(str, teacher.widths))
        lines["teacher"] = f"width {widths}{origin}"
    lines["global batch"] = (
        f"{sampler.global_batch_size} = {sampler.batch_size} x {sampler.num_ranks} rank(s)"
    )
    lines["truncated"] = _truncation(data, module)
    for name in dict.fromkeys(data.evaluated("val")):
        lines[name] = _describe_set(data, name)
    return lines


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


def _about_run(trainer: pl.Trainer, module: EmbeddingModule) -> dict[str, str]:
    epochs = f"{trainer.max_epochs} epochs" if (trainer.max_epochs or -1) >= 0 else "max_steps"
    accumulated = trainer.accumulate_grad_batches
    assert module.loss is not None
    facts = {
        "steps": f"{module.num_steps:,} ({epochs}"
        + (f", each of {accumulated} accumulated batches)" if accumulated > 1 else ")"),
        "learning rate": f"{module.lr:.3g} at its peak, {module.lr_schedule}"
        + (", by the model's width and the format" if module.derives_lr else ""),
        "loss": describe_loss(module.loss),
        "device": f"{trainer.strategy.root_device.type}, {trainer.world_size} rank(s)",
        "strategy": describe_strategy(trainer.strategy),
        "precision": str(trainer.precision),
        "results": str(trainer.default_root_dir),
    }
    facts["chunks"] = (
        f"{module.data.tokens_per_chunk:,} tokens, "
        + ("without padding" if module.encoder.packs else "each padded to its longest text")
        + (", computed again in backward (grad_cache)" if module.grad_cache else "")
    )
    return facts


def _truncation(data: EmbeddingDataModule, module: EmbeddingModule) -> str:
    """Tell which share of a sample of the texts is longer than its limit."""
    train, collate = data.datasets["train"], data.collator(module.encoder)
    examples = train.sample(TRUNCATION_SAMPLE)
    queries = [collate.query(example) for example in examples]
    # One document an example, for a row may have hundreds of negatives.
    documents = [collate.document(e.positives[0]) for e in examples if e.positives]
    shares = []
    for name, texts in (("queries", queries), ("documents", documents)):
        if texts:
            share = np.mean([_is_truncated(module, text) for text in texts])
            shares.append(f"{share:.1%} of the {name} at {texts[0].max_len} tokens")
    return f"{', '.join(shares)} (of {len(examples):,} examples)"


def _is_truncated(module: EmbeddingModule, text: Text) -> bool:
    features = module.encoder.tokenize([text.text], text.role, text.prompt, text.max_len + 1)
    return features["input_ids"].shape[-1] > text.max_len
