"""The study behind the defaults: each format of data, several sets, base models and seeds.

    python benchmarks/recipes.py --data FOLDER --models minilm=MODEL e5=MODEL --split test

trains every task of ``recipe_tasks`` with nothing but a model and data (``defaults``), with
Matryoshka widths beside (``mrl``), and with the variants that ``--variants NAME='FLAGS'`` adds, and
prints markdown tables: nDCG@10, of sentence pairs Spearman's correlation, against the base model,
with 95 % intervals and the seconds of a training. ``--peer`` adds SentenceTransformerTrainer
(``trainer``, and ``trainer-mrl`` with MatryoshkaLoss) on as many examples. A student of
distillation is the model itself with a half of its layers, and its base row that student before
training.

Choose with ``--split dev``. What was measured is kept under --work, by the names of task, model,
variant and seed, so that a study can be stopped, continued and widened; ``--minutes`` ends it after
a while, ``--processes`` shares it out.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import recipe_peer
import recipe_tasks
import torch
from recipe_tasks import Task
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedtune.cli.dispatch import main as embedtune
from embedtune.evaluation.intervals import PerQuery, intervals, outcome
from embedtune.evaluation.measure import measure
from embedtune.tools.teach import teach
from embedtune.whole_files import writing

WIDTHS = (128, 64, 32)
"""Measured beside the full width."""
VERSIONS = ("torch", "lightning", "transformers", "sentence-transformers")
ALL_WIDTHS = [384, *WIDTHS]
MRL = ["--model.use_mrl=true", f"--model.mrl_dims={','.join(map(str, ALL_WIDTHS))}"]
MRL_FORMATS = ("pair", "triplet", "distill")
PEER: dict[str, list[int]] = {"trainer": [], "trainer-mrl": ALL_WIDTHS}
"""Its variants, and the widths that they train."""
AGAINST = {"trainer": "defaults", "trainer-mrl": "mrl"}
"""Which of ours is compared with which of the peer's."""


class Job(NamedTuple):
    """One training of one base model on one task, and its measurement."""

    task: str
    model: str
    variant: str
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Name of its result; the base model has no seed."""
        seed = "" if self.variant == "base" else f".{self.seed}"
        return f"{self.task}.{self.model}.{self.variant}{seed}.{self.split}"


class Study(NamedTuple):
    """Where things are, and what the variants mean."""

    data: Path
    work: Path
    models: dict[str, str]
    variants: dict[str, list[str]]

    def result(self, job: Job) -> Path:
        """Return where a job's result is kept."""
        return self.work / "results" / f"{job.name}.pt"

    def run(self, job: Job) -> None:
        """Train and measure, in a process of its own."""
        torch.set_num_threads(1)
        tasks, out = self.work / "tasks", self.work / "runs" / job.name
        task = recipe_tasks.make(job.task, self.data, job.split, job.seed, tasks)
        model, teacher = self.models[job.model], None
        out.mkdir(parents=True, exist_ok=True)
        with (out / "output.txt").open("w") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        if task.format == "distill":
            teacher = task.rows.parent / f"teacher-{job.model}"
            teach(model, str(task.rows), teacher)
            model = str(halved(model, self.work / "students" / job.model))
        started = time.perf_counter()
        if job.variant in PEER:
            recipe_peer.train(model, task, teacher, job.seed, PEER[job.variant], out)
        elif job.variant != "base":
            fit(model, task, teacher, self.variants[job.variant], job.seed, out)
        seconds = time.perf_counter() - started
        metrics, per_query = quality(Path(model) if job.variant == "base" else out / "model", task)
        kept = {
            "metrics": metrics,
            "values": dict(per_query.values),
            "scores": per_query.scores,
            "seconds": seconds,
            "versions": {name: version(name) for name in VERSIONS},
        }
        self.result(job).parent.mkdir(exist_ok=True, parents=True)
        with writing(self.result(job)) as part:
            torch.save(kept, part)


def fit(
    model: str, task: Task, teacher: Path | None, flags: list[str], seed: int, out: Path
) -> None:
    """Train with nothing but a model and data, and the flags of a variant."""
    data = [f"--data.train_path={task.rows}"]
    if teacher is not None:
        data = [
            f"--data.train_path={teacher / 'texts.jsonl'}",
            f"--data.teacher_path={teacher / 'embeddings.f32'}",
        ]
    arguments = [
        "fit",
        f"--model.model_name_or_path={model}",
        f"--trainer.default_root_dir={out}",
        f"--seed_everything={seed}",
        "--save_on_epoch_end=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        *data,
        *flags,
    ]
    try:
        embedtune(arguments)
    except SystemExit as end:
        if end.code:
            raise


def halved(model: str, folder: Path) -> Path:
    """Save a model with every other of its layers, the last one kept, and return the folder."""
    if not folder.exists():
        student = SentenceTransformer(model, device="cpu")
        encoder: Any = student[0].model.encoder
        encoder.layer = encoder.layer[1::2]
        student[0].model.config.num_hidden_layers = len(encoder.layer)
        student.save_pretrained(str(folder))
    return folder


def quality(folder: Path, task: Task) -> tuple[dict[str, float], PerQuery]:
    """Measure a sentence-transformers folder at its full width and at WIDTHS."""
    model = SentenceTransformer(str(folder), device="cpu")
    testset = task.read_testset()
    first = _encode(model.encode_query, testset[0])
    second = _encode(model.encode_document, testset[1])
    widths = {"": first.shape[1]} | {f"/{width}": width for width in WIDTHS}
    found = measure(testset, first, second, widths, torch.device("cpu"))
    kept = [name for name in found.metrics if name.startswith(("ndcg@10", "spearman"))]
    values = {name: found.per_query.values[name] for name in kept}
    return {name: found.metrics[name] for name in kept}, found.per_query._replace(values=values)


