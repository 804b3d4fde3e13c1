"""What was understood of a base model, for people to read before it is trained."""

import os
from pathlib import Path

from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import is_sentence_transformer_model

from embedtune.models.architecture import is_decoder
from embedtune.models.encoder import Encoder
from embedtune.models.spec import Role


def describe_pooling(encoder: Encoder) -> str:
    """Tell how the tokens of a text become one embedding, and who says so."""
    found = [m for m in encoder.model.modules() if isinstance(m, Pooling)]
    if not found:
        return f"none: {type(encoder.model[0]).__name__} embeds whole texts"
    modes = " and ".join(dict.fromkeys(mode for m in found for mode in _modes(m)))
    if encoder.spec.pooling is not None:
        return f"{modes}, by model.pooling"
    name = encoder.spec.model_name_or_path
    local = Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1"
    if is_sentence_transformer_model(name, local_files_only=local):
        return f"{modes}, by the model's folder"
    usual = "lasttoken of most decoders" if _is_decoder(encoder) else "cls or mean"
    return (
        f"{modes}, since the model's folder names none (no modules.json): set model.pooling to "
        f"what it was trained with, {usual}"
    )


def describe_prompt(encoder: Encoder, role: Role) -> str:
    """Tell what is put before the texts of a role."""
    prompt = encoder.default_prompt(role)
    return "none" if prompt is None else repr(prompt)


def unused_prompts(encoder: Encoder) -> list[str]:
    """Return the names of a model's prompts where neither queries nor documents have one."""
    roles: tuple[Role, Role] = ("query", "document")
    if any(encoder.default_prompt(role) for role in roles):
        return []
    return sorted(name for name, prompt in encoder.model.prompts.items() if prompt)


def describe_parameters(trained: int, frozen: int) -> str:
    """Tell how many parameters are trained, and how many are not.

    >>> describe_parameters(22_700_000, 0)
    '22,700,000 trained'
    """
    return f"{trained:,} trained" + (f", {frozen:,} frozen" if frozen else "")


def _modes(pooling: Pooling) -> tuple[str, ...]:
    mode = pooling.pooling_mode
    return (mode,) if isinstance(mode, str) else tuple(mode)


def _is_decoder(encoder: Encoder) -> bool:
    return is_decoder(getattr(encoder.model[0], "config", None))
