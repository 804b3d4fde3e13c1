"""Measure embedtune against SentenceTransformerTrainer, and what it promises of memory and rows.

    python benchmarks/bench.py --model MODEL [--data FOLDER] [--sections trainers memory ..]

prints markdown tables. FOLDER holds scifact/train.jsonl.gz, banking77/train.jsonl.gz and
seed_examples/t2rank_100.jsonl (triplet rows); without it the demo's docstrings are used. Processes
alternate, so that what else the machine does meets both sides alike; ratios are taken in pairs.
"""

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
VERSIONS = ("torch", "lightning", "transformers", "sentence-transformers")


class Workload(NamedTuple):
    """Rows, and how they are trained on."""

    path: str
    batch_size: int
    negatives: int
    query_max_len: int
    passage_max_len: int
    steps: int

    @property
    def flags(self) -> list[str]:
        """Return them as arguments of benchmarks/train.py."""
        return [f"--{name}={value}" for name, value in self._asdict().items() if name != "path"]


WORKLOADS = {
    "scifact": Workload("scifact/train.jsonl.gz", 8, 1, 128, 512, 6),
    "banking77": Workload("banking77/train.jsonl.gz", 32, 2, 128, 128, 8),
    "t2rank_100": Workload("seed_examples/t2rank_100.jsonl", 8, 1, 128, 384, 6),
}
DEMO = {"docstrings": Workload("demo/train.jsonl", 64, 0, 64, 64, 10)}
ON_GPU = torch.cuda.is_available()


class Bench:
    """Where the rows are, and how processes are started."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.rounds, self.work = args.model, args.rounds, Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.data, self.workloads = args.data, WORKLOADS if args.data else DEMO
        if ON_GPU:  # batches that fill it
            self.workloads = {
                name: workload._replace(batch_size=256, steps=40)
                for name, workload in self.workloads.items()
            }
        if self.data is None:
            self._command(["-m", "embedtune", "demo-data", "--out", str(self.work / "demo")])
            self.data = str(self.work)

    def _command(self, arguments: list[str], **more: str) -> str:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {' '.join(arguments)[:200]}\n")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "EMBEDTUNE_CACHE": str(self.work / "cache"),
            **more,
        }
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return done.stdout

    def script(self, name: str) -> str:
        """Return what another script of this folder prints, with one thread."""
        return self._command([str(HERE / name)], OMP_NUM_THREADS="1")

    def train(self, side: str, rows: Path, flags: list[str]) -> dict[str, Any]:
        """Run benchmarks/train.py and return what it measured."""
        script = [str(HERE / "train.py"), side, f"--model={self.model}", f"--rows={rows}"]
        return json.loads(self._command([*script, *flags]).splitlines()[-1])

    def rows(self, name: str, workload: Workload, negatives: int, count: int) -> Path:
        """Write ``count`` rows with one positive and so many negatives each, in random order."""
        path = Path(self.data) / workload.path
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        random.Random(0).shuffle(found)
        out = self.work / f"{name}-{negatives}-{count}.jsonl"
        with out.open("w") as file:
            for i in range(count):
                row = found[i % len(found)]
                again = f" {i // len(found)}" if i >= len(found) else ""
                made = {"query": row["query"] + again, "pos": [row["pos"][0] + again]}
                if negatives:
                    made["neg"] = [row["neg"][j % len(row["neg"])] for j in range(negatives)]
                file.write(json.dumps(made) + "\n")
        return out


def multiplication_rate(kind: torch.dtype) -> float:
    """Return the rate of products of matrices, the median of 50, in GFLOP/s."""
    size = 8192 if ON_GPU else 2048
    a, b = torch.randn(2, size, size, device="cuda" if ON_GPU else "cpu").to(kind)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        a @ b
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a markdown table."""
    ruled = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled) + "\n"


