"""Compare the quality of what embedtune and SentenceTransformerTrainer train on the same rows.

    python benchmarks/quality.py --model MODEL --data FOLDER [--sets scifact ..] [--seeds 1 2 3]

prints markdown tables of nDCG@10. FOLDER holds test sets in BEIR layout, each with train.jsonl.gz
({"query", "pos", "neg"}). A training is a process; what it trained is evaluated here, and its
result kept as json under --work, so that a run can be stopped and continued. ``--split dev`` trains
on two thirds of the train queries, drawn by the seed, and evaluates on the others: choose recipes
there (``--recipe lr=2e-5``).
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor

WIDTHS = (384, 128, 64, 32)
MAX_LEN = 256  # tokens of an evaluated text
DEV_SHARE = 1 / 3  # of the train queries
DEV_DOCS = 1500  # of the corpus, for the dev split alone
PRECISION = "bf16"  # of the encoder in evaluation
VERSIONS = ("torch", "lightning", "transformers", "sentence-transformers")
INITS = {
    "embedtune": "pca",
    "random-init": "random",
    "no-projection": "none",
    "pca-start": "pca",
    "random-start": "random",
}  # projection_init; a start is evaluated before training
SIDES = ("base", "trainer", *INITS)


class Recipe(NamedTuple):
    """How a set is trained on, by both trainers."""

    temperature: float = 0.05
    lr: float = 5e-5
    batch_size: int = 32
    steps: int = 50
    max_len: int = 128
    negatives: int = 0  # hard negatives an example
    multi_positive: bool = False  # embedtune alone


RECIPES = {
    "scifact": Recipe(steps=29),
    "banking77": Recipe(batch_size=64, steps=60, max_len=64),
    "cranfield": Recipe(steps=34),
}


# --- Data -----------------------------------------------------------------------------------------


class Retrieval(NamedTuple):
    """What is searched: texts and relevant document ids, by id."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_retrieval(folder: Path, split: str) -> Retrieval:
    """Read a BEIR folder; a document is its title and its text."""
    queries = {line["_id"]: line["text"] for line in read_lines(folder / "queries.jsonl")}
    corpus = {
        line["_id"]: f"{line.get('title', '')} {line['text']}".strip()
        for line in read_lines(folder / "corpus.jsonl")
    }
    relevant: dict[str, set[str]] = {}
    for row in (folder / "qrels" / f"{split}.tsv").read_text("utf-8").splitlines()[1:]:
        query, document, _ = row.split("\t")  # every grade of these sets is 1
        relevant.setdefault(query, set()).add(document)
    return Retrieval({name: queries[name] for name in relevant}, corpus, relevant)


def held_out(data: Retrieval, seed: int) -> Retrieval:
    """Return the part of the train queries that is for choosing recipes."""
    draw = random.Random(seed)
    texts = sorted(set(data.queries.values()))
    chosen = set(draw.sample(texts, round(len(texts) * DEV_SHARE)))
    queries = {name: text for name, text in data.queries.items() if text in chosen}
    relevant = {name: data.relevant[name] for name in queries}
    kept = sorted(set().union(*relevant.values()))
    others = sorted(data.corpus.keys() - set(kept))
    kept += draw.sample(others, min(len(others), max(DEV_DOCS - len(kept), 0)))
    return Retrieval(queries, {name: data.corpus[name] for name in kept}, relevant)


# --- Evaluation -----------------------------------------------------------------------------------


class StoredEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers' evaluator over embeddings that were encoded before."""

    def ndcg(self, embeddings: dict[str, Tensor], width: int) -> float:
        """Return nDCG@10 of embeddings, cut to ``width``, by cosine."""
        self.embeddings = {role: found[:, :width] for role, found in embeddings.items()}
        scores: Any = self.compute_all_metrics(None)
        return scores["cosine"]["ndcg@k"][10]

    def embed_inputs(self, *args: Any, encode_fn_name: str, **kwargs: Any) -> Tensor:
        """Return the embeddings of a role."""
        return self.embeddings[encode_fn_name]


