"""The modules that take texts in: one for all, or a tower for each role behind a Router."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from torch import nn
from transformers import PreTrainedModel

from embedtune.models.spec import ROLES, Role

USUAL_WIDTH = 768
"""That of BERT-base's layers."""
UNLIMITED = 10**9
"""More tokens than any input has; tokenizers without a limit report about 1e30."""


def tower(model: SentenceTransformer, role: Role) -> nn.Module:
    """Return the module that makes tokens of the texts of a role."""
    first = model[0]
    if not isinstance(first, Router):
        return first
    # The route by default is that of texts without a role, as a teacher's are.
    name = route(first, role) or first.default_route
    return cast(nn.Sequential, first.sub_modules[cast(str, name)])[0]


def towers(model: SentenceTransformer) -> list[nn.Module]:
    """Return the modules that make tokens of texts, each once."""
    found = {id(module): module for module in (tower(model, role) for role in ROLES)}
    return list(found.values())


def transformers_of(model: SentenceTransformer) -> Iterator[Transformer]:
    """Yield every transformer of a model, those behind a Router among them."""
    return (module for module in model.modules() if isinstance(module, Transformer))


def backbones(model: SentenceTransformer) -> Iterator[PreTrainedModel]:
    """Yield every model of transformers, those in modules of a model's own code among them."""
    outer: list[str] = []
    for name, module in model.named_modules():
        # Parts of one may be models, too.
        if isinstance(module, PreTrainedModel) and not name.startswith(tuple(outer)):
            outer.append(f"{name}.")
            yield module


def layer_width(model: SentenceTransformer) -> int | None:
    """Return the width of a model's widest transformer layers, None where it has none."""
    configs = [backbone.config.get_text_config() for backbone in backbones(model)]
    # A model's own code may have another word for it.
    return max((getattr(config, "hidden_size", USUAL_WIDTH) for config in configs), default=None)


def has_routes(model: SentenceTransformer) -> bool:
    """Tell whether queries and documents take different ways through a model."""
    return any(isinstance(module, Router) for module in model)


def route(router: Router, role: Role) -> str | None:
    """Return the route that a text of a role takes, by the rules that Router documents."""
    mapped: Any = router.route_mappings
    for key in ((role, "text"), (role, None), (None, "text"), (None, None)):
        if key in mapped:
            return mapped[key]
    return next((name for name in (role, "text") if name in router.sub_modules), None)


# --- Lengths --------------------------------------------------------------------------------


def limit_of(module: nn.Module, role: Role) -> str:
    """Return the name under which a tower keeps the longest input of a role: its own, or of all."""
    own = f"{role}_length"  # since sentence-transformers 6
    return "max_seq_length" if getattr(module, own, None) is None else own


def longest_input(module: nn.Module, limit: str = "max_seq_length") -> int | None:
    """Return the tokens after which a tower cuts a text; None is unlimited."""
    length: Any = getattr(module, limit, None)
    return None if length is None or length > UNLIMITED else int(length)


def positions(module: nn.Module) -> int | None:
    """Return the longest input in tokens that the position embeddings allow; None is unlimited."""
    config: Any = getattr(module, "config", None)
    parts = (config, getattr(config, "text_config", None))  # that of a model of texts and images
    found = [getattr(part, "max_position_embeddings", None) for part in parts]
    known = next((count for count in found if count is not None), 0)
    return int(known) - first_position(module) if known > 0 else None


def first_position(module: nn.Module) -> int:
    """Return the number of a text's first position: RoBERTa-like models start after the padding."""
    embeddings = getattr(getattr(module, "auto_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def capped(module: nn.Module, length: int) -> int:
    """Return ``length``, or as many tokens as a tower has positions if they are fewer."""
    limit = positions(module)
    return length if limit is None else min(length, limit)


@contextmanager
def cutting_at(modules: Iterable[nn.Module], length: int) -> Iterator[None]:
    """Let modules of a model's own code cut texts at ``length`` tokens, within the block.

    Those that do not ``preprocess``, as sentence-transformers' own do, are told of no other limit
    than that of the module.
    """
    own: Any = [m for m in modules if longest_input(m) and not hasattr(m, "preprocess")]
    limits = [module.max_seq_length for module in own]
    try:
        for module in own:
            module.max_seq_length = length
        yield
    finally:
        for module, limit in zip(own, limits, strict=True):
            module.max_seq_length = limit
