"""Read a BEIR folder: a corpus, queries, and which documents answer which."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from embedtune.data.lines import describe_value, numbered_lines, read_lines
from embedtune.errors import InputError

log = logging.getLogger("embedtune")


class Judgement(NamedTuple):
    """A row of a qrels file; a document of grade 1 and above is relevant to the query."""

    query: str
    document: str
    grade: int
    line: int


class RetrievalSet(NamedTuple):
    """A retrieval test set.

    Attributes:
        queries: The queries that are judged.
        corpus: The documents; a title goes before its text.
        relevant: For each query the numbers of its relevant documents, rows of ``corpus``, and
            their grades (1 and above). Relevant documents that ``corpus`` lacks have the numbers
            that follow: no search finds them, and all of them count.
        query_ids: The ``_id`` of each query.
        document_ids: The ``_id`` of each document, then of those that ``corpus`` lacks.
        split: Name of the qrels file, such as ``test``.
    """

    queries: list[str]
    corpus: list[str]
    relevant: list[dict[int, int]]
    query_ids: list[str]
    document_ids: list[str]
    split: str

    @property
    def own_documents(self) -> list[int]:
        """For each query the number of the document with its ``_id``, -1 where there is none.

        It is no result: where queries are documents too (ArguAna, Quora), each is its own best.
        """
        rows = dict(
            zip(self.document_ids[: len(self.corpus)], range(len(self.corpus)), strict=True)
        )
        return [rows.get(name, -1) for name in self.query_ids]

    @property
    def tie_order(self) -> list[int]:
        """The documents' numbers in the order of those with equal scores: as trec_eval has it.

        >>> RetrievalSet([], ["a", "b", "c"], [], [], ["d1", "d2", "d10"], "test").tie_order
        [1, 2, 0]
        """
        names = self.document_ids
        return sorted(range(len(self.corpus)), key=lambda row: names[row], reverse=True)


def is_beir(path: Path) -> bool:
    """Tell whether ``path`` is a BEIR folder or one of its qrels files."""
    if path.suffix == ".tsv":
        return path.is_file()
    return (path / "corpus.jsonl").is_file()


def read_beir(path: Path, splits: Sequence[str] = ("test",)) -> RetrievalSet:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and a qrels file of a BEIR folder.

    Queries that the split does not judge are left out: BEIR keeps those of all splits in one file.
    As BEIR and trec_eval have it, queries without a relevant document count, and so do relevant
    documents that the corpus lacks; judged queries that are missing do not.

    Args:
        path: The folder, or one of its files ``qrels/<split>.tsv``.
        splits: In a folder the first of these is read that exists, else its only qrels file.

    Raises:
        InputError: A file is missing, cannot be read, or contradicts itself; or no query has a
            relevant document in the corpus.
    """
    qrels = path if path.suffix == ".tsv" else _choose_qrels(path, splits)
    folder = qrels.parent.parent
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not file.is_file():
            raise InputError(f"{file}: expected a file of a BEIR test set, found none")
    corpus = _read_texts(folder / "corpus.jsonl", has_titles=True)
    queries = _read_texts(folder / "queries.jsonl")
    judged = _read_judgements(qrels, queries, corpus)
    _tell_missing(qrels, judged, queries, corpus)
    kept = [row for row in judged if row.query in queries]
    rows = {name: row for row, name in enumerate(corpus)}
    relevant: dict[str, dict[int, int]] = {row.query: {} for row in kept}
    for query, document, grade, _ in kept:
        if grade > 0:
            relevant[query][rows.setdefault(document, len(rows))] = grade
    data = RetrievalSet(
        queries=[queries[name] for name in relevant],
        corpus=list(corpus.values()),
        relevant=list(relevant.values()),
        query_ids=list(relevant),
        document_ids=list(rows),
        split=qrels.stem,
    )
    _tell_own(qrels, data)
    return data


