"""Measure training on one GPU, beside SentenceTransformerTrainer, in at most nine minutes.

    python benchmarks/gpu.py --out FOLDER [--sections steps memory ..] [--minutes 8.5]
    python benchmarks/gpu.py --out FOLDER --device cpu --tiny

prints each line of its tables as it is measured, and keeps them in FOLDER/gpu.json: what is there
already is not measured again. It needs no network: the models have the sizes of well-known ones and
random weights, the texts the lengths of well-known data sets (deciles of their tokens).

A ratio is taken within one process on one card: both trainers get the same model, rows, loss
(InfoNCE over all positives and negatives of the batch), AdamW, clipping and autocast. The other
trainer runs with ``sdpa`` at each of several batch sizes, of which the best counts.
"""

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line

import datasets
import lightning.pytorch as pl
import torch
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import BatchSampler, SequentialSampler

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.callbacks.finite import Finite
from embedtune.callbacks.throughput import Throughput
from embedtune.losses import InfoNCE

VERSIONS = ("torch", "lightning", "transformers", "sentence-transformers")
TEMPERATURE = 0.02
LARGE = 10_000
"""Rows of a batch of which one step is timed, and none looked into."""
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


class Size(NamedTuple):
    """The shape of a model."""

    kind: type
    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    more: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it


def _qwen(layers: int, width: int, heads: int, inner: int) -> Size:
    more = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    return Size(transformers.Qwen3Config, layers, width, heads, inner, 151936, more)


BERT, XLM_R = transformers.BertConfig, transformers.XLMRobertaConfig
SIZES = {
    "MiniLM": Size(BERT, 6, 384, 12, 1536, 30522),
    "BERT-base": Size(BERT, 12, 768, 12, 3072, 30522),
    "ModernBERT-base": Size(transformers.ModernBertConfig, 22, 768, 12, 1152, 50368),
    "XLM-R-large": Size(XLM_R, 24, 1024, 16, 4096, 250002, {"max_position_embeddings": 514}),
    "Qwen3-0.6B": _qwen(28, 1024, 16, 3072),
    "Qwen3-1.7B": _qwen(28, 2048, 16, 6144),
}
LENGTHS = {
    # Deciles of the tokens of queries, and of positives and negatives.
    "scifact": (
        [7, 14, 16, 17, 19, 21, 23, 25, 28, 33, 79],
        [80, 226, 262, 289, 316, 352, 383, 421, 472, 512, 512],
    ),
    "banking77": (
        [4, 9, 10, 11, 12, 13, 15, 16, 19, 27, 79],
        [6, 10, 12, 13, 14, 15, 16, 20, 24, 34, 87],
    ),
    "t2rank": (
        [8, 9, 10, 10, 11, 12, 12, 12, 14, 16, 22],
        [6, 66, 108, 167, 220, 299, 385, 512, 512, 512, 512],
    ),
    "full": ([512] * 11, [512] * 11),
}


class Case(NamedTuple):
    """What is measured: a model on rows of some lengths."""

    size: str
    lengths: str
    batch: int  # rows of a query, a positive and a negative
    precision: str = "bf16"
    attention_dropout: float | None = None
    compile: bool = False
    trainers_batches: tuple[int, ...] = ()
    grad_cache: bool = False
    negatives: int = 1

    def __str__(self) -> str:
        dropout = "" if self.attention_dropout is None else " no attention dropout"
        cache = " grad_cache" if self.grad_cache else ""
        return (
            f"{self.size} {self.lengths} {self.batch} {self.precision}{dropout}{cache}"
            f"{' compiled' if self.compile else ''}"
        )


