"""Hold jsonl rows in a memory-mapped Arrow table and serve them as training examples."""

import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.utils.data

from embedtune.errors import InputError
from embedtune.records import Example, Format, Record, RecordReader
from embedtune.sampler import Key
from embedtune.teacher_store import TeacherStore

log = logging.getLogger("embedtune")

TokenSource = Callable[[int, Mapping[str, Any], Example], Mapping[tuple[str, str], np.ndarray]]
"""Finds ``Example.tokens`` by the number and the fields of the example's row."""

ROWS_PER_WRITE = 5_000
CACHE_VERSION = 1  # raised whenever the table's columns or the rules of records.py change
SCHEMA = pa.schema(
    {
        "query": pa.string(),
        "prompt": pa.string(),
        "positives": pa.list_(pa.string()),
        "negatives": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
    }
)


def resolve_paths(spec: str | Sequence[str], key: str) -> list[Path]:
    """Expand a path, a glob or a list of these into files, globs in sorted order.

    Args:
        spec: What the user gave.
        key: The YAML key it was given under, for messages.

    Raises:
        InputError: Nothing is there.
    """
    paths: list[Path] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{key}: expected a jsonl file or a glob, found nothing at {pattern}")
        for path in map(Path, found):
            if path.is_dir():
                expected = "a jsonl file"
                if key in ("data.val_path", "data.test_path"):
                    expected += " or a BEIR folder"
                raise InputError(f"{key}: expected {expected}, found the folder {path}")
            paths.append(path)
    return paths


def cache_folder() -> Path:
    """Return where Arrow tables are kept: ``$EMBEDTUNE_CACHE``, or beside those of ``datasets``."""
    default = Path(datasets.config.HF_DATASETS_CACHE) / "embedtune"
    return Path(os.environ.get("EMBEDTUNE_CACHE", default))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield where to write what becomes ``path`` once the block has ended well.

    Written beside and renamed, so that a killed or a second process never leaves half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        if not path.exists():  # another node may have mapped what it has written meanwhile
            part.replace(path)