def encode(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Embed texts with the modules up to the pooling, before any projection."""
    encoder = SentenceTransformer(modules=list(model)[:2], device="cpu")
    encoder.max_seq_length = MAX_LEN
    with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
        found = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return found.float()


def measure(model: SentenceTransformer, data: Retrieval, pooled: Tensor) -> list[float]:
    """Return nDCG@10 at each of WIDTHS, from pooled embeddings of queries and then documents."""
    features = {"sentence_embedding": pooled}
    with torch.no_grad():
        for module in list(model)[2:]:
            features = module(features)
    query, document = features["sentence_embedding"].split([len(data.queries), len(data.corpus)])
    evaluator = StoredEvaluator(*data, score_functions={"cosine": model.similarity})
    return [evaluator.ndcg({"query": query, "document": document}, width) for width in WIDTHS]


# --- Training -------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One training."""

    side: str
    name: str
    split: str
    seed: int
    recipe: Recipe

    @property
    def file(self) -> str:
        """Return the name of its result; an untrained model has no recipe, the base no seed."""
        if self.side == "base":
            return f"{self.name}.{self.split}.base{self.seed if self.split == 'dev' else ''}"
        recipe = "-".join(f"{value:g}" for value in self.recipe)
        return f"{self.name}.{self.split}.{self.side}.seed{self.seed}.{recipe}"


def embedtune_flags(job: Job) -> list[str]:
    """Return the arguments of ``embedtune fit``; a start has a rate of next to nothing."""
    recipe = job.recipe
    steps, lr = (1, 1e-12) if job.side.endswith("-start") else (recipe.steps, recipe.lr)
    widths = ",".join(map(str, WIDTHS))
    return f"""
        --seed_everything={job.seed} --save_on_epoch_end=false
        --model.use_mrl=true --model.mrl_dims={widths} --model.projection_init={INITS[job.side]}
        --model.attention_dropout=0 --model.lr={lr} --model.loss=embedtune.losses.InfoNCE
        --model.loss.temperature={recipe.temperature} --model.loss.in_batch_positives=true
        --model.loss.multi_positive={str(recipe.multi_positive).lower()}
        --data.batch_size={recipe.batch_size} --data.neg_nums={max(recipe.negatives, 1)}
        --data.query_max_len={recipe.max_len} --data.passage_max_len={recipe.max_len}
        --trainer.max_epochs=-1 --trainer.max_steps={steps} --trainer.precision=bf16-mixed
        --trainer.enable_progress_bar=false --trainer.enable_checkpointing=false
    """.split()


def run_trainer(settings: dict[str, Any]) -> None:
    """Train with SentenceTransformerTrainer, with what ``embedtune_flags`` gives the other."""
    recipe, seed = Recipe(**settings["recipe"]), settings["seed"]
    config = {"attention_probs_dropout_prob": 0.0}
    model = SentenceTransformer(settings["model"], device="cpu", config_kwargs=config)
    model.max_seq_length = recipe.max_len
    arguments = SentenceTransformerTrainingArguments(
        output_dir=settings["out"],
        seed=seed,
        per_device_train_batch_size=recipe.batch_size,
        max_steps=recipe.steps,
        learning_rate=recipe.lr,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates",
    )
    ranking = losses.MultipleNegativesRankingLoss(model, scale=1 / recipe.temperature)
    weights = [1 / len(WIDTHS)] * len(WIDTHS)  # their mean, as embedtune has it
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(_columns(settings["rows"], recipe, seed)),
        loss=losses.MatryoshkaLoss(model, ranking, list(WIDTHS), weights),
    ).train()
    model.save(f"{settings['out']}/model")


def _columns(path: str, recipe: Recipe, seed: int) -> dict[str, list[str]]:
    """Return a pair for each positive, with as many of the row's hard negatives."""
    draw, count = random.Random(seed), recipe.negatives
    examples = [
        (row["query"], positive, *draw.sample(row.get("neg", []), count))
        for row in read_lines(Path(path))
        for positive in row["pos"]
    ]
    names = ["query", "positive", *(f"negative_{i}" for i in range(count))]
    return dict(zip(names, map(list, zip(*examples, strict=True)), strict=True))