STEPS = [
    Case("MiniLM", "banking77", 2048, compile=True, trainers_batches=(2048,)),
    Case("MiniLM", "scifact", 256, compile=True, trainers_batches=(256,)),
    Case("BERT-base", "banking77", 1024, compile=True, trainers_batches=(1024, 512)),
    Case("BERT-base", "scifact", 96, compile=True, trainers_batches=(96,)),
    Case("ModernBERT-base", "scifact", 96, compile=True, trainers_batches=(96,)),
    Case("Qwen3-0.6B", "t2rank", 32, compile=True, trainers_batches=(32, 16)),
    Case("MiniLM", "scifact", 256, precision="fp32", trainers_batches=(256,)),
    Case("MiniLM", "scifact", 256),
    Case("BERT-base", "scifact", 96),
    Case("BERT-base", "full", 48, compile=True, trainers_batches=(48,)),
    Case("BERT-base", "full", 48, attention_dropout=0.0, compile=True, trainers_batches=(48,)),
    Case("XLM-R-large", "scifact", 32, compile=True, trainers_batches=(32,)),
    Case("MiniLM", "full", 128, compile=True, trainers_batches=(128,)),
    Case("Qwen3-1.7B", "t2rank", 16, compile=True, trainers_batches=(16, 8)),
]
"""The other trainer's batches are the best of several that were tried (H200)."""
MEMORY = [
    Case("MiniLM", "banking77", 1024, negatives=0),
    Case("MiniLM", "banking77", 1024, negatives=0, grad_cache=True),
    Case("BERT-base", "scifact", 96, grad_cache=True),
    Case("MiniLM", "banking77", 65536, negatives=0, grad_cache=True),
]


