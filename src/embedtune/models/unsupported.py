"""Models that are no text encoder of one embedding a text, or contradict themselves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import (
    TransformersTokenizerWrapper,
)
from sentence_transformers.util import load_file_path

from embedtune.errors import InputError
from embedtune.models.spec import ROLES
from embedtune.models.towers import route, transformers_of

SCORES = "ForSequenceClassification"


def refuse_other_kinds(name: str, local_files_only: bool) -> None:
    """Refuse what sentence-transformers keeps in other classes, and would load without its head.

    Raises:
        InputError: A CrossEncoder, a SparseEncoder or a MultiVectorEncoder.
    """
    kind = _kind(name, local_files_only)
    if kind is not None:
        raise InputError(
            f"model_name_or_path: {name!r}: expected a SentenceTransformer or a bare encoder, "
            f"which make one dense embedding a text, found a {kind}"
        )


def _kind(name: str, local_files_only: bool) -> str | None:
    settings = _read(name, "config_sentence_transformers.json", local_files_only)
    known = settings.get("model_type") if isinstance(settings, dict) else None
    if known not in (None, "SentenceTransformer"):
        return str(known)
    modules = _read(name, "modules.json", local_files_only)
    for module in modules if isinstance(modules, list) else ():
        package = str(module.get("type") if isinstance(module, dict) else "")
        if package.startswith("sentence_transformers.sparse_encoder."):
            return "SparseEncoder"
        if package.startswith(("sentence_transformers.multi_vector_encoder.", "pylate.")):
            return "MultiVectorEncoder"
    config = _read(name, "config.json", local_files_only)
    if modules is None and isinstance(config, dict):
        return _scorer(config)
    return None


def _scorer(config: dict[str, Any]) -> str | None:
    """Return what a bare checkpoint with a head that gives a pair of texts one score is."""
    architectures, labels = config.get("architectures"), config.get("id2label")
    scores = isinstance(architectures, list) and any(SCORES in str(a) for a in architectures)
    gives_one = isinstance(labels, dict) and len(labels) == 1
    return "CrossEncoder" if scores and (gives_one or "sentence_transformers" in config) else None


def _read(name: str, file: str, local_files_only: bool) -> Any:
    """Return what a file of a model holds; None where there is none that can be read."""
    try:
        path = load_file_path(name, file, local_files_only=local_files_only)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # loading says what is wrong


def refuse_unsupported(model: SentenceTransformer, name: str) -> None:
    """Refuse a model that would fail, or fail to be exported, on its first query or document.

    Args:
        model: As loaded.
        name: What it was loaded from, for messages.

    Raises:
        InputError: A Router without a route, a tokenizer that knows more than the model.
    """
    for router in (module for module in model if isinstance(module, Router)):
        for role in ROLES:
            if route(router, role) is None:
                raise InputError(
                    f"model_name_or_path: {name!r}: expected a Router with a route for {role}, "
                    f"found {', '.join(router.sub_modules)}"
                )
    if any(isinstance(m.tokenizer, TransformersTokenizerWrapper) for m in _word_embeddings(model)):
        raise InputError(
            f"model_name_or_path: {name!r}: expected WordEmbeddings with a tokenizer of words, "
            "found one of transformers, which sentence-transformers encodes no queries with"
        )
    for transformer in transformers_of(model):
        _refuse_large_tokenizer(transformer, name)


def refuse_as_teacher(model: SentenceTransformer, name: str) -> None:
    """Refuse a model that would fail on texts that are neither queries nor documents.

    Raises:
        InputError: A Router without a route by default, a tokenizer that knows more than the model.
    """
    for router in (module for module in model if isinstance(module, Router)):
        mapped: Any = router.route_mappings
        known = any((None, kind) in mapped for kind in ("text", None))
        if not known and "text" not in router.sub_modules and router.default_route is None:
            raise InputError(
                f"model_name_or_path: {name!r}: expected a Router with a default_route, for texts "
                f"that are queries and documents alike, found {', '.join(router.sub_modules)} alone"
            )
    for transformer in transformers_of(model):
        _refuse_large_tokenizer(transformer, name)


def _word_embeddings(model: SentenceTransformer) -> Iterator[WordEmbeddings]:
    return (module for module in model.modules() if isinstance(module, WordEmbeddings))


def _refuse_large_tokenizer(transformer: Transformer, name: str) -> None:
    rows = _embedding_rows(transformer)
    vocabulary: dict[str, int] = getattr(transformer.tokenizer, "get_vocab", dict)()
    if rows is None or not vocabulary:
        return
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= rows:
        raise InputError(
            f"model_name_or_path: {name!r}: expected a tokenizer of at most the {rows:,} tokens of "
            f"the embedding table, found {last + 1:,}, the last of them {token!r}"
        )


def _embedding_rows(transformer: Transformer) -> int | None:
    inner: Any = transformer.auto_model
    try:
        return getattr(inner.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of texts and images, each with a table of its own
        return getattr(getattr(inner.config, "text_config", None), "vocab_size", None)
