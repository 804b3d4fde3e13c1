"""What a base model is made of, beside its weights: by this another base is known."""

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module

from embedtune.models.spec import ROLES

TOLD = ("pooling_mode", "include_prompt", "layer_start", "activation_function")
"""Settings that change an embedding and no weight's shape."""


def structure_of(model: SentenceTransformer) -> str:
    """Return a line on the modules of a loaded model, its prompts and its similarity.

    Of settings it has those alone that have the same names in every version of
    sentence-transformers, so that an upgrade is not taken for another model.
    """
    modules = [_told(module) for module in model.modules() if isinstance(module, Module)]
    prompts = [f"{role} prompt {model.prompts.get(role) or ''!r}" for role in ROLES]
    return ", ".join([*modules, *prompts, f"compared by {model.similarity_fn_name}"])


def _told(module: Module) -> str:
    settings = {name: getattr(module, name) for name in TOLD if name in module.config_keys}
    words = [f"{name} {_short(value)}" for name, value in settings.items()]
    return type(module).__name__ + (f" ({', '.join(words)})" if words else "")


def _short(value: object) -> str:
    """Return a plain value as it is, of an activation the name of its class."""
    plain = isinstance(value, str | bool | int | list | tuple)
    return str(value) if plain else type(value).__name__
