"""What the study of recipes trains on and measures: public sets, cut to a CPU's size.

A set is a BEIR folder with train.jsonl or train.jsonl.gz ({"query", "pos", "neg"}), or a file of
scored pairs. Queries of ``train.tsv`` are split in two: with ``dev`` a third is searched with and
not trained on, with ``test`` all are trained on and those of ``test.tsv`` are searched with.
"""

import gzip
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from embedtune.data.beir import RetrievalSet, read_beir
from embedtune.data.scored_pairs import ScoredPairs, read_scored

FORMATS = ("pair", "triplet", "list", "sts", "distill")
SETS = ("banking77", "scifact", "cranfield", "t2rank100", "demo")
SCALES: dict[str, Callable[[float], float]] = {
    "probabilities": lambda x: 1 / (1 + math.exp(-x)),
    "logits": float,
    "cosines": lambda x: min(1.0, 0.7 + 0.05 * x),
    "grades": lambda x: float(min(3, max(0, round(1.5 + x / 2)))),
}
"""Of a reranker's logits; cosines lie about .85 and .55, grades are whole numbers from 0 to 3."""
NOISE = 1.5
"""Standard deviation of such a logit about 3 or -3: two in a hundred are on the wrong side."""
WORDS, CHARACTERS = 30, 60
"""Of a text, that of a language without spaces by characters: a core trains on some 50,000 tokens
in a minute."""
EXAMPLES = {"pair": 640, "triplet": 192, "list": 192, "sts": 640, "distill": 1600}
LONG = 0.4
"""Share of these examples for sets of longer texts than banking77's."""
POSITIVES, NEGATIVES = 1, 4
"""Of a list."""
DOCUMENTS, QUERIES = 500, 250
"""Of a test set."""
DEV_SHARE = 1 / 3

Row = dict[str, Any]


class Task(NamedTuple):
    """One format of one set.

    Attributes:
        name: ``SET.FORMAT``, of lists with their scale behind.
        rows: jsonl to train on.
        testset: A BEIR folder or a file of scored pairs.
    """

    name: str
    rows: Path
    testset: Path

    @property
    def format(self) -> str:
        """One of FORMATS."""
        return self.name.split(".")[1]

    def read_testset(self) -> RetrievalSet | ScoredPairs:
        """Read what is measured."""
        if self.testset.is_dir():
            return read_beir(self.testset, ("test",))
        return read_scored(self.testset)


def names() -> list[str]:
    """Return the names of all tasks."""
    found = [f"{name}.pair" for name in SETS]
    found += [f"{name}.triplet" for name in SETS if name != "demo"]
    found += [f"{name}.list.{s}" for name in ("banking77", "scifact", "t2rank100") for s in SCALES]
    return [*found, "stsb_en.sts", "stsb_zh.sts", "demo.distill", "banking77.distill"]


def make(name: str, data: Path, split: str, seed: int, folder: Path) -> Task:
    """Write a task's files below ``folder``, unless they are there.

    Args:
        name: One of :func:`names`.
        data: Folder of the sets.
        split: ``dev`` or ``test``.
        seed: Draws the examples; every seed is measured alike.
        folder: Where to write.
    """
    place = folder / f"{name}.{split}.{seed}"
    of_set, kind, *scale = name.split(".")
    if kind == "sts":
        other = data / "sts" / f"{of_set}_{split}.jsonl"
        task = Task(name, place / "train.jsonl", other)
        rows = read_lines(data / "sts" / f"{of_set}_train.jsonl")
        draw_rows = random.Random(seed).sample(rows, EXAMPLES["sts"])
    else:
        task = Task(name, place / "train.jsonl", place / "testset")
        draw_rows, testset = _retrieval(data / of_set, split)
        draw_rows = list(_examples(draw_rows, kind, scale, of_set, seed))
        write_testset(testset, task.testset)
    write_lines(task.rows, draw_rows)
    return task


def cut(text: str) -> str:
    """Return the beginning of a text."""
    words = text.split()
    few = len(words) * 12 < len(text)  # written without spaces
    return text[:CHARACTERS] if few else " ".join(words[:WORDS])


