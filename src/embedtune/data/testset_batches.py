"""Batches of the distinct texts of a test set."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch.utils.data
from torch import Tensor

from embedtune.data.beir import RetrievalSet
from embedtune.data.chunks import Text, make_chunks
from embedtune.data.sampler import Key
from embedtune.data.scored_pairs import ScoredPairs
from embedtune.digests import Hasher
from embedtune.models.encoder import Encoder
from embedtune.models.spec import ROLES, Features, Role

TEXTS_PER_BATCH = 256
"""Texts of a test set that a rank encodes between two batches' exchanges."""


class TextBatch(NamedTuple):
    """One rank's share of a global batch of texts.

    Attributes:
        text: int64 ``[n]``, the numbers of the texts in their set; empty for a spare share.
        chunks: Token features, packed or padded.
        rows: int64 ``[n]``: the row of each text in the embeddings of all chunks.
    """

    text: Tensor
    chunks: list[Features]
    rows: Tensor


class TextDataset(torch.utils.data.Dataset):
    """The distinct texts of a test set.

    Attributes:
        texts: Each with its role; queries (of pairs: the first texts) and documents apart.
        first: int64: the number of the text of each query, or of the first text of each pair.
        second: int64: the same for documents, or for the second texts.
    """

    def __init__(self, testset: RetrievalSet | ScoredPairs) -> None:
        """Number the texts, the longest first: ranks and chunks get texts of about one length."""
        self.testset = testset
        first, second = (
            (testset.queries, testset.corpus)
            if isinstance(testset, RetrievalSet)
            else (testset.first, testset.second)
        )
        roles: tuple[tuple[Role, list[str]], ...] = (("query", first), ("document", second))
        distinct = {(role, text): len(text) for role, texts in roles for text in texts}
        self.texts = sorted(distinct, key=lambda text: -distinct[text])
        number = {text: i for i, text in enumerate(self.texts)}
        self.first, self.second = (
            torch.tensor([number[role, text] for text in texts]) for role, texts in roles
        )

    @cached_property
    def digest(self) -> str:
        """Digest of the texts and of what is judged: metrics of others are no measure of this."""
        hasher = Hasher()
        for part in self.testset:
            for item in part:
                hasher.update(repr(item).encode())
            hasher.update(b"\0")
        return hasher.hexdigest()

    def __len__(self) -> int:
        """Return the number of distinct texts."""
        return len(self.texts)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Role, str]]:
        """Return several texts with their keys (the loader's fast path)."""
        return [(key, *self.texts[key.example]) for key in keys]


class TextCollator:
    """Make a :class:`TextBatch` of texts as an exported model encodes them."""

    def __init__(self, encoder: Encoder, tokens_per_chunk: int) -> None:
        """Take the encoder's own tokenisation, prompts and longest input."""
        self.encoder, self.tokens_per_chunk = encoder, tokens_per_chunk

    def __call__(self, texts: Sequence[tuple[Key, Role, str]]) -> TextBatch:
        """Return the batch of ``texts``."""
        encoder = self.encoder
        longest = {role: encoder.longest(role) for role in ROLES}
        chunks, rows = make_chunks(
            encoder,
            [
                Text(text, role, encoder.default_prompt(role), longest[role])
                for _, role, text in texts
            ],
            self.tokens_per_chunk,
        )
        counted = [key.example for key, *_ in texts if not key.spare]
        return TextBatch(torch.tensor(counted, dtype=torch.int64), chunks, rows)
