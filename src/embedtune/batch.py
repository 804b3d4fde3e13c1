"""Turn examples into a batch: texts tokenised once, sorted by length, cut into chunks."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedtune.encoder import Encoder, Features, Role
from embedtune.records import Example


class Batch(NamedTuple):
    """One rank's share of a global batch.

    ``query``, ``positive`` and ``negative`` are row numbers in the embeddings of all chunks, one
    after the other: a text that occurs twice is encoded once.

    Attributes:
        example_id: int64 ``[b]``, the numbers of the examples in their data set; empty for a spare
            share, whose one example does not count.
        chunks: Padded token features; the texts of a chunk are of about equal length.
        query: int64 ``[b]``.
        positive: int64 ``[m]``, empty for distill.
        negative: int64 ``[b * k]``, query-major, empty without hard negatives.
        list_index: int64 ``[m]``: which query each positive belongs to.
        scores: float32 ``[m]`` (scored).
        teacher: float32 ``[b, D]`` (distill).
        query_id, positive_id, negative_id: int64 text hashes ``[b]``, ``[m]``, ``[b * k]``.
        known_positive_id: int64 ``[b, p]``, the hashes of every positive of each row, 0 pads.
    """

    example_id: Tensor
    chunks: list[Features]
    query: Tensor
    positive: Tensor
    negative: Tensor
    list_index: Tensor
    scores: Tensor | None
    teacher: Tensor | None
    query_id: Tensor
    positive_id: Tensor
    negative_id: Tensor
    known_positive_id: Tensor

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of a :class:`~embedtune.target.Shares`, in its order."""
        rows = len(self.query), len(self.positive), len(self.negative)
        queries, positives, negatives = rows if len(self.example_id) else (0, 0, 0)
        return queries, positives, negatives, self.known_positive_id.shape[1], len(self.chunks)


class Text(NamedTuple):
    """What is encoded; equal texts share one embedding."""

    text: str
    role: Role
    prompt: str | None
    max_len: int


class Collator:
    """Collate examples into a :class:`Batch`."""

    def __init__(
        self, encoder: Encoder, query_max_len: int, passage_max_len: int, tokens_per_chunk: int
    ) -> None:
        """Take the encoder's own tokenisation.

        Args:
            encoder: Tokenises and pads; its weights are not touched.
            query_max_len: Longest query in tokens.
            passage_max_len: Longest positive or negative in tokens.
            tokens_per_chunk: Largest number of tokens, padding included, that are encoded at once.
        """
        self.encoder = encoder
        self.query_max_len = encoder.cap(query_max_len)
        self.passage_max_len = encoder.cap(passage_max_len)
        self.tokens_per_chunk = tokens_per_chunk

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return the batch of ``examples``."""
        queries = [self.query(example) for example in examples]
        positives = [self.document(text) for example in examples for text in example.positives]
        negatives = [self.document(text) for example in examples for text in example.negatives]
        rows: dict[Text, int] = {}
        for text in (*queries, *positives, *negatives):
            rows.setdefault(text, len(rows))
        chunks, order = make_chunks(self.encoder, list(rows), self.tokens_per_chunk)
        lists = [i for i, example in enumerate(examples) for _ in example.positives]
        scores = [score for example in examples for score in example.scores]
        teachers = [example.teacher for example in examples if example.teacher is not None]
        return Batch(
            example_id=torch.tensor(
                [example.example_id for example in examples if not example.spare],
                dtype=torch.int64,
            ),
            chunks=chunks,
            query=order[[rows[text] for text in queries]],
            positive=order[[rows[text] for text in positives]],
            negative=order[[rows[text] for text in negatives]],
            list_index=torch.tensor(lists, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float32) if scores else None,
            teacher=torch.from_numpy(np.stack(teachers)) if teachers else None,
            query_id=text_ids(text.text for text in queries),
            positive_id=text_ids(text.text for text in positives),
            negative_id=text_ids(text.text for text in negatives),
            known_positive_id=torch.nn.utils.rnn.pad_sequence(
                [text_ids(example.known_positives) for example in examples], batch_first=True
            ),
        )

    def query(self, example: Example) -> Text:
        """Return a query with its row's prompt, or else the encoder's own."""
        prompt = example.prompt or self.encoder.default_prompt("query")
        return Text(example.query, "query", prompt, self.query_max_len)

    def document(self, text: str) -> Text:
        """Return a positive or a negative with the encoder's own document prompt."""
        return Text(text, "document", self.encoder.default_prompt("document"), self.passage_max_len)


def text_ids(texts: Iterable[str]) -> Tensor:
    """Return a 64-bit hash of each text, int64 ``[n]``; equal texts get equal ids on every rank."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.from_numpy(np.frombuffer(digests, dtype=np.int64).copy())


def make_chunks(
    encoder: Encoder, texts: Sequence[Text], tokens_per_chunk: int
) -> tuple[list[Features], Tensor]:
    """Tokenise ``texts`` and cut them, sorted by length, into chunks padded to their own longest.

    Sorting puts texts of equal length together, so that hardly any padding is computed.

    Returns:
        The chunks, and int64 ``[n]``: the row of each text in the embeddings of all chunks. A
        model that does not take padded tokens (a bag of tokens) gets one chunk per prompt and role.
    """
    groups: dict[tuple[Role, str | None, int], list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault((text.role, text.prompt, text.max_len), []).append(i)
    chunks: list[Features] = []
    encoded: list[int] = []
    pools: dict[tuple, list[tuple[int, dict[str, Tensor]]]] = {}
    for (role, prompt, max_len), members in groups.items():
        features = encoder.tokenize([texts[i].text for i in members], role, prompt, max_len)
        mask = features.get("attention_mask")
        if mask is None:
            chunks.append(features)
            encoded.extend(members)
            continue
        # What is not a tensor (a route, the prompt's length) holds for a whole chunk.
        shared = {k: v for k, v in features.items() if not isinstance(v, Tensor)}
        tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
        pool = pools.setdefault(tuple(sorted(shared.items())), [])
        for row, i in enumerate(members):
            kept = mask[row].bool()
            pool.append((i, {k: v[row][kept] for k, v in tensors.items()}))
    for shared_items, pool in pools.items():
        for part in _cut_by_tokens(pool, tokens_per_chunk):
            chunks.append({**encoder.pad([tokens for _, tokens in part]), **dict(shared_items)})
            encoded.extend(i for i, _ in part)
    order = torch.empty(len(texts), dtype=torch.int64)
    order[encoded] = torch.arange(len(texts))
    return chunks, order


def _cut_by_tokens(
    pool: list[tuple[int, dict[str, Tensor]]], tokens_per_chunk: int
) -> list[list[tuple[int, dict[str, Tensor]]]]:
    # Longest first: a chunk that does not fit into memory fails in the first step, not the last.
    pool = sorted(pool, key=lambda item: -len(item[1]["attention_mask"]))
    parts: list[list[tuple[int, dict[str, Tensor]]]] = []
    room = 0
    for item in pool:
        if room == 0:
            parts.append([])
            room = max(1, tokens_per_chunk // len(item[1]["attention_mask"]))
        parts[-1].append(item)
        room -= 1
    return parts
