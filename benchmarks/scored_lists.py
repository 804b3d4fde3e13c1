"""Fine-tune on lists of scores of three scales, and on the same rows as triplets.

    python benchmarks/scored_lists.py --model MODEL --data FOLDER/banking77 [--spreads 0.1 0.15]

prints a markdown table of nDCG@10 and its change from the base model. FOLDER/banking77 is a BEIR
folder with train.jsonl.gz ({"query", "pos", "neg"}). The scores are drawn as a good reranker would
give them: a logit of 3 for a relevant text and of -3 for another, with noise, so that about two in
a hundred are wrong; probabilities are its logistic function, grades 3 and 0 for its sign.
``--split dev`` trains on two thirds of the rows and searches with the queries of the others: choose
there. What was trained is kept under --work, so that a run can be stopped and continued.
"""

import argparse
import gzip
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedtune.data.beir import read_beir
from embedtune.data.rows import Rows
from embedtune.evaluation.compare import Result, evaluate_models
from embedtune.evaluation.intervals import outcome
from embedtune.export.folder import is_verified

TEMPERATURE = 0.02
POSITIVES, NEGATIVES, BATCH, MAX_LEN = 2, 6, 16, 64
DEV_SHARE = 1 / 3
NOISE = 1.5
"""Standard deviation of a logit."""


def grade(logit: float) -> float:
    """Return what a person would give."""
    return 3.0 if logit > 0 else 0.0


SCALES = {"probabilities": lambda x: 1 / (1 + math.exp(-x)), "logits": float, "grades": grade}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows to train on."""
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_training(rows: list[dict[str, Any]], seed: int, folder: Path) -> dict[str, Path]:
    """Write the same lists as triplets, and with scores of each scale; return the files."""
    draw = random.Random(seed)
    written: dict[str, list[dict[str, Any]]] = {name: [] for name in ("triplets", *SCALES)}
    for row in rows:
        pos = draw.sample(row["pos"], min(POSITIVES, len(row["pos"])))
        neg = draw.sample(row["neg"], min(NEGATIVES, len(row["neg"])))
        means = [3.0] * len(pos) + [-3.0] * len(neg)
        logits = [draw.gauss(mean, NOISE) for mean in means]
        written["triplets"].append({"query": row["query"], "pos": pos, "neg": neg})
        for name, scale in SCALES.items():
            scored = {"pos": pos + neg, "scores": [scale(logit) for logit in logits]}
            written[name].append({"query": row["query"], **scored})
    return {name: write_lines(folder / f"{name}.jsonl", kept) for name, kept in written.items()}


def write_dev(data: Path, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write a BEIR folder that is searched with the queries of rows that are not trained on."""
    corpus = (data / "corpus.jsonl").read_text(encoding="utf-8")
    ids = {line["text"]: line["_id"] for line in map(json.loads, corpus.splitlines())}
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)]
    write_lines(folder / "queries.jsonl", queries)
    (folder / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (folder / "qrels").mkdir(exist_ok=True)
    judged = [f"q{i}\t{ids[text]}\t1\n" for i, row in enumerate(rows) for text in row["pos"]]
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(head + "".join(judged), encoding="utf-8")
    return folder


def recipes(files: dict[str, Path], spreads: list[float]) -> Iterator[tuple[str, Path, list[str]]]:
    """Yield what is trained: a name, its rows, and its flags."""
    yield "triplets", files["triplets"], ["--data.neg_nums", str(NEGATIVES)]
    for name in SCALES:
        yield f"{name}, derived", files[name], []
        one = {"1.0": 1.0} | {
            f"for {spread}": TEMPERATURE * Rows([files[name]]).score_spread / spread
            for spread in spreads
        }
        for label, value in one.items():
            kind = ["--model.loss", "ListwiseKL", "--model.loss.teacher_temperature", str(value)]
            yield f"{name}, {label}", files[name], kind


def train(model: str, rows: Path, flags: list[str], seed: int, folder: Path) -> str:
    """Train by the command line in a process of its own, and return the exported folder."""
    if not is_verified(folder / "model"):
        command = [
            *(sys.executable, "-m", "embedtune", "fit", "--model.model_name_or_path", model),
            *("--data.train_path", str(rows), "--data.batch_size", str(BATCH)),
            *("--data.query_max_len", str(MAX_LEN), "--data.passage_max_len", str(MAX_LEN)),
            *("--trainer.max_epochs", "1", "--save_on_epoch_end", "false"),
            *("--trainer.default_root_dir", str(folder), "--seed_everything", str(seed), *flags),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(folder / "model")


def table(names: dict[str, str], results: list[Result]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| rows, teacher temperature | nDCG@10 | change from the base model |"
    yield "|---|---|---|"
    base, *others = results
    yield f"| base | {base.metrics['ndcg@10']:.3f} | |"
    for result in others:
        value, interval = result.metrics["ndcg@10"], result.intervals.get("ndcg@10")
        change, said = value - base.metrics["ndcg@10"], outcome(interval)
        ends = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
        yield f"| {names[result.model]} | {value:.3f} | {change:+.3f}{ends}, {said} |"


def main() -> None:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("scored-lists"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spreads", type=float, nargs="*", default=[])
    given = parser.parse_args()
    work = given.work / f"{given.data.name}-{given.split}-{given.rows}-{given.seed}"
    rows = read_rows(given.data)
    random.Random(given.seed).shuffle(rows)
    dev = round(len(rows) * DEV_SHARE) if given.split == "dev" else 0
    testset = given.data if not dev else write_dev(given.data, rows[:dev], work / "dev")
    files = write_training(rows[dev:][: given.rows], given.seed, work)
    names: dict[str, str] = {}
    for name, path, flags in recipes(files, given.spreads):
        folder = work / name.replace(", ", "-").replace(" ", "-")
        names[train(given.model, path, flags, given.seed, folder)] = name
    results = evaluate_models([given.model, *names], {"set": read_beir(testset, ("test",))})
    sys.stdout.write("\n".join(table(names, results)) + "\n")


if __name__ == "__main__":
    main()