class Rows:
    """The validated rows of one data set, in a memory-mapped Arrow table.

    The table is cached under a digest of the files' bytes, so a second start opens it at once
    and an edited file is read anew.

    Attributes:
        table: Columns query, prompt, positives, negatives, scores.
        digest: Digest of the files and of how they were read.
        format: What the rows hold.
        ignored_fields: Names of fields in the files that embedtune does not read.
        prompt: The query prompt that all rows share, if they do.
        queries_digest: Digest of all queries in order, to match a teacher store to its texts.
    """

    def __init__(self, paths: Sequence[Path], declared: Format | None = None) -> None:
        """Open the cached table of ``paths``, reading the files first where there is none.

        Raises:
            InputError: A row does not fit its format.
        """
        self.paths = list(paths)
        digest = hashlib.blake2b(f"{CACHE_VERSION} {declared}".encode(), digest_size=16)
        for path in self.paths:
            digest.update("".join(path.suffixes).encode())  # a .txt file is read in another way
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        self.digest = digest.hexdigest()
        stem = cache_folder() / self.digest
        arrow, facts = stem.with_suffix(".arrow"), stem.with_suffix(".json")
        if not (arrow.exists() and facts.exists()):
            _write_table(RecordReader(self.paths, declared), arrow, facts)
        self.table = datasets.Dataset.from_file(str(arrow))
        known = json.loads(facts.read_text(encoding="utf-8"))
        self.format = Format(known["format"])
        self.ignored_fields: list[str] = known["ignored_fields"]
        self.prompt: str | None = known["prompts"][0] if len(known["prompts"]) == 1 else None
        self.queries_digest: str = known["queries_digest"]
        self._rows_per_file: list[int] = known["rows_per_file"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def place(self, row: int) -> str:
        """Return ``file:line`` of a row (counted from 0)."""
        for path, count in zip(self.paths, self._rows_per_file, strict=True):
            if row < count:
                return f"{path}:{row + 1}"
            row -= count
        raise IndexError(row)

    @cached_property
    def list_lengths(self) -> np.ndarray:
        """Number of positives of each row, int64 ``[rows]``."""
        return self._lengths("positives")

    @property
    def texts_per_row(self) -> np.ndarray:
        """Number of texts that each row holds, int64 ``[rows]``."""
        return 1 + self.list_lengths + self._lengths("negatives")

    def _lengths(self, column: str) -> np.ndarray:
        lengths = pc.list_value_length(self.table.data.column(column))
        return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _write_table(reader: RecordReader, arrow: Path, facts: Path) -> None:
    log.info("reading %s", ", ".join(map(str, reader.paths)))
    queries = hashlib.blake2b(digest_size=16)
    with (
        written_whole(arrow) as part,
        pa.OSFile(str(part), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        for records in _batched(reader, ROWS_PER_WRITE):
            for record in records:
                queries.update(query_digest(record.query))
            columns = dict(zip(Record._fields, zip(*records, strict=True), strict=True))
            arrays = [pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    known = {
        "format": reader.format,
        "ignored_fields": sorted(reader.ignored_fields),
        "prompts": reader.prompts,
        "queries_digest": queries.hexdigest(),
        "rows_per_file": list(reader.rows_per_file),
    }
    with written_whole(facts) as part:
        part.write_text(json.dumps(known), encoding="utf-8")


def query_digest(query: str) -> bytes:
    """Return the 8-byte digest of a query that a data set's ``queries_digest`` is made of."""
    return hashlib.blake2b(query.encode(), digest_size=8).digest()


def _batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, size)):
        yield batch


def open_teacher(
    rows: Rows, paths: str | Sequence[str] | None, width: int | None, key: str
) -> TeacherStore | None:
    """Open the teacher's embeddings of ``rows``, None for rows that have no teacher.

    Args:
        rows: The rows; row i of the store is for row i of these.
        paths: Memory maps; several are concatenated along the width.
        width: Of all of them together, None takes it from the files' sizes.
        key: The YAML key that ``paths`` were given under, for messages.

    Raises:
        InputError: Distill rows have no teacher, others have one, or the store is not of the rows.
    """
    is_distill = rows.format == Format.DISTILL
    if is_distill and paths is None:
        raise InputError(
            f"{key}: expected the teacher's memory map for distill data, found nothing"
        )
    if paths is not None and not is_distill:
        raise InputError(
            f"{key}: expected distill data (rows of 'query' alone), found {rows.format} rows"
        )
    if paths is None:
        return None
    stores = [paths] if isinstance(paths, str) else list(paths)
    return TeacherStore(stores, len(rows), width, rows.queries_digest)


class ExampleDataset(torch.utils.data.Dataset[Example]):
    """Random access to examples by epoch and index.

    A row with several positives is one example per positive (pair, triplet), else one example.
    The epoch is part of the key because negatives are drawn anew in each: loader workers hold
    no state, and any example of any epoch can be had at any time.
    """

    def __init__(
        self,
        rows: Rows,
        neg_nums: int = 15,
        seed: int = 666,
        teacher: TeacherStore | None = None,
        tokens: TokenSource | None = None,
    ) -> None:
        """Index the examples of ``rows``."""
        self.rows, self.neg_nums, self.seed, self.teacher = rows, neg_nums, seed, teacher
        self.tokens = tokens
        self._starts: np.ndarray | None = None
        if rows.format in (Format.PAIR, Format.TRIPLET):
            self._starts = np.concatenate([[0], np.cumsum(rows.list_lengths)])

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return len(self.rows) if self._starts is None else int(self._starts[-1])

    @property
    def num_texts(self) -> int:
        """Texts of all examples of an epoch, equal ones counted as often as they occur."""
        if self._starts is None:
            return int(self.rows.texts_per_row.sum())
        negatives = self.neg_nums if self.rows.format == Format.TRIPLET else 0
        return len(self) * (2 + negatives)

    def with_tokens(self, tokens: TokenSource) -> "ExampleDataset":
        """Return the same examples, with the token ids of their texts."""
        return ExampleDataset(self.rows, self.neg_nums, self.seed, self.teacher, tokens)

    def __getitem__(self, key: Key) -> Example:
        """Return one example."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """Return several examples with one read of the table (the loader's fast path)."""
        indices = np.asarray([key.example for key in keys])
        rows = indices
        if self._starts is not None:
            rows = np.searchsorted(self._starts, indices, side="right") - 1
        columns = self.rows.table[rows.tolist()]
        examples = []
        for i, (key, row) in enumerate(zip(keys, rows.tolist(), strict=True)):
            fields = {name: columns[name][i] for name in columns}
            example = self._example(key, row, fields)
            tokens = None if self.tokens is None else self.tokens(row, fields, example)
            examples.append(example._replace(spare=key.spare, tokens=tokens))
        return examples

    def _example(self, key: Key, row: int, fields: dict[str, Any]) -> Example:
        epoch, index = key.epoch, key.example
        query, prompt = fields["query"], fields["prompt"]
        if self.rows.format == Format.DISTILL:
            teacher = None if self.teacher is None else self.teacher[row]
            return Example(index, query, prompt, teacher=teacher)
        positives = fields["positives"]
        if self._starts is None:
            return Example(index, query, prompt, positives, scores=fields["scores"])
        negatives: list[str] = []
        if self.rows.format == Format.TRIPLET:
            generator = np.random.Generator(
                np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=index)
            )
            negatives = draw_negatives(fields["negatives"], positives, self.neg_nums, generator)
        own = positives[index - int(self._starts[row])]
        return Example(index, query, prompt, [own], negatives, known_positives=positives)


def draw_negatives(
    negatives: Sequence[str], positives: Sequence[str], count: int, generator: np.random.Generator
) -> list[str]:
    """Draw hard negatives of one query, none of them equal to a positive.

    Distinct texts are drawn without repetition while there are enough; with fewer than ``count``,
    all are taken as often as it goes and the remainder is drawn.

    >>> draw_negatives(["a", "b", "a", "p"], ["p"], 2, np.random.default_rng(0)) in (
    ...     ["a", "b"],
    ...     ["b", "a"],
    ... )
    True
    """
    candidates = [text for text in dict.fromkeys(negatives) if text not in positives]
    order: list[int] = []
    while len(order) < count:
        order.extend(generator.permutation(len(candidates)).tolist())
    return [candidates[i] for i in order[:count]]