def read_lines(path: Path) -> list[Row]:
    """Read a jsonl file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


class Searched(NamedTuple):
    """Texts by id, and the ids of the relevant documents of each query."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, list[str]]


def write_testset(found: Searched, folder: Path) -> None:
    """Write a BEIR folder."""
    for name, texts in (("queries", found.queries), ("corpus", found.corpus)):
        write_lines(folder / f"{name}.jsonl", ({"_id": i, "text": t} for i, t in texts.items()))
    (folder / "qrels").mkdir(exist_ok=True)
    judged = [f"{q}\t{d}\t1\n" for q, relevant in found.relevant.items() for d in relevant]
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(head + "".join(judged), encoding="utf-8")


def _retrieval(folder: Path, split: str) -> tuple[list[Row], Searched]:
    """Return the rows to train on, and what is searched; all texts are cut."""
    found = [folder / name for name in ("train.jsonl.gz", "train.jsonl")]
    rows = read_lines(next(path for path in found if path.exists()))
    rows = [{k: cut(v) if k == "query" else list(map(cut, v)) for k, v in r.items()} for r in rows]
    random.Random(0).shuffle(rows)
    if (folder / split).is_dir():  # the demo, which is split as it is made
        return rows, _searched(folder / split, split, None)
    if split == "test":
        return rows, _searched(folder, "test", None)
    held_out = {row["query"] for row in rows[: round(len(rows) * DEV_SHARE)]}
    kept = [row for row in rows if row["query"] not in held_out]
    return kept, _searched(folder, "train", held_out)


def _searched(folder: Path, judged: str, among: set[str] | None) -> Searched:
    """Draw queries, of some texts alone where they are given, and documents of a BEIR folder."""
    queries = {line["_id"]: cut(line["text"]) for line in read_lines(folder / "queries.jsonl")}
    corpus = {
        line["_id"]: cut(f"{line.get('title') or ''} {line['text']}".strip())
        for line in read_lines(folder / "corpus.jsonl")
    }
    relevant: dict[str, list[str]] = {}
    for line in (folder / "qrels" / f"{judged}.tsv").read_text("utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        if float(grade) > 0 and (among is None or queries[query] in among):
            relevant.setdefault(query, []).append(document)
    draw = random.Random(0)
    chosen = draw.sample(sorted(relevant), min(QUERIES, len(relevant)))
    kept = {document for query in chosen for document in relevant[query]}
    others = sorted(corpus.keys() - kept)
    kept |= set(draw.sample(others, min(len(others), max(0, DOCUMENTS - len(kept)))))
    texts = {name: text for name, text in corpus.items() if name in kept}
    found = {query: relevant[query] for query in chosen}
    return Searched({query: queries[query] for query in chosen}, texts, found)


def _examples(
    rows: list[Row], kind: str, scale: list[str], of_set: str, seed: int
) -> Iterable[Row]:
    """Yield as many rows of a format as the study trains on."""
    draw = random.Random(seed)
    draw.shuffle(rows)
    share = 1 if of_set in ("banking77", "t2rank100") else LONG
    count = round(EXAMPLES[kind] * share)
    if kind == "pair":
        pairs = [{"query": row["query"], "pos": [text]} for row in rows for text in row["pos"][:10]]
        yield from draw.sample(pairs, min(count, len(pairs)))
    elif kind == "distill":
        texts = {text for row in rows for text in (row["query"], *row["pos"])}
        yield from ({"query": text} for text in draw.sample(sorted(texts), min(count, len(texts))))
    for row in rows[:count] if kind in ("triplet", "list") else ():
        pos = draw.sample(row["pos"], min(POSITIVES, len(row["pos"])))
        neg = draw.sample(row["neg"], min(NEGATIVES, len(row["neg"])))
        means = [3.0] * len(pos) + [-3.0] * len(neg)
        logits = [draw.gauss(mean, NOISE) for mean in means]
        if kind == "triplet":
            yield {"query": row["query"], "pos": pos, "neg": neg}
        else:
            scores = [SCALES[scale[0]](logit) for logit in logits]
            yield {"query": row["query"], "pos": pos + neg, "scores": scores}
