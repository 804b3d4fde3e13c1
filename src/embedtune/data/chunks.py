"""Tokenise texts and cut them, sorted by length, into chunks that are encoded at once."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedtune.models.encoder import Encoder
from embedtune.models.packing import TextFeatures
from embedtune.models.spec import Features, Role

PROBE = "a"
"""A short text, where the features of any text tell what is asked."""


class Text(NamedTuple):
    """What is encoded; equal texts share one embedding."""

    text: str
    role: Role
    prompt: str | None
    max_len: int


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
    pools: dict[tuple, list[tuple[int, TextFeatures]]] = {}
    for members in groups.values():
        group = [texts[i] for i in members]
        rows, shared = tokenise(encoder, group, {} if known is None else known)
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
            shared = dict(shared_items)
            joined = encoder.join([row for _, row in pool[start:end]], shared.get("task", "query"))
            chunks.append({**joined, **shared})
            encoded.extend(i for i, _ in pool[start:end])
    order = torch.empty(len(texts), dtype=torch.int64)
    order[encoded] = torch.arange(len(texts))
    return chunks, order


def tokenise(
    encoder: Encoder, group: Sequence[Text], known: Mapping[Text, np.ndarray]
) -> tuple[list[TextFeatures] | None, Features]:
    """Tokenise texts of one role, prompt and limit.

    Returns:
        The features of each text, and what holds for a whole chunk (a route, the prompt's length).
        An empty text, where the tokenizer adds no tokens of its own, is one of padding. A bag of
        tokens has the features of all texts in the latter alone.
    """
    _, role, prompt, max_len = group[0]
    unknown = [text.text for text in group if text not in known]
    # One text at least, for what holds for all of them.
    features = encoder.tokenize(unknown or [PROBE], role, prompt, max_len)
    if "attention_mask" not in features:
        return None, features
    tensors = {k: v for k, v in features.items() if isinstance(v, Tensor)}
    shared = {k: v for k, v in features.items() if k not in tensors}
    kept = features["attention_mask"].bool()
    lengths = kept.sum(dim=1).tolist()
    ends = np.cumsum(lengths)[:-1]
    split = {k: np.split(v[kept].numpy(), ends) for k, v in tensors.items()}
    longest = max((len(known[text]) for text in group if text in known), default=0)
    # Slices of these are what ids do not tell: arrays of its own for each text would take longer
    # than all else.
    constant = {k: np.full(longest, k == "attention_mask", np.int32) for k in tensors}
    places = iter(range(len(lengths)))
    rows: list[TextFeatures] = []
    for text in group:
        ids = known.get(text)
        if ids is not None:
            same = {k: values[: len(ids)] for k, values in constant.items()}
            rows.append({**same, "input_ids": ids})
        else:
            place = next(places)
            tokens = {k: v[place] for k, v in split.items()}
            rows.append(tokens if lengths[place] else encoder.no_tokens(tensors, role))
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
