"""Load a sentence-transformers model, and settle what it leaves to its user."""

import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer

from embedtune.digests import refuse_damaged
from embedtune.errors import InputError
from embedtune.models.adapters import merge_adapters
from embedtune.models.tokenizer_state import remember_tokenizers
from embedtune.models.towers import (
    capped,
    longest_input,
    positions,
    towers,
    transformers_of,
)
from embedtune.models.unsupported import refuse_other_kinds
from embedtune.models.words import fix_words

log = logging.getLogger("embedtune")

ATTENTION_DROPOUT = (
    "attention_probs_dropout_prob",
    "attention_dropout",
    "attention_dropout_prob",
    "attn_pdrop",
)
"""What the configurations of transformers' models call the dropout of attention probabilities."""
OTHER_DROPOUT = (
    "hidden_dropout_prob",
    "dropout",
    "dropout_rate",
    "hidden_dropout",
    "resid_pdrop",
    "resid_dropout",
    "residual_dropout",
    "embd_pdrop",
    "embed_dropout",
    "embedding_dropout",
    "activation_dropout",
    "mlp_dropout",
)
"""And every other dropout."""


DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""What ``encode_document`` calls the prompt of documents, in its order."""


def load_sentence_transformer(
    model_name_or_path: str,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    attn_implementation: str | None = None,
    config: dict[str, Any] | None = None,
) -> SentenceTransformer:
    """Load a model in float32, whatever precision it was saved in.

    cuDNN's attention is switched off in this process.

    Args:
        model_name_or_path: Hub name or folder.
        trust_remote_code: Run code that the model brings along.
        device: Where to load it; None is the best device there is.
        attn_implementation: By transformers' names; None is the model's own.
        config: Changes to its configuration; those it does not have are ignored.

    Raises:
        InputError: Nothing loadable is there, it is no model of dense embeddings, or its weights
            are damaged or not finite.
    """
    # cuDNN plans for longer than a step takes, anew for every shape, and each batch has its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model_kwargs: dict[str, Any] = {"dtype": torch.float32}
    if attn_implementation is not None:
        model_kwargs["attn_implementation"] = attn_implementation
    path = Path(model_name_or_path)
    looks_like_path = path.is_absolute() or model_name_or_path.startswith((".", "~"))
    if not path.is_dir() and (looks_like_path or model_name_or_path.count("/") > 1):
        raise InputError(
            f"model_name_or_path: expected a model folder or a hub name, found no folder {path}"
        )
    refuse_damaged(path)
    local_files_only = path.is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1"
    refuse_other_kinds(model_name_or_path, local_files_only)
    try:
        model = SentenceTransformer(
            model_name_or_path,
            device=device,
            trust_remote_code=trust_remote_code,
            # Optimiser steps below bfloat16's spacing would be lost without float32 weights.
            model_kwargs=model_kwargs,
            config_kwargs=config,
            local_files_only=local_files_only,
        )
    except Exception as error:  # whatever the libraries make of a broken file
        reason = (_broken_file(path) if path.is_dir() else None) or _reason(error)
        raise InputError(
            f"model_name_or_path: cannot load {model_name_or_path!r}: {reason}"
        ) from error
    model.float()  # modules beside the transformer are loaded as they were saved
    _refuse_broken(model, model_name_or_path)
    merge_adapters(model, model_name_or_path)
    _complete(model, model_name_or_path)
    _settle_document_prompt(model, model_name_or_path)
    remember_tokenizers(model)
    return model


def _refuse_broken(model: SentenceTransformer, name: str) -> None:
    if any(getattr(module, "pooling_output_dimension", 1) == 0 for module in model):
        raise InputError(f"model_name_or_path: {name!r}: expected a pooling mode, found none")
    for weight_name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(
                f"model_name_or_path: {name!r}: expected finite weights, found others in "
                f"{weight_name}"
            )


def _complete(model: SentenceTransformer, name: str) -> None:
    """Give a tokenizer a token to pad with, and keep in an export that it writes small."""
    for transformer in transformers_of(model):
        if getattr(transformer, "do_lower_case", False):
            # sentence-transformers reads it, but would not write it.
            transformer.config_keys = [*transformer.config_keys, "do_lower_case"]
        tokenizer: Any = transformer.tokenizer
        if tokenizer is None or tokenizer.pad_token is not None:
            continue
        known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        padding = next((token for token in known if token is not None), None)
        if padding is None:
            raise InputError(
                f"model_name_or_path: {name!r}: expected a tokenizer with a token to pad with, "
                "found none, nor one of the end of a text"
            )
        tokenizer.pad_token = padding  # masked, whatever it is
        log.info("%s: its tokenizer names no token to pad with: it is %r", name, padding)


def _settle_document_prompt(model: SentenceTransformer, name: str) -> None:
    """Let documents get the prompt that a model has for them, whatever it calls it.

    ``encode_document`` would take an empty "document" prompt, which it gives to every model, over
    one of another name.
    """
    named = next((other for other in DOCUMENT_PROMPTS if model.prompts.get(other)), "document")
    if named != "document":
        model.prompts["document"] = model.prompts[named]
        log.info("%s: documents get its %r prompt", name, named)


def _reason(error: Exception) -> str:
    """Return the first line of what an error says, with its kind where that says more."""
    if "trust_remote_code" in str(error):
        return "it brings code along; if you trust it, set trust_remote_code to true"
    said = str(error).strip().partition("\n")[0]
    if said and isinstance(error, ImportError | OSError | ValueError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _broken_file(folder: Path) -> str | None:
    """Return the first file of a model that is not of its format, and why, if there is one."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            return f"{path.relative_to(folder)}: {_reason(error)}"
    return None