class Clock:
    """Times steps: warm-up, then as many as are wanted; the device is waited for at both ends."""

    def __init__(self, device: str, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.wanted = device, warmup, steps
        self.ended = 0
        self.started = self.first = self.since = self.seconds = 0.0

    def start(self) -> None:
        """Start with the model loaded."""
        self.started = time.perf_counter()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def tick(self) -> None:
        """Note that a step has ended."""
        self.ended += 1
        if self.ended in (1, self.warmup, self.warmup + self.wanted):
            self._wait()
        if self.ended == 1:
            self.first = time.perf_counter() - self.started
        if self.ended == self.warmup:
            self.since = time.perf_counter()
        if self.ended == self.warmup + self.wanted:
            self.seconds = (time.perf_counter() - self.since) / self.wanted


class Recorder(pl.Callback):
    """Times the steps, and looks into one more: launches, and what waits for the device."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens: list[int] = []
        self.waited, self.left = 0.0, 0.0
        self.chunks: list[int] = []
        self.launches, self.profiler = 0, None
        self.waits: Counter[str] = Counter()
        self.logged: dict[str, float] = {}

    def _looks(self) -> bool:
        return self.clock.ended == self.clock.warmup + self.clock.wanted

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Count the batch, or start to look."""
        if not self._looks():
            if self.clock.ended >= self.clock.warmup:
                self.waited += time.perf_counter() - self.left
                self.tokens.append(batch.tokens[0])
                self.chunks.append(len(batch.chunks))
            return
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.clock.device == "cuda":
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Note the step, or what was seen in it."""
        if self.profiler is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.waits.update(
                f"{Path(w.filename).name}:{w.lineno}"
                for w in self.found
                if "synchroniz" in str(w.message)
            )
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            self.launches = sum(
                event.count for event in self.profiler.key_averages() if "LaunchKernel" in event.key
            )
            self.table = self.profiler.key_averages().table(
                sort_by="self_device_time_total", row_limit=25, max_name_column_width=60
            )
        self.clock.tick()
        self.left = time.perf_counter()


class TrainerRecorder(transformers.TrainerCallback):
    """Times the steps of transformers' Trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.clock.tick()


class Bench:
    """Models, rows, and where results are kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny = args.device, args.tiny
        self.steps, self.warmup = (2, 1) if args.tiny else (args.steps, 4)
        self.out = Path(args.out)
        (self.out / "work").mkdir(parents=True, exist_ok=True)
        self.ends = time.monotonic() + 60 * args.minutes
        self.results: dict[str, Any] = {}
        if self._file.exists():
            self.results = json.loads(self._file.read_text("utf-8"))
        self.rates: dict[str, float] = {}
        # Cached tables lie with the rest.
        os.environ["EMBEDTUNE_CACHE"] = str(self.out / "work" / "cache")

    @property
    def _file(self) -> Path:
        return self.out / "gpu.json"

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured before under ``key``, or measure it while there is time."""
        if key not in self.results:
            if time.monotonic() > self.ends:
                return None
            self.results[key] = measure()
            self._file.write_text(json.dumps(self.results, indent=1), "utf-8")
            self.free()
        return self.results[key]

    def free(self) -> None:
        """Give back what a run held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def rate(self, precision: str) -> float:
        """Return the card's rate of matrix products in FLOP/s."""

        def measure() -> float:
            kind = torch.bfloat16 if precision == "bf16" else torch.float32
            size = 256 if self.tiny else 8192
            a, b = torch.randn(2, size, size, device=self.device).to(kind)
            seconds = []
            for _ in range(20):
                started = time.perf_counter()
                a @ b
                if self.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            return 2 * size**3 / statistics.median(seconds)

        if precision not in self.rates:
            self.rates[precision] = measure()
        return self.rates[precision]

    def size(self, name: str) -> Size:
        """Return a model's size, or a tiny one of its kind."""
        size = SIZES[name]
        if not self.tiny:
            return size
        more = dict(size.more)
        if "head_dim" in more:
            more |= {"num_key_value_heads": 2, "head_dim": 16}
        return size._replace(layers=2, width=64, heads=4, inner=96, vocabulary=1000, more=more)

    def model(self, name: str) -> str:
        """Write a sentence-transformers folder with random weights, and return its path."""
        path = self.out / "work" / name
        if not path.exists():
            size = self.size(name)
            shutil.rmtree(path, ignore_errors=True)
            config = size.kind(
                vocab_size=size.vocabulary,
                num_hidden_layers=size.layers,
                hidden_size=size.width,
                num_attention_heads=size.heads,
                intermediate_size=size.inner,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **{"max_position_embeddings": 512, **size.more},
            )
            torch.manual_seed(0)
            with torch.device(self.device):
                transformers.AutoModel.from_config(config).save_pretrained(path / "hf")
            _tokenizer(size.vocabulary).save_pretrained(path / "hf")
            transformer = Transformer(str(path / "hf"), max_seq_length=512)
            pooling = Pooling(transformer.get_embedding_dimension(), "mean")
            SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(path))
            shutil.rmtree(path / "hf")
        return str(path)

    def rows(self, case: Case, batch: int, steps: int) -> list[dict[str, Any]]:
        """Return rows whose texts have the lengths of the case, the same for every batch size."""
        random.seed(0)
        words = min(self.size(case.size).vocabulary, 30000) - len(SPECIAL)
        vocabulary = [f"w{i}" for i in range(words)]
        queries, documents = LENGTHS[case.lengths]

        def text(deciles: list[int]) -> str:
            at = random.random() * 10
            low, high = deciles[int(at)], deciles[int(at) + 1]
            count = round(low + (high - low) * (at % 1)) - 2  # [CLS] and [SEP]
            return " ".join(random.choices(vocabulary, k=max(1, count)))

        return [
            {
                "query": text(queries),
                "pos": [text(documents)],
                **(
                    {"neg": [text(documents) for _ in range(case.negatives)]}
                    if case.negatives
                    else {}
                ),
            }
            for _ in range(batch * steps)
        ]

    def flops(self, case: Case, rows: list[dict[str, Any]]) -> float:
        """Return what the rows need: 6 a parameter and token, and attention; no padding."""
        size = self.size(case.size)
        model = transformers.AutoConfig.from_pretrained(self.model(case.size))
        inner = size.inner * (3 if size.kind is not BERT and size.kind is not XLM_R else 2)
        heads = getattr(model, "head_dim", None) or size.width // size.heads
        key_heads = getattr(model, "num_key_value_heads", None) or size.heads
        attention = size.width * heads * (2 * size.heads + 2 * key_heads)
        weights = size.layers * (size.width * inner + attention)
        causal = 0.5 if "Qwen" in case.size else 1.0
        total = 0.0
        for row in rows:
            for text in [row["query"], *row["pos"], *row.get("neg", [])]:
                limit = 128 if text is row["query"] and case.lengths != "full" else 512
                tokens = min(limit, text.count(" ") + 3)
                total += 6 * weights * tokens
                total += 12 * causal * size.layers * heads * size.heads * tokens**2
        return total


