"""Small test sets on disk, for the tests of several rooms."""

import json
import random
from pathlib import Path

VERBS = ["sees", "hears", "eats", "finds", "likes"]
WORDS = ["red", "green", "blue", "cat", "dog", "bird", "a", "the", "and", "big", "old", *VERBS]
HEADER = "query-id\tcorpus-id\tscore\n"
NOUNS = ["red", "blue", "green", "tall", "small", "house", "car", "tree", "river", "stone", "cloud"]
DOCUMENTS = [f"{a} {b} {a[::-1]}" for a in NOUNS for b in NOUNS if a != b]


def write_graded_beir(folder, corpus=None, queries=None, qrels=None):
    """Write a test set of random words; any file may be given as its text instead."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(150)]
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    documents[3]["title"] = "big dog"
    asked = [{"_id": f"q{i}", "text": texts[i][: 12 + i]} for i in range(12)]
    judged = [(f"q{i}", f"d{i + 50 * j}", j + 1) for i in range(10) for j in range(i % 3 + 1)]
    rows = "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in judged)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    defaults = {
        "corpus.jsonl": (corpus, "".join(json.dumps(row) + "\n" for row in documents)),
        "queries.jsonl": (queries, "".join(json.dumps(row) + "\n" for row in asked)),
        "qrels/test.tsv": (qrels, HEADER + rows),
    }
    for name, (given, default) in defaults.items():
        (folder / name).write_text(default if given is None else given, encoding="utf-8")
    return folder


def lines(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_plain_beir(folder: Path, split: str = "dev") -> str:
    """Write queries whose words are in one document each, of 110."""
    documents = [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(DOCUMENTS)]
    lines(folder / "corpus.jsonl", documents)
    texts = [f"{DOCUMENTS[4 * i].split()[1]} {DOCUMENTS[4 * i].split()[0]}" for i in range(27)]
    lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": t} for i, t in enumerate(texts)])
    (folder / "qrels").mkdir(exist_ok=True)
    qrels = "".join(f"q{i}\td{4 * i}\t1\n" for i in range(27))
    (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return str(folder)


def write_pairs_and_sts(count: int) -> None:
    """Write ``train.jsonl``, so many pairs, and ``sts.jsonl``, scored pairs, here."""
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(count)]
    lines(Path("train.jsonl"), rows)
    texts = [f"{'abcdefgh'[i % 8]} {i * 7 % 5} {'xyz'[i % 3]}" for i in range(24)]
    scored = [(text, texts[(5 * i) % 24], i * 7 % 11) for i, text in enumerate(texts)]
    lines(Path("sts.jsonl"), [{"query": a, "pos": [b], "scores": [s]} for a, b, s in scored])
