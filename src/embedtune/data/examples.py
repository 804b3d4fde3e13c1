"""Serve rows as training examples, by epoch and number."""

from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data

from embedtune.data.batch import text_hashes
from embedtune.data.known_positives import KnownPositives
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.data.sampler import Key
from embedtune.data.teacher_store import TeacherStore


class Example(NamedTuple):
    """What one unit of ``batch_size`` holds.

    Attributes:
        example_id: Its number in the data set.
        query: The query without its prompt.
        prompt: The row's own query prompt, or None.
        positives: One text (pair, triplet), the whole list (scored) or none (distill).
        negatives: ``neg_nums`` hard negatives (triplet).
        known_positives: Every positive of the row, of a list every text: none is a negative.
        known_positive_id: int64 ``[p]``, hashes of those that all rows of the query have; None
            where it is in no other row.
        scores: One score per positive (scored).
        teacher: float32 ``[D]`` teacher embedding of the query (distill).
        spare: It is encoded, but does not count (see :class:`~embedtune.data.sampler.Key`).
        tokens: Token ids, int32 ``[t]``, of texts that are tokenised already, by (role, text).
    """

    example_id: int
    query: str
    prompt: str | None = None
    positives: Sequence[str] = ()
    negatives: Sequence[str] = ()
    known_positives: Sequence[str] = ()
    known_positive_id: np.ndarray | None = None
    scores: Sequence[float] = ()
    teacher: np.ndarray | None = None
    spare: bool = False
    tokens: Mapping[tuple[str, str], np.ndarray] | None = None


TokenSource = Callable[[int, Mapping[str, Any], Example], Mapping[tuple[str, str], np.ndarray]]
"""Finds ``Example.tokens`` by the number and the fields of the example's row."""


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
        self._known: KnownPositives | None = None
        if rows.format in (Format.PAIR, Format.TRIPLET):
            self._starts = np.concatenate([[0], np.cumsum(rows.list_lengths)])
        if rows.format != Format.DISTILL:
            self._known = KnownPositives(rows)

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
        other = copy(self)
        other.tokens = tokens
        return other

    def place(self, example: int) -> str:
        """Return ``file:line`` of the row that an example is of."""
        row = example
        if self._starts is not None:
            row = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self.rows.place(row)

    def sample(self, count: int) -> list[Example]:
        """Return ``count`` examples, or all, evenly spread; always the same ones."""
        count = min(len(self), count)
        spread = np.linspace(0, len(self) - 1, count).astype(int).tolist()
        return self.__getitems__([Key(0, example) for example in spread])

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
        known: Sequence[np.ndarray | None] = [None] * len(keys)
        if self._known is not None:
            known = self._known.of(columns["query"], columns["prompt"])
        examples = []
        for i, (key, row) in enumerate(zip(keys, rows.tolist(), strict=True)):
            fields = {name: columns[name][i] for name in columns}
            example = self._example(key, row, fields, known[i])
            tokens = None if self.tokens is None else self.tokens(row, fields, example)
            examples.append(example._replace(spare=key.spare, tokens=tokens))
        return examples

    def _example(
        self, key: Key, row: int, fields: dict[str, Any], known: np.ndarray | None
    ) -> Example:
        index, query, prompt = key.example, fields["query"], fields["prompt"]
        if self.rows.format == Format.DISTILL:
            teacher = None if self.teacher is None else self.teacher[row]
            return Example(index, query, prompt, teacher=teacher)
        positives = fields["positives"]
        if self._starts is None:
            own = positives, (), positives, known, fields["scores"]
            return Example(index, query, prompt, *own)
        negatives: list[str] = []
        if self.rows.format == Format.TRIPLET:
            candidates = fields["negatives"]
            if known is not None:
                its = set(known.tolist())
                hashes = text_hashes(candidates).tolist()
                candidates = [t for t, h in zip(candidates, hashes, strict=True) if h not in its]
            generator = negatives_generator(self.seed, key)
            unfit = {query, *positives}
            negatives = draw_negatives(candidates, unfit, self.neg_nums, generator)
        own = positives[index - int(self._starts[row])]
        return Example(index, query, prompt, [own], negatives, positives, known)


def negatives_generator(seed: int, key: Key) -> np.random.Generator:
    """Return what draws the negatives of an example in an epoch: a stream of its own.

    Philox (Salmon et al. 2011) makes blocks of random numbers of a key and a counter, of 256 bits.
    The lowest 64 count the blocks of one example, the next tell the examples apart, from 1 on: 0 is
    the stream of the epoch's order.
    """
    stream = np.array([0, key.example + 1, 0, 0], dtype=np.uint64)
    philox = np.random.Philox(key=np.array([seed, key.epoch], dtype=np.uint64), counter=stream)
    return np.random.Generator(philox)


def draw_negatives(
    negatives: Sequence[str], unfit: Container[str], count: int, generator: np.random.Generator
) -> list[str]:
    """Draw hard negatives of one query, none of them ``unfit``: its positives and its own text.

    Distinct texts are drawn without repetition while there are enough; with fewer than ``count``,
    all are taken as often as it goes and the remainder is drawn.

    >>> draw_negatives(["a", "b", "a", "p"], ["p"], 2, np.random.default_rng(0)) in (
    ...     ["a", "b"],
    ...     ["b", "a"],
    ... )
    True
    """
    candidates = [text for text in dict.fromkeys(negatives) if text not in unfit]
    order: list[int] = []
    while len(order) < count:
        order.extend(generator.permutation(len(candidates)).tolist())
    return [candidates[i] for i in order[:count]]
