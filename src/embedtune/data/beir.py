"""Read a BEIR folder: a corpus, queries, and which documents answer which."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from embedtune.data.lines import describe_value, numbered_lines, read_lines
from embedtune.errors import InputError


class RetrievalSet(NamedTuple):
    """A retrieval test set.

    Attributes:
        queries: The queries that have a relevant document.
        corpus: The documents; a title goes before its text.
        relevant: For each query the numbers of its relevant documents, rows of ``corpus``, and
            their grades (1 and above).
        query_ids: The ``_id`` of each query.
        document_ids: The ``_id`` of each document.
        split: Name of the qrels file, such as ``test``.
    """

    queries: list[str]
    corpus: list[str]
    relevant: list[dict[int, int]]
    query_ids: list[str]
    document_ids: list[str]
    split: str


def is_beir(path: Path) -> bool:
    """Tell whether ``path`` is a BEIR folder or a qrels file inside one."""
    if path.suffix == ".tsv":
        return path.is_file() and (path.parent.parent / "corpus.jsonl").is_file()
    return (path / "corpus.jsonl").is_file()


def read_beir(path: Path, splits: Sequence[str] = ("test",)) -> RetrievalSet:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and a qrels file of a BEIR folder.

    Queries without a relevant document in the split are left out: BEIR keeps those of all splits
    in one file.

    Args:
        path: The folder, or one of its files ``qrels/<split>.tsv``.
        splits: In a folder the first of these is read that exists, else its only qrels file.

    Raises:
        InputError: A file is missing, cannot be read, or contradicts itself or another.
    """
    qrels = path if path.suffix == ".tsv" else _choose_qrels(path, splits)
    folder = qrels.parent.parent
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not file.is_file():
            raise InputError(f"{file}: expected a file of a BEIR test set, found none")
    corpus = _read_texts(folder / "corpus.jsonl")
    queries = _read_texts(folder / "queries.jsonl")
    rows = {name: row for row, name in enumerate(corpus)}
    relevant: dict[str, dict[int, int]] = {}
    judged: dict[tuple[str, str], tuple[int, int]] = {}
    for number, query, document, grade in _read_qrels(qrels):
        for known, name, file_name in ((queries, query, "queries"), (corpus, document, "corpus")):
            if name not in known:
                expected = f"an _id of {file_name}.jsonl"
                raise InputError(f"{qrels}:{number}: expected {expected}, found {name!r}")
        first, before = judged.setdefault((query, document), (number, grade))
        if grade != before:
            raise InputError(
                f"{qrels}:{number}: expected one score of {query!r} and {document!r}, "
                f"found {grade} after {before} in line {first}"
            )
        if grade > 0:
            relevant.setdefault(query, {})[rows[document]] = grade
    if not relevant:
        raise InputError(f"{qrels}: expected relevant documents (score 1 and above), found none")
    return RetrievalSet(
        queries=[queries[name] for name in relevant],
        corpus=list(corpus.values()),
        relevant=list(relevant.values()),
        query_ids=list(relevant),
        document_ids=list(corpus),
        split=qrels.stem,
    )


def _choose_qrels(folder: Path, splits: Sequence[str]) -> Path:
    asked = [folder / "qrels" / f"{split}.tsv" for split in splits]
    there = sorted((folder / "qrels").glob("*.tsv"))
    for path in (*asked, *(there if len(there) == 1 else ())):
        if path.is_file():
            return path
    if not there:
        raise InputError(f"{asked[0]}: expected a file of a BEIR test set, found none")
    found = ", ".join(path.name for path in there)
    expected = " or ".join(path.name for path in asked)
    raise InputError(f"{folder / 'qrels'}: expected {expected}, or a choice among {found}")


def _read_texts(path: Path) -> dict[str, str]:
    """Read the texts of a jsonl file by their ``_id``; a title goes before its text."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line in read_lines([path]):
        for field in ("_id", "text"):
            if not isinstance(line.fields.get(field), str):
                has = field in line.fields
                found = describe_value(line.fields[field]) if has else "no such field"
                raise line.error(f"{field}: expected a string, found {found}")
        name, title = line.fields["_id"], line.fields.get("title") or ""
        if not isinstance(title, str):
            raise line.error(f"title: expected a string, found {describe_value(title)}")
        if name in texts:
            raise line.error(f"_id: expected each once, found {name!r} of line {lines[name]} again")
        texts[name] = f"{title} {line.fields['text']}".strip()
        lines[name] = line.number
    return texts


def _read_qrels(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield line number, query id, document id and grade of every row; a header is optional."""
    for number, line in numbered_lines(path):
        columns = line.rstrip("\n").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 3:
            found = f"{len(columns)} column(s)"
            if len(line.split()) == 4:
                found = "4 columns, as in a qrels file of TREC (leave out its second)"
            expected = "query-id, corpus-id and score, separated by tabs"
            raise InputError(f"{path}:{number}: expected {expected}, found {found}")
        query, document, score = columns
        if re.fullmatch(r"[+-]?\d{1,9}", score):
            yield number, query, document, int(score)
        elif number > 1 or _is_number(score):  # else the header, whatever its words
            raise InputError(f"{path}:{number}: expected a whole score, found {score[:60]!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