def trainers(bench: Bench) -> str:
    """Compare steps, whole processes and memory with SentenceTransformerTrainer."""
    lines, padded_lines = [], []
    for name, workload in bench.workloads.items():
        count = workload.steps * workload.batch_size
        rows = bench.rows(name, workload, workload.negatives, count)
        # Without attention dropout once: both trainers then use fused attention.
        for dropout in (None, 0.0) if name == next(iter(bench.workloads)) else (None,):
            for precision in ("fp32", "bf16"):
                flags = [*workload.flags, f"--precision={precision}"]
                flags += [] if dropout is None else [f"--attention_dropout={dropout}"]
                runs = [("embedtune", flags), ("trainer", flags)]
                pads = precision == "bf16" and dropout is None and not ON_GPU
                if pads:
                    padded = ["--precision=fp32", "--pad=max_length"]
                    runs.append(("trainer", [*workload.flags, *padded]))
                kind = torch.bfloat16 if precision == "bf16" else torch.float32
                rounds, rate = _alternate(bench, rows, runs, kind)
                lines.append([name, _setting(precision, dropout), *_compared(rounds, rate)])
                if pads:
                    step = statistics.median(found[2]["step_s"] for found in rounds)
                    times = _ratio(rounds, "step_s", 2)
                    padded_lines.append([name, f"{step:.2f} s", times])
    header = ["rows", "precision, attention dropout", "step", "trainer's step", "examples/s"]
    header += ["whole process", "peak memory", "padding efficiency", "input wait", "GFLOP/s"]
    against = ["rows", "step padded to max_length, fp32", "embedtune's default (bf16), examples/s"]
    return table([*header, "of the processor's"], lines) + "\n" + table(against, padded_lines)


def _setting(precision: str, dropout: float | None) -> str:
    return f"{precision}, {'as the model has it' if dropout is None else dropout}"


Rounds = list[list[dict[str, Any]]]
"""What each process of each round measured; embedtune's comes first."""


def _alternate(
    bench: Bench, rows: Path, runs: list[tuple[str, list[str]]], kind: torch.dtype
) -> tuple[Rounds, float]:
    """Return what the rounds measured, and the processor's median rate between them."""
    rounds, rates = [], []
    for _ in range(bench.rounds):
        rates.append(multiplication_rate(kind))
        rounds.append([bench.train(side, rows, flags) for side, flags in runs])
    return rounds, statistics.median(rates)


def _ratio(rounds: Rounds, key: str, other: int) -> str:
    """Return the median ratio of another process to embedtune's, each within its round."""
    return f"{statistics.median(found[other][key] / found[0][key] for found in rounds):.2f}x"


def _compared(rounds: Rounds, processor: float) -> list[str]:
    steps = [statistics.median(found[side]["step_s"] for found in rounds) for side in (0, 1)]
    logged = rounds[-1][0]["logged"]
    rate = statistics.median(ours["gigaflops"] / ours["step_s"] for ours, *_ in rounds)
    return [
        *(f"{step:.2f} s" if step > 1 else f"{step * 1000:.0f} ms" for step in steps),
        *(_ratio(rounds, key, 1) for key in ("step_s", "whole_s", "peak_mb")),
        f"{logged['train/padding_efficiency']:.1%}",
        f"{logged['train/input_wait']:.1%}",
        f"{rate:.0f}",
        f"{rate / processor:.0%} of {processor:.0f}",
    ]


_BOTH = (True, False)  # with the gradient cache, and without


def memory(bench: Bench) -> str:
    """Measure peak memory against the batch, with the gradient cache and without."""
    name = next(iter(bench.workloads))
    lines = [
        _cached(bench, name, batch, caches, steps)
        for batch, caches, steps in ((64, _BOTH, 4), (256, _BOTH, 4), (2048, (True,), 2))
    ]
    header = ["pairs a batch", "peak memory, grad_cache", "without", "step, grad_cache", "without"]
    return table([*header, "time ratio"], lines)


