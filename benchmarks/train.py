"""One training process of a benchmark: a few steps of one trainer on given rows, timed.

Run by benchmarks/bench.py, a process a measurement. The last line of stdout is a JSON object.

Both trainers get the same model with the same dropout and attention, the same examples in the same
order, the same loss (InfoNCE over all positives and negatives of the batch), AdamW, clipping and
precision. A step is timed from the end of the step before, so that it holds its share of the input
pipeline.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

WARMUP_STEPS = 2
TEMPERATURE = 0.02


class StepClock:
    """Collects the times at which steps end; the first steps warm up."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """Note that a step has ended."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return how long each step took after the warm-up."""
        return [after - before for before, after in pairwise(self.ends[WARMUP_STEPS - 1 :])]


class Recorder(pl.Callback):
    """Times Lightning's steps and keeps what they logged last."""

    clock = StepClock()
    logged: dict[str, float] = {}  # noqa: RUF012 - one run a process

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Note the step."""
        self.clock.tick()
        metrics = trainer.callback_metrics
        self.logged.update({name: float(value) for name, value in metrics.items()})


class TrainerRecorder(transformers.TrainerCallback):
    """Times the steps of transformers' Trainer."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.clock.tick()


def set_dropout(model: SentenceTransformer, attention_dropout: float | None) -> None:
    """Change attention dropout alone: it decides whether fused attention can be used."""
    for name, module in model.named_modules():
        if attention_dropout is not None and name.endswith("attention.self.dropout"):
            module.p = attention_dropout


def embedtune(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the command line in this process."""
    from embedtune.cli import main

    main(
        [
            "fit",
            f"--model.model_name_or_path={args.model}",
            "--model.loss=embedtune.losses.InfoNCE",
            f"--model.loss.temperature={TEMPERATURE}",
            "--model.loss.in_batch_positives=true",
            f"--data.train_path={args.rows}",
            f"--data.batch_size={args.batch_size}",
            f"--data.neg_nums={max(args.negatives, 1)}",
            f"--data.query_max_len={args.query_max_len}",
            f"--data.passage_max_len={args.passage_max_len}",
            "--data.shuffle=false",
            f"--trainer.max_steps={args.steps}",
            f"--trainer.precision={'bf16-mixed' if args.precision == 'bf16' else '32-true'}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false",
            f"--trainer.callbacks+={__name__ if __name__ != '__main__' else 'train'}.Recorder",
            "--trainer.enable_checkpointing=false",
            "--save_on_epoch_end=false",
            *args.flags,
        ]
    )
    recorder = sys.modules["train"].Recorder
    return {"seconds": recorder.clock.seconds(), "logged": recorder.logged}


def trainer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run SentenceTransformerTrainer; with ``--pad max_length`` texts are padded to it."""
    import datasets

    model = SentenceTransformer(args.model, device="cpu")
    model.max_seq_length = args.passage_max_len
    set_dropout(model, args.attention_dropout)
    if args.attn_implementation:
        model[0].auto_model.set_attn_implementation(args.attn_implementation)
    columns: dict[str, list[str]] = {"query": [], "positive": []}
    columns |= {f"negative_{i}": [] for i in range(args.negatives)}
    with open(args.rows, encoding="utf-8") as file:
        for row in map(json.loads, file):
            for positive in row["pos"]:
                columns["query"].append(row["query"])
                columns["positive"].append(positive)
                for i in range(args.negatives):
                    columns[f"negative_{i}"].append(row["neg"][i % len(row["neg"])])
    recorder = TrainerRecorder()
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=2e-5,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        bf16=args.precision == "bf16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=666,
    )
    run = SentenceTransformerTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        callbacks=[recorder],
    )
    if args.pad == "max_length":
        _pad_to_max_length(run, args)
    run.train()
    model.save(str(folder / "model"))
    return {"seconds": recorder.clock.seconds(), "logged": {}}


def _pad_to_max_length(run: SentenceTransformerTrainer, args: argparse.Namespace) -> None:
    tokenizer, collate = run.model.tokenizer, run.data_collator

    def preprocess(texts: list[str], prompt: Any = None, task: str | None = None) -> Any:
        length = args.query_max_len if task == "query" else args.passage_max_len
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )

    collate.preprocess_fn = preprocess
    collate.router_mapping = {"query": "query"}


def main() -> None:
    """Measure what the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["embedtune", "trainer"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--negatives", type=int, required=True)
    parser.add_argument("--query_max_len", type=int, required=True)
    parser.add_argument("--passage_max_len", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pad", choices=["longest", "max_length"], default="longest")
    parser.add_argument("--attention_dropout", type=float, default=None)
    parser.add_argument("--attn_implementation", default=None)
    args, args.flags = parser.parse_known_args()
    sys.modules["train"] = sys.modules["__main__"]
    side = {"embedtune": embedtune, "trainer": trainer}[args.side]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = side(args, Path(folder))
    found["whole_s"] = time.perf_counter() - started
    found["step_s"] = statistics.median(found["seconds"])
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["threads"] = torch.get_num_threads()
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
