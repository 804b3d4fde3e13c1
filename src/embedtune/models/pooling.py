"""Choose how the embeddings of tokens become one."""

from collections.abc import Iterator
from typing import cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from embedtune.errors import InputError
from embedtune.models.spec import PoolingMode


def set_pooling(model: SentenceTransformer, mode: PoolingMode, name: str) -> None:
    """Pool tokens by ``mode`` in the place of every pooling that a model has, or after its first.

    Args:
        model: Is changed.
        mode: How to pool.
        name: What the model was loaded from, for messages.

    Raises:
        InputError: The model has no embeddings of tokens.
    """
    found = [
        (modules, position)
        for modules in (model, *_routes(model))
        for position, module in enumerate(modules)
        if isinstance(module, Pooling)
    ]
    for modules, position in found:
        known = cast(Pooling, modules[position])
        pooling = Pooling(known.embedding_dimension, mode, include_prompt=known.include_prompt)
        modules[position] = pooling
    if found:
        return
    first = model[0]
    if not isinstance(first, Transformer) or first.module_output_name != "token_embeddings":
        raise InputError(
            f"model.pooling: expected a model that embeds tokens, found {type(first).__name__} in "
            f"{name!r}"
        )
    model.insert(1, Pooling(first.get_embedding_dimension(), mode))


def _routes(model: SentenceTransformer) -> Iterator[nn.Sequential]:
    for router in (module for module in model if isinstance(module, Router)):
        yield from cast("Iterator[nn.Sequential]", router.sub_modules.values())
