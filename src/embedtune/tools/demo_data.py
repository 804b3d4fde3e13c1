"""Harvest training and test pairs from docstrings.

The query of a pair is the summary of a docstring (its first paragraph), the document is the rest.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from embedtune.errors import InputError
from embedtune.tools.docstrings import Docstring, docstrings
from embedtune.whole_files import refuse_in_the_way, write_text

MIN_QUERY_WORDS, MAX_QUERY_CHARACTERS = 4, 300
MIN_DOCUMENT_CHARACTERS = 120  # less rarely tells what a summary is about
MAX_DOCUMENT_CHARACTERS = 400  # about 90 tokens
TEST_PAIRS, DEV_PAIRS = 250, 200
CORPUS_DOCUMENTS = 1000  # two cores encode them in half a minute
DEV_DOCUMENTS = 500  # encoded before the first step and after each epoch
NOTE, NOTED = "README.md", "Pairs from docstrings, as `embedtune demo-data` writes them anew.\n"
MAX_HELD_OUT_MODULE = 40  # a larger module always trains, so that none dominates a small split


class Pair(NamedTuple):
    """A summary and the documentation that follows it."""

    module: str
    name: str
    query: str
    document: str


class DemoCounts(NamedTuple):
    """How many pairs each split got, and how many documents the test set searches."""

    train: int
    dev: int
    test: int
    corpus: int


def harvest(out: Path) -> DemoCounts:
    """Write ``OUT/train.jsonl``, ``OUT/dev.jsonl`` and the BEIR folders ``OUT/dev``, ``OUT/test``.

    A corpus holds the documents of its own queries among others, of training for ``dev`` and of
    all splits for ``test``.

    Raises:
        InputError: ``out`` cannot be made, or holds others' files of these names.
    """
    out = Path(out)
    _refuse_others(out)
    folders = [out / name / "qrels" for name in ("dev", "test")]
    for folder in folders:
        refuse_in_the_way(folder, f"{out}: expected a folder to write to")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_text(out / NOTE, NOTED)
    splits = split_pairs(list(collect_pairs(docstrings())))
    for name in ("train", "dev"):
        rows = ({"query": pair.query, "pos": [pair.document]} for pair in splits[name])
        _write_jsonl(out / f"{name}.jsonl", rows)
    _write_beir(out, "dev", splits["dev"], splits["train"], DEV_DOCUMENTS)
    others = splits["train"] + splits["dev"]
    corpus = _write_beir(out, "test", splits["test"], others, CORPUS_DOCUMENTS)
    train, dev, test = (len(splits[name]) for name in ("train", "dev", "test"))
    return DemoCounts(train=train, dev=dev, test=test, corpus=corpus)


def _refuse_others(out: Path) -> None:
    """Refuse to write over files that are no earlier demo data, which a note tells."""
    note = out / NOTE
    if note.is_file() and note.read_bytes() == NOTED.encode():
        return
    for name in ("train.jsonl", "dev.jsonl", "dev", "test", NOTE):
        if (out / name).exists():
            raise InputError(f"{out}: expected a folder without other data, found {out / name}")


def _write_beir(
    out: Path, split: str, pairs: Sequence[Pair], others: Sequence[Pair], documents: int
) -> int:
    """Write the BEIR folder of a split, and return how many documents it has."""
    folder, others = out / split, sorted(others, key=lambda pair: _hash(pair.name))
    corpus = sorted([*pairs, *others[: documents - len(pairs)]])
    _write_jsonl(
        folder / "corpus.jsonl",
        ({"_id": pair.name, "title": "", "text": pair.document} for pair in corpus),
    )
    queries = [(f"query-{number:03}", pair) for number, pair in enumerate(pairs, start=1)]
    _write_jsonl(
        folder / "queries.jsonl", ({"_id": name, "text": pair.query} for name, pair in queries)
    )
    qrels = "".join(f"{name}\t{pair.name}\t1\n" for name, pair in queries)
    write_text(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    return len(corpus)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


ROLE = re.compile(r":[\w:]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`")
SIGNATURE = re.compile(r"[\w.]+ ?\(.*\)(?: *->.*)?(?:\s*--)?", re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*\.\. +(?:version\w+|deprecated|index|_)\b.*\n?", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[a-z)`'\"]\.)\s+(?=[A-Z])")


def collect_pairs(found: Iterable[Docstring]) -> Iterator[Pair]:
    """Yield a pair for every docstring that has a summary and more; each text comes once."""
    names: set[str] = set()
    queries: set[str] = set()
    documents: set[str] = set()
    for module, name, text in found:
        if " at 0x" in text:
            continue
        query, document = split_docstring(text)
        new = name not in names and query not in queries and document not in documents
        if new and _is_useful(query, document):
            names.add(name)
            queries.add(query)
            documents.add(document)
            yield Pair(module, name, query, document)


def split_docstring(text: str) -> tuple[str, str]:
    r"""Split a docstring into its summary and the rest, both cleaned; either may be empty.

    >>> split_docstring("add(a, b) -> c\n\nAdd :attr:`a`\nto b.\n\nBoth are broadcast.")
    ('Add a to b.', 'Both are broadcast.')
    """
    text = DIRECTIVE.sub("", ROLE.sub(r"\1", text.expandtabs()))
    paragraphs = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    while paragraphs and SIGNATURE.fullmatch(paragraphs[0].strip()):
        del paragraphs[0]
    if not paragraphs:
        return "", ""
    query, document = " ".join(paragraphs[0].split()), "\n\n".join(paragraphs[1:])
    if len(query) > MAX_QUERY_CHARACTERS:
        query, *others = SENTENCE_END.split(query, maxsplit=1)
        document = "\n\n".join([*others, document])
    lines = (" ".join(line.split()) for line in document.splitlines())
    document = "\n".join(line for line in lines if line)
    if len(document) > MAX_DOCUMENT_CHARACTERS:
        document = document[:MAX_DOCUMENT_CHARACTERS].rsplit(maxsplit=1)[0]
    return query, document


def _is_useful(query: str, document: str) -> bool:
    words = re.findall(r"\S*[^\W\d_]{2}\S*", query)
    return (
        len(words) >= MIN_QUERY_WORDS
        and len(query) <= MAX_QUERY_CHARACTERS
        and len(document) >= MIN_DOCUMENT_CHARACTERS
        and not query.startswith((">>>", "..", "Parameters", "Args", "Usage"))
        # A repeated summary would turn the search into string matching.
        and query.rstrip(".").lower() not in " ".join(document.split()).lower()
    )


def _hash(name: str) -> bytes:
    """Return a key that sorts names in an order that is arbitrary and always the same."""
    return hashlib.sha256(name.encode()).digest()


def split_pairs(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Give each module's pairs to one split, in the order of a hash of the module's name.

    The first modules fill ``test``, the next ``dev``, and all others go to ``train``.
    """
    modules: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        modules[pair.module].append(pair)
    splits: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    for module in sorted(modules, key=_hash):
        held_out = len(modules[module]) <= MAX_HELD_OUT_MODULE
        if held_out and len(splits["test"]) < TEST_PAIRS:
            splits["test"] += modules[module]
        elif held_out and len(splits["dev"]) < DEV_PAIRS:
            splits["dev"] += modules[module]
        else:
            splits["train"] += modules[module]
    return {name: sorted(pairs) for name, pairs in splits.items()}