def refuse_filled(model: SentenceTransformer, prompt: str, longest: int) -> None:
    """Refuse a prompt, or an input so short, that nothing would be left of a text.

    Raises:
        InputError: It names ``max_len``.
    """
    features = model.preprocess([""], prompt=prompt or None, max_length=longest)
    ids = features.get("input_ids")
    if ids is not None and ids.dim() == 2 and ids.shape[1] >= longest:
        filled = f"the prompt {prompt!r} takes" if prompt else "begin and end a text"
        raise InputError(f"max_len: expected more tokens than {filled}, found {longest}")


def cap_length(model: SentenceTransformer, max_len: int) -> int:
    """Return ``max_len``, or as many tokens as every tower has positions if they are fewer."""
    return min(capped(module, max_len) for module in towers(model))


def make_trainable(model: SentenceTransformer) -> None:
    """Settle what a model leaves to its user: lengths and width."""
    for module in towers(model):
        limit, longest = positions(module), longest_input(module)
        # sentence-transformers cuts at the positions that it knows of.
        known = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        is_too_long = longest is None or (longest > (limit or 0) and limit != known)
        if limit is not None and is_too_long:
            cast(Any, module).max_seq_length = limit
    for module in model.modules():
        fix_words(module)
    if model.truncate_dim is not None:
        log.warning("trained at its full width: the model cuts to %s", model.truncate_dim)
        model.truncate_dim = None


def dropout_settings(dropout: float | None, attention_dropout: float | None) -> dict[str, float]:
    """Return the configuration entries that set these shares; None leaves a model's own.

    Raises:
        InputError: A share is out of range.

    >>> dropout_settings(None, 0.0)["attention_dropout"]
    0.0
    """
    for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if share is not None and not 0 <= share < 1:
            raise InputError(f"model.{name}: expected a share from 0 to below 1, found {share}")
    attention = dropout if attention_dropout is None else attention_dropout
    settings = {} if dropout is None else dict.fromkeys(OTHER_DROPOUT, dropout)
    return settings | ({} if attention is None else dict.fromkeys(ATTENTION_DROPOUT, attention))
