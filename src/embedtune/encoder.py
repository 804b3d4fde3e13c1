"""A sentence-transformers model as a trainable encoder with an optional Matryoshka projection."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from embedtune.errors import InputError

log = logging.getLogger("embedtune")

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Role = Literal["query", "document"]
Features = dict[str, Any]
"""Token features of one or more texts as sentence-transformers' modules pass them on."""

UNLIMITED = 10**9
"""More tokens than any input has; tokenizers without a limit report about 1e30."""


class EncoderSpec(NamedTuple):
    """What rebuilds an encoder's structure, so that a checkpoint holds weights alone."""

    model_name_or_path: str
    pooling: PoolingMode | None = None
    trust_remote_code: bool = False
    projection_dim: int | None = None
    max_seq_length: int | None = None
    query_prompt: str | None = None


def load_sentence_transformer(
    model_name_or_path: str, *, trust_remote_code: bool = False, device: str | None = None
) -> SentenceTransformer:
    """Load a model in float32, whatever precision it was saved in.

    Raises:
        InputError: Nothing loadable is there.
    """
    path = Path(model_name_or_path)
    looks_like_path = path.is_absolute() or model_name_or_path.startswith((".", "~"))
    if not path.is_dir() and (looks_like_path or model_name_or_path.count("/") > 1):
        raise InputError(
            f"model_name_or_path: expected a model folder or a hub name, found no folder {path}"
        )
    try:
        return SentenceTransformer(
            model_name_or_path,
            device=device,
            trust_remote_code=trust_remote_code,
            # Optimiser steps below bfloat16's spacing would be lost without float32 weights.
            model_kwargs={"dtype": torch.float32},
            local_files_only=path.is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1",
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model_name_or_path: cannot load {model_name_or_path!r}: {reason}"
        ) from error


