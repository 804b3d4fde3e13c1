"""What transformers knows of an architecture."""

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def is_decoder(config: Any) -> bool:
    """Tell whether a model is of an architecture that is known to predict next tokens alone.

    BERT's kin can be made to do so as well, but are known to predict masked tokens.

    Args:
        config: That of transformers; None of a model that has none.

    >>> from transformers import BertConfig, Qwen3Config
    >>> is_decoder(Qwen3Config()), is_decoder(BertConfig()), is_decoder(None)
    (True, False, False)
    """
    kind, brought = getattr(config, "model_type", ""), getattr(config, "auto_map", None) or {}
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in brought
    is_masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in brought
    return is_causal and not is_masked
