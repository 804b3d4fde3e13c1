"""Hold jsonl rows in a memory-mapped Arrow table."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedtune.data.cache import Facts, cache_folder, open_table
from embedtune.data.lines import suffixes_of, unreadable
from embedtune.data.records import Format, Record, RecordReader
from embedtune.digests import Hasher, digest_of
from embedtune.errors import InputError

log = logging.getLogger("embedtune")

ROWS_PER_WRITE, CHARACTERS_PER_WRITE = 5_000, 2**24
"""What is held in memory before it is written: as many rows, or fewer whose texts are as long."""
CACHE_VERSION = 7  # raised whenever the table's columns or the rules of reading change
SCHEMA = pa.schema(
    {
        "query": pa.string(),
        "prompt": pa.string(),
        "positives": pa.list_(pa.string()),
        "negatives": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
    }
)


class Rows:
    """The validated rows of one data set, in a memory-mapped Arrow table.

    The table is cached under a digest of the files' bytes, so a second start opens it at once
    and an edited file is read anew.

    Attributes:
        table: Columns query, prompt, positives, negatives, scores.
        digest: Digest of the files and their format, which checkpoints tell.
        table_digest: Digest of that and of how this version reads them, which the table lies under.
        format: What the rows hold.
        ignored_fields: Names of fields in the files that embedtune does not read.
        prompt: The query prompt that all rows share, if they do.
        has_prompts: Whether any row brings a query prompt.
        queries_digest: Digest of all queries in order, to match a teacher store to its texts.
    """

    def __init__(self, paths: Sequence[Path], declared: Format | None = None) -> None:
        """Open the cached table of ``paths``, reading the files first where there is none.

        Raises:
            InputError: A row does not fit its format, or a file cannot be read.
        """
        self.paths = list(paths)
        reading = _Reading(self.paths, declared)
        files = Hasher()
        for path in self.paths:
            files.update("".join([*suffixes_of(path), _file_digest(path)]).encode())
        self.table_digest = _digest(CACHE_VERSION, declared, files.hexdigest())
        path = cache_folder() / f"{self.table_digest}.arrow"
        self.table, known = open_table(path, SCHEMA, reading.batches, reading.facts)
        self.format = Format(known["format"])
        self.digest = _digest(self.format, files.hexdigest())
        self.ignored_fields: list[str] = known["ignored_fields"]
        self.prompt: str | None = known["prompts"][0] if len(known["prompts"]) == 1 else None
        self.has_prompts = any(known["prompts"])
        self.queries_digest: str = known["queries_digest"]
        self.rows_per_file: list[int] = known["rows_per_file"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def records(self) -> Iterator[Record]:
        """Yield the rows in their order."""
        columns = self.table[:]
        return map(Record._make, zip(*(columns[name] for name in Record._fields), strict=True))

    def place(self, row: int) -> str:
        """Return ``file:line`` of a row (counted from 0)."""
        for path, count in zip(self.paths, self.rows_per_file, strict=True):
            if row < count:
                return f"{path}:{row + 1}"
            row -= count
        raise IndexError(row)

    @property
    def longest_prompt(self) -> str | None:
        """The longest query prompt that a row brings, by its characters."""
        prompts = pc.unique(self.table.data.column("prompt")).drop_null().to_pylist()
        return max(prompts, key=len, default=None)

    @cached_property
    def list_lengths(self) -> np.ndarray:
        """Number of positives of each row, int64 ``[rows]``."""
        return self._lengths("positives")

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The lowest and the highest score, None without any."""
        found = pc.min_max(pc.list_flatten(self.table.data.column("scores"))).as_py()
        return None if found["min"] is None else (found["min"], found["max"])

    @property
    def score_spread(self) -> float:
        """Standard deviation of the scores within their lists, over all rows; 0 without any."""
        column = self.table.data.column("scores").combine_chunks()
        scores = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
        lengths = self._lengths("scores")
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return 0.0
        starts = np.cumsum(lengths) - lengths
        means = np.add.reduceat(scores, starts) / lengths
        return float(np.sqrt(np.mean((scores - np.repeat(means, lengths)) ** 2)))

    @property
    def texts_per_row(self) -> np.ndarray:
        """Number of texts that each row holds, int64 ``[rows]``."""
        return 1 + self.list_lengths + self._lengths("negatives")

    def _lengths(self, column: str) -> np.ndarray:
        lengths = pc.list_value_length(self.table.data.column(column))
        return np.asarray(lengths.to_numpy(), dtype=np.int64)


def _digest(*values: Any) -> str:
    return Hasher(" ".join(map(str, values)).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        raise unreadable(str(path), error) from None


def _written(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(str(path), error) from None
    return found.st_mtime_ns, found.st_size, found.st_ino


class _Reading:
    """Reads the files of a table, and tells of them afterwards."""

    def __init__(self, paths: list[Path], declared: Format | None) -> None:
        self._reader = RecordReader(paths, declared)
        self._written = [_written(path) for path in paths]
        self._queries = hashlib.blake2b(digest_size=16)

    def batches(self) -> Iterator[pa.RecordBatch]:
        log.info("reading %s", ", ".join(map(str, self._reader.paths)))
        for records in _batched(self._reader):
            for record in records:
                self._queries.update(query_digest(record.query))
            columns = dict(zip(Record._fields, zip(*records, strict=True), strict=True))
            arrays = [pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names]
            yield pa.record_batch(arrays, schema=SCHEMA)

    def facts(self) -> Facts:
        # The digest may be of other rows: of a file that is copied others see the beginning alone.
        for path, written in zip(self._reader.paths, self._written, strict=True):
            if _written(path) != written:
                raise InputError(f"{path}: expected a file that stays as it is while it is read")
        return {
            "format": self._reader.format,
            "ignored_fields": sorted(self._reader.ignored_fields),
            "prompts": self._reader.prompts,
            "queries_digest": self._queries.hexdigest(),
            "rows_per_file": list(self._reader.rows_per_file),
        }


def query_digest(query: str) -> bytes:
    """Return the 8-byte digest of a query that a data set's ``queries_digest`` is made of."""
    return hashlib.blake2b(query.encode(), digest_size=8).digest()


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += sum(map(len, (record.query, *record.positives, *record.negatives)))
        if len(batch) == ROWS_PER_WRITE or characters >= CHARACTERS_PER_WRITE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