def max_positions(model: SentenceTransformer) -> int | None:
    """Return the longest input in tokens that the position embeddings allow; None is unlimited."""
    config = getattr(model[0], "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    # RoBERTa-like models number positions from padding_idx + 1 on.
    embeddings = getattr(getattr(model[0], "auto_model", None), "embeddings", None)
    offset = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return int(positions) - (0 if offset is None else offset + 1)


def cap_length(model: SentenceTransformer, max_len: int) -> int:
    """Return ``max_len``, or as many tokens as ``model`` has positions if they are fewer."""
    limit = max_positions(model)
    return max_len if limit is None else min(max_len, limit)


def make_trainable(model: SentenceTransformer) -> None:
    """Settle what a model leaves to its user: lengths, width and prompts, and what is trained."""
    limit = max_positions(model)
    if limit is not None and (model.max_seq_length or UNLIMITED) >= UNLIMITED:
        model.max_seq_length = limit
    if model.truncate_dim is not None:
        log.warning("trained at its full width: the model cuts to %s", model.truncate_dim)
        model.truncate_dim = None
    # ``encode_document`` would take an empty "document" prompt over one of another name.
    names = ("document", "passage", "corpus")
    prompts = [model.prompts[name] for name in names if model.prompts.get(name)]
    if prompts:
        model.prompts["document"] = prompts[0]
    # BERT's own pooler takes no part in the embedding: DDP would wait for its gradients.
    pooler = getattr(getattr(model[0], "auto_model", None), "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


class Encoder(nn.Module):
    """Map token features to embeddings ``[b, d]``.

    The modules are those of the sentence-transformers model, in its order, except that a trailing
    ``Normalize`` is taken off (every loss normalises the width that it looks at) and put back on
    export.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        """Build what ``spec`` describes.

        Raises:
            InputError: The model cannot be loaded, or does not end in one embedding a text.
        """
        super().__init__()
        self.spec = spec
        self.model = load_sentence_transformer(
            spec.model_name_or_path, trust_remote_code=spec.trust_remote_code, device="cpu"
        )
        make_trainable(self.model)
        if spec.pooling is not None:
            self._set_pooling(spec.pooling)
        self.normalizes = isinstance(self.model[-1], Normalize)
        if self.normalizes:
            del self.model[-1]
        if self.model.get_embedding_dimension() is None:
            raise InputError(
                f"model_name_or_path: {spec.model_name_or_path!r} does not tell its embedding "
                "width; give model.pooling for a bare transformers checkpoint"
            )
        if spec.projection_dim is not None:
            self.append_projection(spec.projection_dim)
        if spec.max_seq_length is not None:
            self.raise_max_seq_length(spec.max_seq_length)
        if spec.query_prompt is not None:
            self.set_query_prompt(spec.query_prompt)

    def _set_pooling(self, mode: PoolingMode) -> None:
        transformer: Any = self.model[0]
        pooling = Pooling(transformer.get_embedding_dimension(), mode)
        for position, module in enumerate(self.model):
            if isinstance(module, Pooling):
                pooling.include_prompt = module.include_prompt
                self.model[position] = pooling
                return
        self.model.insert(1, pooling)

    # --- Structure ----------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        width = self.model.get_embedding_dimension()
        assert width is not None, "checked when the encoder is built"
        return width

    @property
    def dense(self) -> Dense | None:
        """The projection, where the model ends in one."""
        last = self.model[-1]
        return last if isinstance(last, Dense) else None

    def append_projection(self, width: int) -> Dense:
        """Append ``Dense(self.width, width)`` with torch's default (random) weights."""
        dense = Dense(self.width, width, bias=True, activation_function=nn.Identity())
        self.model.append(dense)
        self.spec = self.spec._replace(projection_dim=width)
        return dense

    @property
    def max_seq_length(self) -> int | None:
        """Longest input in tokens that ``encode`` takes before it truncates; None is unlimited."""
        length = self.model.max_seq_length
        return None if length is None or length > UNLIMITED else int(length)

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens that the position embeddings allow; None is unlimited."""
        return max_positions(self.model)

    def cap(self, max_len: int) -> int:
        """Return ``max_len``, or as many tokens as there are positions if they are fewer."""
        return cap_length(self.model, max_len)

    def raise_max_seq_length(self, length: int) -> None:
        """Let ``encode`` take inputs as long as those trained on; never shortens."""
        known = self.max_seq_length
        if known is not None and length > known:
            self.model.max_seq_length = length
        self.spec = self.spec._replace(max_seq_length=length)

    def set_query_prompt(self, prompt: str) -> None:
        """Make ``prompt`` the model's own query prompt, as exported."""
        self.model.prompts["query"] = prompt
        self.spec = self.spec._replace(query_prompt=prompt)

    @property
    def block_classes(self) -> set[type[nn.Module]]:
        """Classes of the transformer's layers: what FSDP gathers and frees as a whole."""
        transformer: nn.Module = getattr(self.model[0], "auto_model", self.model[0])
        names = getattr(transformer, "_no_split_modules", None) or ()
        found = {type(m) for m in transformer.modules() if type(m).__name__ in names}
        lists = [m for m in transformer.modules() if isinstance(m, nn.ModuleList) and len(m)]
        if found or not lists:
            return found
        # Some architectures declare none.
        largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
        return {type(largest[0])}

    # --- Text to features ---------------------------------------------------------------

    def default_prompt(self, role: Role) -> str | None:
        """Return the model's own prompt for queries or documents, None where it has none."""
        return self.model.prompts.get(role) or None

    def tokenize(
        self, texts: Sequence[str], role: Role, prompt: str | None, max_len: int
    ) -> Features:
        """Tokenise as the model itself does, padded to the longest text.

        Args:
            texts: Texts without their prompt.
            role: Tells an asymmetric model (a Router) which route to take.
            prompt: Prepended to each text; None for none.
            max_len: Longest input in tokens, prompt and special tokens included.
        """
        features = self.model.preprocess(list(texts), prompt=prompt, max_length=max_len, task=role)
        if any(isinstance(module, Router) for module in self.model):
            features["task"] = role
        if all(module.include_prompt for module in self.model if isinstance(module, Pooling)):
            features.pop("prompt_length", None)
        return dict(features)

    def pad(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad single texts' features, each tensor ``[t]``, to one batch ``[n, longest]``."""
        # The tokenizer's own pad, which knows the padding side, token and token type.
        return dict(
            self.model.tokenizer.pad(
                {k: [r[k] for r in rows] for k in rows[0]}, return_tensors="pt"
            )
        )

    # --- Features to embeddings ---------------------------------------------------------

    def forward(self, features: Features) -> Tensor:
        """Return the embeddings ``[b, width]``, float32, not normalised."""
        features = self.model[0](dict(features))
        for name in ("token_embeddings", "sentence_embedding"):
            if name in features:
                features[name] = features[name].float()
        # Pooling and projection are cheap, and lose digits in half precision.
        device_type = next(self.parameters()).device.type
        with torch.autocast(device_type, enabled=False):
            for module in list(self.model)[1:]:
                # Sharded strategies hold a projection in half precision.
                weight = next(module.parameters(), None)
                if weight is not None and "sentence_embedding" in features:
                    embedding = features["sentence_embedding"].to(weight.dtype)
                    features["sentence_embedding"] = embedding
                features = module(features)
        return features["sentence_embedding"].float()