def _encode(encode: Any, texts: list[str]) -> Tensor:
    return torch.from_numpy(encode(texts, show_progress_bar=False)).float()


# --- Tables ---------------------------------------------------------------------------------------


def table(study: Study, task: str, model: str, split: str, seeds: list[int]) -> Iterator[str]:
    """Yield the lines of the table of a task and a base model, of what is measured by now."""
    base = _read(study.result(Job(task, model, "base", 0, split)))
    if base is None:
        return
    names = list(base["metrics"])
    yield f"| {task}, {model} | seeds | seconds | {' | '.join(_title(name) for name in names)} |"
    yield "|---" * (3 + len(names)) + "|"
    values = [format(value, ".3f") for value in base["metrics"].values()]
    yield f"| base | | | {' | '.join(values)} |"
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in study.variants:
        results = {
            seed: _read(study.result(Job(task, model, variant, seed, split))) for seed in seeds
        }
        found = {seed: kept for seed, kept in results.items() if kept is not None}
        by_variant[variant] = found
        if found:
            took = statistics.mean(kept["seconds"] for kept in found.values())
            cells = [_cell([(base, kept) for kept in found.values()], name) for name in names]
            yield f"| {variant} | {len(found)} | {took:.0f} | {' | '.join(cells)} |"
    for peer, own in AGAINST.items():
        sides = [by_variant.get(side, {}) for side in (peer, own)]
        both = [(sides[0][seed], sides[1][seed]) for seed in seeds if all(seed in x for x in sides)]
        if both:
            cells = [_cell(both, name) for name in names]
            yield f"| {own} against {peer} | {len(both)} | | {' | '.join(cells)} |"
    yield ""


def _title(name: str) -> str:
    metric, _, width = name.partition("/")
    return width or f"{metric}, full width"


def _read(path: Path) -> dict[str, Any] | None:
    return torch.load(path) if path.exists() else None


def _cell(both: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> str:
    """Return the mean over seeds of the second, its change, the interval, and how often worse.

    Args:
        both: For each seed what is compared with, and what is compared.
        name: Of the metric.
    """
    first, second = (
        statistics.mean(k["metrics"][name] for k in side) for side in zip(*both, strict=True)
    )
    ends = [_interval(*pair, name) for pair in both]
    known = [interval for interval in ends if interval is not None]
    between = ""
    if known:
        low, high = (statistics.mean(side) for side in zip(*known, strict=True))
        between = f" ({low:+.3f} to {high:+.3f})"
    worse = sum(outcome(interval) == "worse" for interval in ends)
    told = f", worse in {worse}" if worse else ""
    return f"{second:.3f} {second - first:+.3f}{between}{told}"


def _interval(base: dict[str, Any], kept: dict[str, Any], name: str) -> tuple[float, float] | None:
    sides = [PerQuery({name: side["values"][name]}, side["scores"]) for side in (base, kept)]
    return intervals(*sides).get(name)


# --- The command ----------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--models", nargs="+", required=True, help="NAME=MODEL")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--tasks", nargs="+", default=recipe_tasks.names(), help="or their starts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--variants", nargs="*", default=[], help="NAME='FLAGS'")
    parser.add_argument("--peer", action="store_true", help="train by the peer, too")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    models = dict(part.split("=", 1) for part in given.models)
    added = dict(part.split("=", 1) for part in given.variants)
    variants = {"defaults": [], "mrl": MRL} | {
        name: shlex.split(flags) for name, flags in added.items()
    }
    if given.peer:
        variants |= {name: [] for name in PEER}
    os.environ["EMBEDTUNE_CACHE"] = str(given.work / "cache")
    study = Study(given.data, given.work, models, variants)
    tasks = [name for name in recipe_tasks.names() if name.startswith(tuple(given.tasks))]
    jobs = [
        Job(task, model, variant, seed, given.split)
        for seed in given.seeds
        for task in tasks
        for model in models
        for variant in ("base", *variants)
        if variant != "base" or seed == given.seeds[0]
        if "mrl" not in variant or task.split(".")[1] in MRL_FORMATS
    ]
    run_missing(study, jobs, given.processes, time.monotonic() + 60 * given.minutes)
    for model in models:
        for task in tasks:
            lines = table(study, task, model, given.split, given.seeds)
            sys.stdout.write("".join(f"{line}\n" for line in lines))


def run_missing(study: Study, jobs: list[Job], processes: int, end: float) -> None:
    """Run the jobs that have no result, so many at a time, until the time ends.

    Each in a fork, which has imported everything and changes nothing of this process.
    """
    missing = [job for job in jobs if not study.result(job).exists()]
    running: dict[int, tuple[Job, Any]] = {}
    while running or (missing and time.monotonic() < end):
        while missing and len(running) < processes and time.monotonic() < end:
            job = missing.pop(0)
            process = get_context("fork").Process(target=study.run, args=(job,))
            process.start()
            running[process.sentinel] = job, process
        for sentinel in wait(running):
            job, process = running.pop(sentinel)
            process.join()
            said = f": ended with {process.exitcode}" * bool(process.exitcode)
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {job.name}{said}\n")


if __name__ == "__main__":
    main()