def _read_judgements(
    path: Path, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> list[Judgement]:
    judged: dict[tuple[str, str], Judgement] = {}
    for row in _read_qrels(path, queries, corpus):
        before = judged.setdefault((row.query, row.document), row)
        if row.grade != before.grade:
            raise InputError(
                f"{path}:{row.line}: expected one score of {row.query!r} and {row.document!r}, "
                f"found {row.grade} after {before.grade} in line {before.line}"
            )
    if not any(row.grade > 0 for row in judged.values()):
        raise InputError(f"{path}: expected relevant documents (score 1 and above), found none")
    return list(judged.values())


def _tell_missing(
    qrels: Path, judged: list[Judgement], queries: Mapping[str, str], corpus: Mapping[str, str]
) -> None:
    """Count what is judged and not there; refuse judgements of another corpus or other queries."""
    relevant = [row for row in judged if row.grade > 0]
    if not any(row.query in queries and row.document in corpus for row in relevant):
        query, document, _, line = relevant[0]
        raise InputError(
            f"{qrels}:{line}: expected _ids of queries.jsonl and corpus.jsonl, here or in another "
            f"relevant row, found {query!r} and {document!r}"
        )
    lost = list(dict.fromkeys(row.query for row in judged if row.query not in queries))
    dangling = [row for row in judged if row.query in queries and row.document not in corpus]
    told = []
    if dangling:
        missed = sum(row.grade > 0 for row in dangling)
        told.append(
            f"{len(dangling):,} of {len(judged):,} judgements are of documents that corpus.jsonl "
            f"lacks (such as {dangling[0].document!r}), {missed:,} of them relevant, which count "
            "as not found"
        )
    if lost:
        asked = len({row.query for row in judged})
        told.append(
            f"{len(lost):,} of {asked:,} judged queries are not in queries.jsonl (such as "
            f"{lost[0]!r}) and are left out"
        )
    if told:
        log.info("%s: %s", qrels, "; ".join(told))


def _tell_own(qrels: Path, data: RetrievalSet) -> None:
    """Count the queries that are documents too."""
    own = data.own_documents
    count = sum(row >= 0 for row in own)
    judged = sum(row in grades for row, grades in zip(own, data.relevant, strict=True))
    if count:
        log.info(
            "%s: %s of %s queries have the _id of a document, which is no result of theirs, as in "
            "BEIR%s",
            qrels,
            f"{count:,}",
            f"{len(own):,}",
            f"; {judged:,} of these documents are judged relevant and count as not found"
            if judged
            else "",
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


def _read_texts(path: Path, *, has_titles: bool = False) -> dict[str, str]:
    """Read the texts of a jsonl file by their ``_id``; a document's title goes before its text."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line in read_lines([path]):
        for field in ("_id", "text"):
            if not isinstance(line.fields.get(field), str):
                has = field in line.fields
                found = describe_value(line.fields[field]) if has else "no such field"
                raise line.error(f"{field}: expected a string, found {found}")
        name = line.fields["_id"]
        title = (line.fields.get("title") or "") if has_titles else ""
        if not isinstance(title, str):
            raise line.error(f"title: expected a string, found {describe_value(title)}")
        if name in texts:
            raise line.error(f"_id: expected each once, found {name!r} of line {lines[name]} again")
        texts[name] = f"{title} {line.fields['text']}".strip()
        lines[name] = line.number
    return texts


def _read_qrels(
    path: Path, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> Iterator[Judgement]:
    """Yield every row; a header, which judges nothing that is known, is optional."""
    for number, line in numbered_lines(path):
        columns = line.rstrip("\r\n").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 3:
            found = f"{len(columns)} column(s)"
            if len(line.split()) == 4:
                found = "4 columns, as in a qrels file of TREC (leave out its second)"
            expected = "query-id, corpus-id and score, separated by tabs"
            raise InputError(f"{path}:{number}: expected {expected}, found {found}")
        query, document, score = columns
        if re.fullmatch(r"[+-]?\d{1,9}(\.0*)?", score):
            yield Judgement(query, document, int(score.partition(".")[0]), number)
        elif number > 1 or _is_number(score) or (query in queries and document in corpus):
            raise InputError(f"{path}:{number}: expected a whole score, found {score[:60]!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
