"""A base model that is an adapter: a few weights beside a model, such as LoRA's."""

import logging
from importlib.util import find_spec
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from embedtune.errors import InputError
from embedtune.models.towers import transformers_of

log = logging.getLogger("embedtune")


def merge_adapters(model: SentenceTransformer, name: str) -> None:
    """Add the weights of an adapter to those of the model that it was trained for.

    Args:
        model: As loaded; every weight of the merged model can be trained.
        name: What it was loaded from, for messages.

    Raises:
        InputError: The adapter is of a kind that adds nothing to weights, such as prompts.
    """
    for transformer in transformers_of(model):
        inner: Any = transformer.auto_model
        if not getattr(inner, "_hf_peft_config_loaded", False):
            continue
        kinds = ", ".join(map(_kind, inner.peft_config.values()))
        # transformers leaves the magnitudes of DoRA as they were drawn.
        if "DORA" in kinds or not _merge(inner):
            raise InputError(
                f"model_name_or_path: {name!r}: expected an adapter that can be merged into its "
                f"model, such as LoRA, found {kinds}"
            )
        inner._hf_peft_config_loaded = False
        # The latter would give weights the names that they have in an adapter.
        del inner.peft_config, inner._weight_conversions
        inner.requires_grad_(True)
        log.info("%s: merged its adapter (%s) into the model below", name, kinds)


def _kind(config: Any) -> str:
    return "DORA" if getattr(config, "use_dora", False) else config.peft_type.value


def _merge(model: nn.Module) -> int:
    """Put a plain layer in the place of each that an adapter wraps; return how many there were."""
    if find_spec("peft") is None:
        return 0
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    merged = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(parent, name, child.modules_to_save[child.active_adapters[0]])
            else:
                continue
            merged += 1
    return merged