def _tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"w{i}": i + len(SPECIAL) for i in range(vocabulary - len(SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def ours(bench: Bench, case: Case) -> dict[str, Any]:
    """Train with embedtune, and return what was measured."""
    warmup, timed_steps = (1, 1) if case.batch > LARGE else (bench.warmup, bench.steps)
    looks = case.batch <= LARGE
    steps = warmup + timed_steps + looks
    rows = bench.rows(case, case.batch, steps)
    path = bench.out / "work" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    module = EmbeddingModule(
        bench.model(case.size),
        attention_dropout=case.attention_dropout,
        grad_cache=case.grad_cache,
        compile=case.compile,
        loss=InfoNCE(TEMPERATURE, in_batch_positives=True),
    )
    data = EmbeddingDataModule(
        str(path),
        batch_size=case.batch,
        neg_nums=1,
        query_max_len=512 if case.lengths == "full" else 128,
        passage_max_len=512,
        shuffle=False,
        num_workers=None if bench.device == "cuda" else 0,
    )
    clock = Clock(bench.device, warmup, timed_steps)
    recorder = Recorder(clock)
    trainer = pl.Trainer(
        accelerator=bench.device.replace("cuda", "gpu"),
        devices=1,
        max_steps=steps,
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[Finite(), Throughput(), recorder],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(bench.out / "work"),
    )
    clock.start()
    trainer.fit(module, datamodule=data)
    timed = rows[warmup * case.batch : (warmup + timed_steps) * case.batch]
    needed = bench.flops(case, timed) / timed_steps
    return {
        "step_s": clock.seconds,
        "first_s": clock.first,
        "tokens_s": statistics.mean(recorder.tokens) / clock.seconds,
        "examples_s": case.batch / clock.seconds,
        "share": needed / clock.seconds / bench.rate(case.precision),
        "chunk_ms": 1000 * clock.seconds / statistics.mean(recorder.chunks),
        "peak_gib": peak(bench),
        "launches": recorder.launches,
        "waits": dict(recorder.waits),
        "table": getattr(recorder, "table", ""),
        "packs": module.encoder.packs,
        "waited": recorder.waited / clock.seconds / timed_steps,
        **{k.removeprefix("train/"): v for k, v in recorder.logged.items()},
    }


def peak(bench: Bench) -> float:
    """Return the largest memory of tensors on the device in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else 0.0


def theirs(bench: Bench, case: Case, batch: int) -> dict[str, Any]:
    """Train with SentenceTransformerTrainer, and return what was measured."""
    steps = bench.warmup + bench.steps
    rows = bench.rows(case, batch, steps)
    config = {}
    if case.attention_dropout is not None:
        config["attention_probs_dropout_prob"] = case.attention_dropout
    model = SentenceTransformer(
        bench.model(case.size),
        device="cpu",
        config_kwargs=config,
        model_kwargs={"attn_implementation": "sdpa", "dtype": torch.float32},
    )
    columns = {
        "query": [row["query"] for row in rows],
        "positive": [row["pos"][0] for row in rows],
        "negative": [row["neg"][0] for row in rows],
    }
    clock = Clock(bench.device, bench.warmup, bench.steps)
    run = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(bench.out / "work" / "theirs"),
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=2e-5,
            bf16=case.precision == "bf16",
            use_cpu=bench.device == "cpu",
            dataloader_num_workers=4 if bench.device == "cuda" else 0,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=True,
            batch_sampler=_in_order,
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        callbacks=[TrainerRecorder(clock)],
    )
    clock.start()
    try:
        run.train()
    except torch.OutOfMemoryError:
        return {"batch": batch, "examples_s": 0.0, "step_s": 0.0, "peak_gib": 0.0}
    return {
        "batch": batch,
        "examples_s": batch / clock.seconds,
        "step_s": clock.seconds,
        "peak_gib": peak(bench),
    }


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def say(cells: list[str]) -> None:
    """Print a line of a table at once."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def ruled(header: list[str]) -> None:
    """Print the head of a table."""
    say(header)
    say(["---"] * len(header))


def steps(bench: Bench) -> None:
    """Compare steps with the other trainer's."""
    header = ["model", "rows", "batch", "settings", "tokens/s", "of the card's rate", "examples/s"]
    header += ["against the trainer (its batch)", "peak GiB (trainer's)", "no padding"]
    ruled([*header, "ms a chunk", "input wait", "launches a step", "waits", "first step"])
    for case in STEPS:
        if bench.tiny:
            case = case._replace(batch=8, trainers_batches=(8,), compile=False)
        found = bench.once(str(case), lambda case=case: ours(bench, case))
        if found is None:
            return
        others = [
            bench.once(f"trainer {b}: {case}", lambda b=b, case=case: theirs(bench, case, b))
            for b in case.trainers_batches
        ]
        best = max((o for o in others if o), key=lambda o: o["examples_s"], default=None)
        say(_line(case, found, best))


def _line(case: Case, found: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    settings = [case.precision, "compiled" if case.compile else "eager"]
    settings += [] if case.attention_dropout is None else ["no attention dropout"]
    against = (
        ""
        if not best or not best["examples_s"]
        else (f"{found['examples_s'] / best['examples_s']:.2f}x ({best['batch']})")
    )
    return [
        case.size,
        case.lengths,
        f"{case.batch:,}",
        ", ".join(settings),
        f"{found['tokens_s'] / 1e6:.3f}M",
        f"{found['share']:.0%}",
        f"{found['examples_s']:,.0f}",
        against,
        f"{found['peak_gib']:.1f}" + (f" ({best['peak_gib']:.1f})" if best else ""),
        f"{found.get('padding_efficiency', 0):.1%}",
        f"{found['chunk_ms']:.1f}",
        f"{found['waited']:.1%}",
        f"{found['launches']:,}",
        str(sum(found["waits"].values())),
        f"{found['first_s']:.1f} s",
    ]


def memory(bench: Bench) -> None:
    """Measure the gradient cache."""
    ruled(["model", "rows", "batch", "grad_cache", "peak GiB", "step", "tokens/s"])
    for case in MEMORY:
        if bench.tiny:
            case = case._replace(batch=min(case.batch, 64))
        found = bench.once(str(case), lambda case=case: ours(bench, case))
        if found is None:
            return
        numbers = f"{found['peak_gib']:.2f}", f"{found['step_s']:.3f} s"
        cells = [case.size, case.lengths, f"{case.batch:,}", str(case.grad_cache).lower()]
        say([*cells, *numbers, f"{found['tokens_s'] / 1e6:.3f}M"])


SECTIONS = {"steps": steps, "memory": memory}


def main() -> None:
    """Measure the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models that try the script")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=8.5)
    args = parser.parse_args()
    bench = Bench(args)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    found = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    rates = ", ".join(f"{k} {bench.rate(k) / 1e12:.0f} TFLOP/s" for k in ("bf16", "fp32"))
    sys.stdout.write(f"{time.strftime('%Y-%m-%d')}, {card}, {found}; matrix products: {rates}\n\n")
    for name in args.sections:
        SECTIONS[name](bench)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
