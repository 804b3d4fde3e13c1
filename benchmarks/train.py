"""One training process of a benchmark: a few steps of one trainer on given rows, timed.

Run by benchmarks/bench.py, a process a measurement; the last line of stdout is a JSON object.

Both trainers get the same model with the same dropout and attention, the same examples in the same
order, the same loss (InfoNCE over all positives and negatives of the batch), AdamW, clipping and
precision. A step is timed from the end of the step before, so that it holds its share of the input
pipeline. Queries longer than query_max_len are cut by embedtune alone. Further arguments are flags
of `embedtune fit`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import datasets  # noqa: E402 - the clock starts before the imports
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    MultipleNegativesRankingLoss,
)
from torch.utils.data import BatchSampler, SequentialSampler  # noqa: E402

ON_GPU = torch.cuda.is_available()
TEMPERATURE = 0.02


def memory_mb(name: str) -> float:
    """Return a field of /proc/self/status; a peak of ``getrusage`` would be that of the parent."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def peak_mb() -> float:
    """Return the largest memory of tensors on the GPU, or of the process where there is none."""
    return torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else memory_mb("VmHWM")


class StepClock:
    """Collects the times at which steps end; the first quarter, at least two, warms up.

    A GPU is waited for at the end of the warm-up and of the last step, and not between.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.ends: list[float] = []
        self.first_batch: float | None = None
        self.anonymous_mb = 0.0

    @property
    def warmup(self) -> int:
        """Return how many steps warm up."""
        return max(2, self.steps // 4)

    def start(self) -> None:
        """Note that the first batch is there."""
        if self.first_batch is None:
            self.first_batch = time.perf_counter() - STARTED
            self.anonymous_mb = memory_mb("RssAnon")

    def tick(self) -> None:
        """Note that a step has ended."""
        if ON_GPU and len(self.ends) + 1 in (self.warmup, self.steps):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return how long each step took after the warm-up."""
        return [after - before for before, after in pairwise(self.ends[self.warmup - 1 :])]


CLOCK = StepClock()
LOGGED: dict[str, torch.Tensor] = {}


class Recorder(pl.Callback):
    """Times Lightning's steps and keeps what they logged last."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the first batch."""
        CLOCK.start()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Note the step."""
        CLOCK.tick()
        LOGGED.update(trainer.callback_metrics)


class TrainerRecorder(transformers.TrainerCallback):
    """Times the steps of transformers' Trainer."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note the first batch."""
        CLOCK.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the step."""
        CLOCK.tick()


def embedtune(args: argparse.Namespace, folder: Path) -> None:
    """Run the command line in this process."""
    from embedtune.cli import main

    flags = [
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
        "--trainer.callbacks+=train.Recorder",
        "--trainer.enable_checkpointing=false",
        "--save_on_epoch_end=false",
    ]
    if args.attention_dropout is not None:
        flags.append(f"--model.attention_dropout={args.attention_dropout}")
    main(["fit", *flags, *args.flags])


def trainer(args: argparse.Namespace, folder: Path) -> None:
    """Run SentenceTransformerTrainer; with ``--pad max_length`` texts are padded to it."""
    config = {}
    if args.attention_dropout is not None:
        config["attention_probs_dropout_prob"] = args.attention_dropout
    model = SentenceTransformer(args.model, device="cpu", config_kwargs=config)
    model.max_seq_length = args.passage_max_len
    rows = [json.loads(line) for line in Path(args.rows).read_text("utf-8").splitlines()]
    columns = {"query": [r["query"] for r in rows], "positive": [r["pos"][0] for r in rows]}
    for i in range(args.negatives):
        columns[f"negative_{i}"] = [r["neg"][i] for r in rows]
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=2e-5,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        bf16=args.precision == "bf16",
        use_cpu=not ON_GPU,
        dataloader_num_workers=4 if ON_GPU else 0,  # as embedtune has them
        save_strategy="no",
        report_to="none",
        logging_steps=50,  # as Lightning
        disable_tqdm=True,
        batch_sampler=_in_order,
    )
    run = SentenceTransformerTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        callbacks=[TrainerRecorder()],
    )
    if args.pad == "max_length":
        _pad_to_max_length(run, args)
    run.train()
    model.save(str(folder / "model"))


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def _pad_to_max_length(run: SentenceTransformerTrainer, args: argparse.Namespace) -> None:
    tokenizer, collate = run.model.tokenizer, run.data_collator

    def preprocess(texts: list[str], prompt: Any = None, task: str | None = None) -> Any:
        length = args.query_max_len if task == "query" else args.passage_max_len
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )

    collate.preprocess_fn = preprocess
    collate.router_mapping = {"query": "query"}


def gigaflops(args: argparse.Namespace) -> float:
    """Return what a step after the warm-up needs: each distinct text once, without padding.

    ``6 N`` a token for ``N`` parameters other than embeddings, and 12 times layers, width and
    length for attention.
    """
    model = SentenceTransformer(args.model, device="cpu")
    transformer = model[0].auto_model
    weights = sum(p.numel() for n, p in transformer.encoder.named_parameters())
    layers, width = transformer.config.num_hidden_layers, transformer.config.hidden_size
    rows = [json.loads(line) for line in Path(args.rows).read_text("utf-8").splitlines()]
    total = 0
    for step in range(CLOCK.warmup, args.steps):
        batch = rows[step * args.batch_size : (step + 1) * args.batch_size]
        limits = {row["query"]: args.query_max_len for row in batch}
        for row in batch:
            limits |= dict.fromkeys([*row["pos"], *row.get("neg", [])], args.passage_max_len)
        for text, limit in limits.items():
            tokens = len(model.tokenizer(text, truncation=True, max_length=limit)["input_ids"])
            total += 6 * weights * tokens + 12 * layers * width * tokens**2
    return total / (args.steps - CLOCK.warmup) / 1e9


def main() -> None:
    """Measure what the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["embedtune", "trainer"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    for name in ("batch_size", "negatives", "query_max_len", "passage_max_len", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--pad", choices=["longest", "max_length"], default="longest")
    parser.add_argument("--attention_dropout", type=float, default=None)
    args, args.flags = parser.parse_known_args()
    CLOCK.steps = args.steps
    sys.modules["train"] = sys.modules["__main__"]  # what the callback is found by
    with tempfile.TemporaryDirectory() as folder:
        {"embedtune": embedtune, "trainer": trainer}[args.side](args, Path(folder))
    seconds = CLOCK.seconds()
    found = {
        "whole_s": time.perf_counter() - STARTED,
        "seconds": seconds,
        "step_s": statistics.mean(seconds) if seconds else None,
        "first_batch_s": CLOCK.first_batch,
        "anonymous_mb": CLOCK.anonymous_mb,
        "peak_mb": peak_mb(),
        "gigaflops": gigaflops(args) if seconds and args.side == "embedtune" else None,
        "logged": {name: float(value) for name, value in LOGGED.items()},
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and threads of the libraries take their time


if __name__ == "__main__":
    main()