def _cached(bench: Bench, name: str, batch: int, caches: tuple[bool, ...], steps: int) -> list[str]:
    workload = bench.workloads[name]
    workload = workload._replace(batch_size=batch, negatives=0, passage_max_len=64, steps=steps)
    rows = bench.rows(f"{name}-pairs", workload, 0, steps * batch)
    found: dict[bool, list[dict[str, Any]]] = {cache: [] for cache in caches}
    for _ in range(bench.rounds if len(caches) > 1 else 1):
        for cache in caches:
            flags = ["--precision=bf16", f"--model.grad_cache={str(cache).lower()}"]
            found[cache].append(bench.train("embedtune", rows, [*workload.flags, *flags]))
    peaks = [f"{max(r['peak_mb'] for r in found[c]):,.0f} MB" if c in found else "" for c in _BOTH]
    timed = steps > 2  # the first two warm up
    seconds = {
        c: statistics.median(r["step_s"] for r in runs) for c, runs in found.items() if timed
    }
    times = [f"{seconds[c]:.2f} s" if c in seconds else "" for c in _BOTH]
    ratio = ""
    if len(seconds) > 1:
        pairs = zip(found[True], found[False], strict=True)
        ratio = f"{statistics.median(a['step_s'] / b['step_s'] for a, b in pairs):.2f}x"
    return [f"{batch:,}", *peaks, *times, ratio]


def matryoshka(bench: Bench) -> str:
    """Measure what eight Matryoshka widths add to a step of 256 pairs."""
    name = "banking77" if "banking77" in bench.workloads else "docstrings"
    flags = ["--precision=bf16"]
    workload = bench.workloads[name]._replace(batch_size=256, negatives=0, steps=5)
    rows = bench.rows(f"{name}-pairs", workload, 0, 5 * 256)
    widths = ["--model.use_mrl=true", "--model.mrl_dims=384,320,256,192,128,96,64,32"]
    pairs = []
    for _ in range(bench.rounds):
        both = ([*workload.flags, *flags], [*workload.flags, *flags, *widths])
        pairs.append([bench.train("embedtune", rows, f)["step_s"] for f in both])
    without, with_widths = (statistics.median(steps) for steps in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    cells = [name, f"{without:.2f} s", f"{with_widths:.2f} s", f"{ratio:.2f}x"]
    return table(["256 pairs of", "step", "with 8 widths", "ratio"], [cells])


def rows(bench: Bench) -> str:
    """Measure the time to the first batch, and anonymous memory there, against the rows."""
    lines = []
    for count in (10_000, 100_000, 1_000_000):
        path = bench.work / f"synthetic-{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                words = " ".join(f"word{(i * j) % 997}" for j in range(1, 25))
                file.write(json.dumps({"query": f"what is {i}?", "pos": [f"{words} {i}"]}) + "\n")
        workload = Workload("", 32, 0, 64, 64, 1)
        flags = [*workload.flags, "--precision=fp32"]
        opened = [bench.train("embedtune", path, flags) for _ in range(2)]
        cells = [(f"{r['first_batch_s']:.1f} s", f"{r['anonymous_mb']:,.0f} MB") for r in opened]
        size = f"{path.stat().st_size / 1e6:,.0f} MB"
        lines.append([f"{count:,}", size, *(cell for pair in cells for cell in pair)])
        path.unlink()
    header = ["rows", "file", "first batch after", "memory", "the second time", "memory"]
    return table(header, lines)


def losses(bench: Bench) -> str:
    """Measure the losses alone."""
    return bench.script("losses.py")


SECTIONS: dict[str, tuple[str, Callable[[Bench], str]]] = {
    "trainers": ("Against SentenceTransformerTrainer", trainers),
    "memory": ("Memory against the batch", memory),
    "matryoshka": ("Matryoshka widths", matryoshka),
    "losses": ("Losses", losses),
    "rows": ("Memory and first batch against the rows", rows),
}


def main() -> None:
    """Print the tables that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    parser.add_argument("--data", default=None, help="folder of the rows")
    parser.add_argument("--work", default="runs/bench", help="folder for what is written")
    parser.add_argument("--rounds", type=int, default=3, help="times that the processes take turns")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    cpu = Path("/proc/cpuinfo")
    model = platform.processor()
    if cpu.exists():
        names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    if ON_GPU:
        model = f"{torch.cuda.get_device_name()}, {model}"
    known = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    sys.stdout.write(f"{time.strftime('%Y-%m-%d')}, {model}, {torch.get_num_threads()} threads")
    sys.stdout.write(f", {known}\n")
    bench = Bench(args)
    for section in args.sections:
        title, measure = SECTIONS[section]
        sys.stdout.write(f"\n## {title}\n\n{measure(bench)}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
