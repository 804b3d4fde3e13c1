"""The positives of queries that several rows share, over a whole data set."""

import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from embedtune.data.batch import query_hashes, text_hashes
from embedtune.data.cache import cache_folder, open_table
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.errors import InputError

log = logging.getLogger("embedtune")

INDEX_VERSION = 3  # raised whenever the columns, their order or what is refused changes

SCHEMA = pa.schema({"query": pa.int64(), "positive": pa.int64()})


class KnownPositives:
    """Hashes of the positives of each query that more than one row has.

    A memory-mapped Arrow table of pairs of query and positive, ordered by both: 16 bytes for each
    distinct pair of such queries, nothing for others. While it is made it takes at most some 100
    bytes of memory a row, whatever the length of the texts.
    """

    def __init__(self, rows: Rows) -> None:
        """Open the cached table of ``rows``, made first where there is none.

        Raises:
            InputError: A row has no hard negative that is neither its query nor a positive of it.
        """
        name = f"known positives {INDEX_VERSION} {rows.table_digest}"
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        path = cache_folder() / f"{digest}.arrow"
        self._table, _ = open_table(path, SCHEMA, lambda: _pairs(rows))

    def of(self, queries: Sequence[str], prompts: Sequence[str | None]) -> list[np.ndarray | None]:
        """Return the hashes of the positives of each query under its row's prompt, int64 ``[p]``.

        None for a query of one row, which holds all of them. A row that names the prompt that the
        model has is not told from one that names another: the table knows of no model. A batch
        does, and masks what it holds of both.
        """
        columns = (self._table.data.column(name) for name in SCHEMA.names)
        # Written as one batch, hence in one chunk; of no pairs there is none.
        arrays = [c.chunk(0).to_numpy() if len(c) else np.empty(0, np.int64) for c in columns]
        found = _positives_of(query_hashes(queries, prompts), *arrays)
        return [positives.copy() if len(positives) else None for positives in found]


def _positives_of(
    query_id: np.ndarray, queries: np.ndarray, positives: np.ndarray
) -> list[np.ndarray]:
    starts = np.searchsorted(queries, query_id)
    ends = np.searchsorted(queries, query_id, side="right")
    return [positives[start:end] for start, end in zip(starts, ends, strict=True)]


def _pairs(rows: Rows) -> Iterator[pa.RecordBatch]:
    """Yield the table as one batch."""
    every_row = np.arange(len(rows))
    asked = zip(*(_blocks(rows, name, every_row) for name in ("query", "prompt")), strict=True)
    query_id = np.concatenate(
        [query_hashes(texts.to_pylist(), prompts.to_pylist()) for (_, texts), (_, prompts) in asked]
    )
    ordered = np.sort(query_id)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    members = np.flatnonzero(np.isin(query_id, shared))
    queries, positives = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for numbers, lists in _blocks(rows, "positives", members):
        queries.append(np.repeat(query_id[numbers], np.asarray(lists.value_lengths())))
        positives.append(text_hashes(lists.flatten().to_pylist()))
    query, positive = np.concatenate(queries), np.concatenate(positives)
    order = np.lexsort((positive, query))
    query, positive = query[order], positive[order]
    is_new = np.ones(len(query), dtype=bool)
    is_new[1:] = (query[1:] != query[:-1]) | (positive[1:] != positive[:-1])
    query, positive = query[is_new], positive[is_new]
    if rows.format == Format.TRIPLET:
        _refuse_without_negatives(rows, members, query_id, query, positive)
    yield pa.record_batch([pa.array(query), pa.array(positive)], schema=SCHEMA)


def _blocks(rows: Rows, column: str, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Yield some rows' values of a column write by write, with the rows' ascending numbers."""
    start = 0
    for values in rows.table.data.column(column).chunks:
        first, end = np.searchsorted(numbers, [start, start + len(values)])
        if first < end:
            block = numbers[first:end]
            yield block, values.take(pa.array(block - start))
        start += len(values)


def _refuse_without_negatives(
    rows: Rows, members: np.ndarray, query_id: np.ndarray, query: np.ndarray, positive: np.ndarray
) -> None:
    """Refuse rows whose hard negatives are all their query, or its positives in other rows."""
    refused: list[int] = []
    blocks = (_blocks(rows, column, members) for column in ("query", "negatives"))
    for (numbers, asked), (_, block) in zip(*blocks, strict=True):
        known = _positives_of(query_id[numbers], query, positive)
        given = zip(numbers.tolist(), asked.to_pylist(), block.to_pylist(), known, strict=True)
        for row, own, texts, its in given:
            if all(text == own or _holds(its, text) for text in texts):
                refused.append(row)
    if refused:
        raise InputError(
            f"{rows.place(refused[0])}: field 'neg': expected at least one text that is "
            "neither the query nor a positive of it in another row, found none"
            + (f"; so in {len(refused):,} rows" if len(refused) > 1 else "")
        )


def _holds(ordered: np.ndarray, text: str) -> bool:
    """Tell whether ascending hashes hold that of a text."""
    (text_id,) = text_hashes([text])
    place = np.searchsorted(ordered, text_id)
    return bool(place < len(ordered) and ordered[place] == text_id)
