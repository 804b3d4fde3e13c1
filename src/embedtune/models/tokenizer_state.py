"""Truncation and padding of a tokenizer: each call sets them, a folder is saved with its own."""

import hashlib
import string
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

PROBE = "The Quick brown fox, 1984: naïve café, Straße; 中文句子 Привет, jumped_over!"
PROBE += " ".join(string.ascii_letters + string.digits)
"""Tokenizers that are not the same give it other ids."""


class TokenizerState(NamedTuple):
    """What ``tokenizers`` says of truncation and padding; None is without."""

    truncation: dict[str, Any] | None
    padding: dict[str, Any] | None


_loaded: WeakKeyDictionary[Any, TokenizerState] = WeakKeyDictionary()


def remember_tokenizers(model: SentenceTransformer) -> None:
    """Remember the state of a loaded model's tokenizers, before their first call."""
    for tokenizer in _fast_tokenizers(model):
        backend = tokenizer.backend_tokenizer
        _loaded[tokenizer] = TokenizerState(backend.truncation, backend.padding)


def restore_tokenizers(model: SentenceTransformer) -> None:
    """Give the tokenizers the state that they were loaded with; the next call sets its own."""
    for tokenizer in _fast_tokenizers(model):
        backend, state = tokenizer.backend_tokenizer, _loaded.get(tokenizer)
        if state is None:  # not loaded by this package
            continue
        backend.no_truncation()
        if state.truncation is not None:
            backend.enable_truncation(**state.truncation)
        backend.no_padding()
        if state.padding is not None:
            backend.enable_padding(**state.padding)


def tokenizers_digest(model: SentenceTransformer) -> str:
    """Return a digest of how a model's tokenizers read a text, before their first call.

    Those that are written in Python, in which a folder cannot be told from another, are left out.
    """
    digest = hashlib.blake2b(digest_size=8)
    for module in model.modules():
        tokenizer = getattr(module, "tokenizer", None)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(backend, Tokenizer):
            digest.update(repr(backend.encode(PROBE).ids).encode())
    return digest.hexdigest()


def _fast_tokenizers(model: SentenceTransformer) -> Iterator[Any]:
    for module in model.modules():
        tokenizer = getattr(module, "tokenizer", None)
        if hasattr(tokenizer, "backend_tokenizer"):
            yield tokenizer