class Bench:
    """Where things are; runs jobs and keeps their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.data, self.work = args.model, Path(args.data), Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)

    def result(self, job: Job) -> list[float]:
        """Return nDCG@10 at each of WIDTHS, from the result that is there or by running the job."""
        path = self.work / f"{job.file}.json"
        if not path.exists():
            started = time.perf_counter()
            folder = self.model if job.side == "base" else self._train(job)
            found = {**job._asdict(), "recipe": job.recipe._asdict()}
            found["train_s"] = time.perf_counter() - started
            found["ndcg@10"] = self._evaluate(job, str(folder))
            found["versions"] = {name: version(name) for name in VERSIONS}
            path.write_text(json.dumps(found, indent=1))
        return json.loads(path.read_text())["ndcg@10"]

    def _evaluate(self, job: Job, folder: str) -> list[float]:
        data = read_retrieval(self.data / job.name, "train" if job.split == "dev" else "test")
        data = held_out(data, job.seed) if job.split == "dev" else data
        model = SentenceTransformer(folder, device="cpu")
        texts = [*data.queries.values(), *data.corpus.values()]
        if job.side == "base" or job.side.endswith("-start"):
            stored = self._base_embeddings(job.name)
            return measure(model, data, torch.stack([stored[text] for text in texts]))
        return measure(model, data, encode(model, texts))

    def _base_embeddings(self, name: str) -> dict[str, Tensor]:
        """Return what the encoder makes of every text of a set before training."""
        path = self.work / f"{name}.{PRECISION}.pt"
        if not path.exists():
            sets = [read_retrieval(self.data / name, split) for split in ("train", "test")]
            found = [sets[0].corpus, *(data.queries for data in sets)]
            texts = list({text: 0 for texts in found for text in texts.values()})
            torch.save((texts, encode(SentenceTransformer(self.model, device="cpu"), texts)), path)
        return dict(zip(*torch.load(path), strict=True))

    def _train(self, job: Job) -> Path:
        """Run a training process and return the folder of the model."""
        out, rows = self.work / "runs" / job.file, self._rows(job)
        if job.side == "trainer":
            settings = {"model": self.model, "rows": str(rows), "out": str(out), "seed": job.seed}
            settings["recipe"] = job.recipe._asdict()
            command = [__file__, "--train", json.dumps(settings)]
        else:
            command = ["-m", "embedtune", "fit", f"--model.model_name_or_path={self.model}"]
            command += [f"--data.train_path={rows}", f"--trainer.default_root_dir={out}"]
            command += embedtune_flags(job)
        command, env = [sys.executable, *command], {"EMBEDTUNE_CACHE": str(self.work / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return out / "model"

    def _rows(self, job: Job) -> Path:
        """Write the rows to train on: those of the train queries that are not held out."""
        rows = read_lines(self.data / job.name / "train.jsonl.gz")
        if job.split == "dev":
            train = read_retrieval(self.data / job.name, "train")
            excluded = set(held_out(train, job.seed).queries.values())
            rows = [row for row in rows if row["query"] not in excluded]
        fields = ("query", "pos", "neg")[: 3 if job.recipe.negatives else 2]
        rows = [{field: row[field] for field in fields} for row in rows]
        path = self.work / f"{job.file}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path


# --- Tables ---------------------------------------------------------------------------------------


def table(bench: Bench, name: str, args: argparse.Namespace) -> str:
    """Return nDCG@10 of each side as a markdown table: mean and standard deviation over seeds."""
    changes = dict(setting.split("=") for setting in args.recipe)
    recipe = RECIPES[name]._replace(**{key: json.loads(text) for key, text in changes.items()})
    lines = [[name, *map(str, WIDTHS)], ["---"] * (1 + len(WIDTHS))]
    for side in args.sides:
        jobs = [Job(side, name, args.split, seed, recipe) for seed in args.seeds]
        found = [bench.result(job) for job in jobs]
        lines.append([side, *map(_cell, zip(*found, strict=True))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(values: tuple[float, ...]) -> str:
    mean = f"{statistics.mean(values):.3f}".removeprefix("0")
    spread = f" ± {statistics.stdev(values):.3f}".replace("0.", ".") if len(set(values)) > 1 else ""
    return mean + spread


def main() -> None:
    """Print the tables that the arguments ask for."""
    if sys.argv[1:2] == ["--train"]:  # a process of this script's own
        run_trainer(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    parser.add_argument("--data", required=True, help="folder of the sets")
    parser.add_argument("--work", default="runs/quality", help="folder for what is written")
    parser.add_argument("--sets", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["base", "embedtune"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--recipe", nargs="*", default=[], help="changes, such as lr=2e-5")
    args = parser.parse_args()
    bench = Bench(args)
    for name in args.sets:
        sys.stdout.write(f"{table(bench, name, args)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
