"""Turn examples into a batch: texts tokenised once, sorted by length, cut into chunks."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedtune.encoder import Encoder, Features, Role
from embedtune.records import Example

PROBE = "a"
"""A short text, where the features of any text tell what is asked."""

PLAIN_FEATURES = {"input_ids", "attention_mask", "token_type_ids"}
"""Of these, token ids tell all of a single text."""


class Batch(NamedTuple):
    """One rank's share of a global batch.

    ``query``, ``positive`` and ``negative`` are row numbers in the embeddings of all chunks, one
    after the other: a text that occurs twice is encoded once.

    Attributes:
        example_id: int64 ``[b]``, the numbers of the examples in their data set; empty for a spare
            share, whose one example does not count.
        chunks: Token features, packed or padded; the texts of a chunk are of about equal length.
        query: int64 ``[b]``.
        positive: int64 ``[m]``, empty for distill.
        negative: int64 ``[b * k]``, query-major, empty without hard negatives.
        list_index: int64 ``[m]``: which query each positive belongs to.
        scores: float32 ``[m]`` (scored).
        teacher: float32 ``[b, D]`` (distill).
        query_id, positive_id, negative_id: int64 text hashes ``[b]``, ``[m]``, ``[b * k]``.
        known_positive_id: int64 ``[b, p]``, the hashes of every positive of each row, 0 pads.
        tokens: Tokens of the chunks without padding, and with it.
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
    tokens: tuple[int, int]

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
        known = {
            text: example.tokens[text.role, text.text]
            for example in examples
            if example.tokens is not None
            for text in self.texts(example)
            if (text.role, text.text) in example.tokens
        }
        chunks, order = make_chunks(self.encoder, list(rows), self.tokens_per_chunk, known)
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
            tokens=(sum(map(_real_tokens, chunks)), sum(c["input_ids"].numel() for c in chunks)),
        )

    def texts(self, example: Example) -> list[Text]:
        """Return what is encoded of an example."""
        documents = (*example.positives, *example.negatives)
        return [self.query(example), *map(self.document, documents)]

    def token_ids(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Return the ids of each text as it is encoded, cut and with special tokens, int32 ``[t]``.

        They tell all of a text where :attr:`tokens_key` is not None.
        """
        groups: dict[Any, list[int]] = {}
        for i, text in enumerate(texts):
            groups.setdefault(text[1:], []).append(i)
        ids: dict[int, np.ndarray] = {}
        for members in groups.values():
            rows, _ = _rows(self.encoder, [texts[i] for i in members], {})
            assert rows is not None, "checked by tokens_key"
            found = (row["input_ids"].int().numpy() for row in rows)
            ids |= dict(zip(members, found, strict=True))
        return [ids[i] for i in range(len(texts))]

    @property
    def tokens_key(self) -> str | None:
        """Digest of all that :meth:`token_ids` depends on beside the texts.

        None where ids do not tell all of a text, or where no digest can tell the tokenizer.
        """
        if self.encoder.routes:  # each route has a tokenizer of its own
            return None
        backend = getattr(self.encoder.model.tokenizer, "backend_tokenizer", None)
        features = self.encoder.tokenize([PROBE], "document", None, self.passage_max_len)
        tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
        if backend is None or not {"input_ids", "attention_mask"} <= set(tensors) <= PLAIN_FEATURES:
            return None
        if "token_type_ids" in tensors and tensors["token_type_ids"].any():
            return None
        tokenizer = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # left over from the last call
            tokenizer.pop(state, None)
        model: Any = self.encoder.model
        rules = [
            tokenizer,
            model.tokenizer.truncation_side,
            model.tokenizer.chat_template,
            model[0].get_config_dict() if hasattr(model[0], "get_config_dict") else None,
            [self.encoder.default_prompt(role) for role in ("query", "document")],
            self.query_max_len,
            self.passage_max_len,
        ]
        return hashlib.blake2b(json.dumps(rules, default=str).encode(), digest_size=16).hexdigest()

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


def _real_tokens(features: Features) -> int:
    mask = features.get("attention_mask")
    return int(features["input_ids"].numel() if mask is None else mask.sum())


def make_chunks(
    encoder: Encoder,
    texts: Sequence[Text],
    tokens_per_chunk: int,
    known: Mapping[Text, np.ndarray] | None = None,
) -> tuple[list[Features], Tensor]:
    """Tokenise ``texts`` and cut them, sorted by length, into chunks.

    Where the encoder packs, texts lie one after another and no padding is computed; else each chunk
    is padded to its own longest text, and cut where that costs least.

    Args:
        encoder: Tokenises, and joins the texts of a chunk.
        texts: What to encode.
        tokens_per_chunk: Largest number of tokens of a chunk, padding included.
        known: Token ids of texts that have been tokenised before.

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
    for members in groups.values():
        group = [texts[i] for i in members]
        rows, shared = _rows(encoder, group, {} if known is None else known)
        if rows is None:
            chunks.append(shared)
            encoded.extend(members)
            continue
        pools.setdefault(tuple(sorted(shared.items())), []).extend(zip(members, rows, strict=True))
    for shared_items, pool in pools.items():
        # Longest first: a chunk that does not fit into memory fails in the first step already.
        pool = sorted(pool, key=lambda item: -len(item[1]["input_ids"]))
        lengths = [len(row["input_ids"]) for _, row in pool]
        if encoder.packs:
            cuts = cut_packed(lengths, tokens_per_chunk)
        else:
            cuts = cut_padded(lengths, tokens_per_chunk, encoder.chunk_cost)
        for start, end in pairwise(cuts):
            joined = encoder.join([row for _, row in pool[start:end]])
            chunks.append({**joined, **dict(shared_items)})
            encoded.extend(i for i, _ in pool[start:end])
    order = torch.empty(len(texts), dtype=torch.int64)
    order[encoded] = torch.arange(len(texts))
    return chunks, order


def _rows(
    encoder: Encoder, group: Sequence[Text], known: Mapping[Text, np.ndarray]
) -> tuple[list[dict[str, Tensor]] | None, Features]:
    """Tokenise texts of one role, prompt and limit.

    Returns:
        The features of each text, every tensor ``[t]``, and what holds for a whole chunk (a route,
        the prompt's length). A bag of tokens has the features of all texts in the latter alone.
    """
    _, role, prompt, max_len = group[0]
    unknown = [text.text for text in group if text not in known]
    # One text at least, for what holds for all of them.
    features = encoder.tokenize(unknown or [PROBE], role, prompt, max_len)
    if "attention_mask" not in features:
        return None, features
    tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
    shared = {k: v for k, v in features.items() if k not in tensors}
    kept = iter(enumerate(features["attention_mask"].bool()))
    rows = []
    for text in group:
        if text in known:
            ids = torch.tensor(known[text], dtype=torch.int64)
            plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            rows.append({k: plain[k] if k in plain else torch.zeros_like(ids) for k in tensors})
        else:
            row, mask = next(kept)
            rows.append({k: v[row][mask] for k, v in tensors.items()})
    return rows, shared


def cut_packed(lengths: Sequence[int], tokens_per_chunk: int) -> list[int]:
    """Cut texts into as few chunks of about equally many tokens as the limit allows.

    Returns:
        Where each chunk starts, and the end.

    >>> cut_packed([5, 4, 3, 2, 2], 8)
    [0, 1, 3, 5]
    """
    share = sum(lengths) / max(1, -(-sum(lengths) // tokens_per_chunk))
    starts, tokens = [0], 0
    for i, length in enumerate(lengths):
        is_full = tokens + length > tokens_per_chunk or tokens >= share
        if tokens and is_full:
            starts.append(i)
            tokens = 0
        tokens += length
    return [*starts, len(lengths)]


def cut_padded(lengths: Sequence[int], tokens_per_chunk: int, chunk_cost: int) -> list[int]:
    """Cut texts, longest first, where padding and the fixed cost of a chunk are least together.

    A shortest path over the places to cut.

    Args:
        lengths: Tokens of each text, descending.
        tokens_per_chunk: Largest number of tokens of a chunk, padding included.
        chunk_cost: What a chunk costs beside the tokens it is padded to, in tokens.

    Returns:
        Where each chunk starts, and the end.

    >>> cut_padded([9, 9, 2, 2, 2], 64, 4)
    [0, 2, 5]
    >>> cut_padded([9, 9, 2, 2, 2], 64, 40)
    [0, 5]
    """
    count = len(lengths)
    cost = np.full(count + 1, np.inf)
    cost[0] = 0.0
    last = np.zeros(count + 1, dtype=np.int64)
    for start, longest in enumerate(lengths):
        most = min(max(1, tokens_per_chunk // max(1, longest)), count - start)
        ends = slice(start + 1, start + 1 + most)
        through = cost[start] + chunk_cost + longest * np.arange(1, most + 1)
        last[ends] = np.where(through < cost[ends], start, last[ends])
        cost[ends] = np.minimum(through, cost[ends])
    starts = [count]
    while starts[-1] > 0:
        starts.append(int(last[starts[-1]]))
    return starts[::-1]
