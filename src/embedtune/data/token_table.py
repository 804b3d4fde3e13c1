"""Tokenise the training rows once, into a memory-mapped Arrow table beside their own."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedtune.data.cache import cache_folder, open_table
from embedtune.data.chunks import Text
from embedtune.data.collate import Collator
from embedtune.data.examples import Example
from embedtune.data.rows import Rows

log = logging.getLogger("embedtune")

TABLE_VERSION = 3  # raised whenever the columns change
TEXTS_PER_WRITE = 20_000
TEXTS_PER_CALL, CHARACTERS_PER_CALL = 1_000, 2**22
"""What is tokenised at once, padded to the longest: as many texts, or fewer that are long. A
tokenizer holds all tokens of a text before it cuts it, in some 50 bytes a character."""

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema({"query": IDS, "positives": pa.list_(IDS), "negatives": pa.list_(IDS)})


class TokenTable:
    """The token ids of all texts of a data set, row by row in a memory-mapped Arrow table.

    Attributes:
        table: Columns query, positives, negatives: the ids that stand for each text of the rows'
            columns of these names.
        key: Of the collator that has made them.
    """

    _columns: dict[str, "_Column"] | None = None

    def __init__(self, rows: Rows, collator: Collator, key: str) -> None:
        """Open the cached table, tokenising the rows first where there is none.

        Args:
            rows: What to tokenise.
            collator: Tokenises, with the prompts and limits of each text.
            key: The collator's ``tokens_key``.
        """
        name = f"tokens {TABLE_VERSION} {rows.table_digest} {key}"
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        path = cache_folder() / f"{digest}.arrow"
        self.table, _ = open_table(path, SCHEMA, lambda: _tokenised(rows, collator))
        self.key = key

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what would be sent to another process as a copy of the whole file."""
        return {"table": self.table, "key": self.key}

    @property
    def longest(self) -> int:
        """Tokens of the longest text, cut as it is encoded."""
        lengths = [0]
        for name in SCHEMA.names:
            for chunk in self.table.data.column(name).chunks:
                lists = chunk if chunk.type == IDS else chunk.flatten()
                lengths.append(pc.max(pc.list_value_length(lists)).as_py() or 0)
        return max(lengths)

    def find(
        self, row: int, fields: Mapping[str, Any], example: Example
    ) -> dict[tuple[str, str], np.ndarray]:
        """Return the ids of an example's texts by (role, text), each int32 ``[t]``, not copied.

        Args:
            row: The example's row, counted from 0.
            fields: The fields of that row.
            example: Its query, positives and negatives are looked up.
        """
        if self._columns is None:
            self._columns = {name: _Column(self.table.data.column(name)) for name in SCHEMA.names}
        (query,) = self._columns["query"].ids(row)
        found = {("query", example.query): query}
        wanted = {"positives": example.positives, "negatives": example.negatives}
        for column, texts in wanted.items():
            if texts:
                ids = dict(zip(fields[column], self._columns[column].ids(row), strict=True))
                found |= {("document", text): ids[text] for text in texts}
        return found


class _Column:
    """A column's buffers as arrays: a row is a slice of them, which Arrow's own values are not."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.starts = [0]
        self.parts: list[tuple[np.ndarray | None, np.ndarray, np.ndarray]] = []
        for chunk in column.chunks:
            self.starts.append(self.starts[-1] + len(chunk))
            rows = None
            if chunk.type != IDS:
                rows, chunk = chunk.offsets.to_numpy(), chunk.values
            self.parts.append((rows, chunk.offsets.to_numpy(), chunk.values.to_numpy()))

    def ids(self, row: int) -> list[np.ndarray]:
        """Return the ids of each text of a row, not copied."""
        part = bisect_right(self.starts, row) - 1
        rows, texts, ids = self.parts[part]
        at = row - self.starts[part]
        first, end = (at, at + 1) if rows is None else rows[at : at + 2].tolist()
        return [ids[start:stop] for start, stop in pairwise(texts[first : end + 1].tolist())]


def _tokenised(rows: Rows, collator: Collator) -> Iterator[pa.RecordBatch]:
    log.info("tokenising %s rows", f"{len(rows):,}")
    texts_per_row, first = rows.texts_per_row, 0
    for written in rows.table.data.column("query").chunks:  # with so many characters at most
        end = first + len(written)
        for start, stop in pairwise(_cuts(texts_per_row[first:end])):
            yield _tokenise(rows.table[first + start : first + stop], collator)
        first = end


def _cuts(texts_per_row: np.ndarray) -> Iterator[int]:
    """Yield where each write starts, and the end: memory is bounded by texts, not by rows."""
    ends = np.cumsum(texts_per_row)
    start, before = 0, 0
    while start < len(ends):
        yield start
        start = max(start + 1, int(np.searchsorted(ends, before + TEXTS_PER_WRITE, side="right")))
        before = int(ends[start - 1])
    yield start


def _tokenise(columns: Mapping[str, list], collator: Collator) -> pa.RecordBatch:
    queries = [
        collator.query(Example(0, query, prompt))
        for query, prompt in zip(columns["query"], columns["prompt"], strict=True)
    ]
    positives, negatives = (
        [[collator.document(text) for text in texts] for texts in columns[name]]
        for name in ("positives", "negatives")
    )
    texts = list(dict.fromkeys(chain(queries, *positives, *negatives)))
    texts.sort(key=lambda text: -len(text.text))
    ids: dict[Text, np.ndarray] = {}
    while len(ids) < len(texts):
        rest = texts[len(ids) :]
        most = max(1, CHARACTERS_PER_CALL // len(rest[0].text))
        part = rest[: min(most, TEXTS_PER_CALL)]
        ids.update(zip(part, collator.token_ids(part), strict=True))
    return pa.record_batch(
        [_lists(queries, ids), _nested(positives, ids), _nested(negatives, ids)], schema=SCHEMA
    )


def _nested(rows: Sequence[Sequence[Text]], ids: Mapping[Text, np.ndarray]) -> pa.ListArray:
    lists = _lists(list(chain.from_iterable(rows)), ids)
    return pa.ListArray.from_arrays(_offsets(map(len, rows)), lists)


def _lists(texts: Sequence[Text], ids: Mapping[Text, np.ndarray]) -> pa.ListArray:
    found = [ids[text] for text in texts]
    values = np.concatenate([np.empty(0, np.int32), *found])  # there may be no texts
    return pa.ListArray.from_arrays(_offsets(map(len, found)), pa.array(values, pa.int32()))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())
