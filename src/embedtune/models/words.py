"""Models that look words up: what their features lack, or have beside a transformer's."""

from collections.abc import Mapping
from typing import Any

from sentence_transformers.sentence_transformer.modules import (
    BoW,
    WordEmbeddings,
    WordWeights,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WordTokenizer
from torch import Tensor, nn

from embedtune.models.packing import TextFeatures
from embedtune.models.spec import Features


def as_tokens(module: nn.Module, features: Features, max_len: int) -> Features:
    """Return features as a transformer would have them, at most ``max_len`` tokens a text.

    Args:
        module: What made them.
        features: Of texts, padded on the right.
        max_len: Word embeddings do not cut texts themselves.
    """
    if isinstance(module, WordEmbeddings):
        del features["sentence_lengths"]
        return {k: v[:, :max_len] for k, v in features.items()}
    if isinstance(module, BoW):  # counts words at once: one token a text stands for them
        counts = features["sentence_embedding"]
        return {**features, "input_ids": counts.new_zeros(len(counts), 1).long()}
    return features


def with_lengths(module: nn.Module, features: Features) -> Features:
    """Return features with the number of tokens of each text where modules of words look for it."""
    if not isinstance(module, WordEmbeddings):
        return features
    return {**features, "sentence_lengths": features["attention_mask"].sum(dim=1)}


def no_tokens(module: nn.Module, tensors: Mapping[str, Tensor]) -> TextFeatures:
    """Return the features of a text without tokens, each ``[1]``.

    A transformer sees a token of padding, for of none it computes nothing. Of words that are not
    known, as of none, the embedding is zero.

    Args:
        module: What makes features of texts.
        tensors: Those of any text.
    """
    row = {name: tensor.new_zeros(1).numpy() for name, tensor in tensors.items()}
    if not isinstance(module, WordEmbeddings):
        row["input_ids"] += getattr(getattr(module, "tokenizer", None), "pad_token_id", None) or 0
        row["attention_mask"] += 1
    return row


def known_words(module: nn.Module, count: int = 20) -> list[str]:
    """Return some of the words that are looked up whole, the only ones known; none elsewhere."""
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, WordTokenizer):
        return []
    words: Any = getattr(tokenizer, "vocab", ())  # pieces of words know any text
    known = (word for word in words if tokenizer.tokenize(word))
    return [word for word, _ in zip(known, range(count), strict=False)]


def fix_words(module: nn.Module) -> None:
    """Leave as it is what training would change and a folder would not keep, or should not.

    Weights of words are made from a configuration at each load. The embedding of padding stays
    zero: a convolution sees it beside a text.
    """
    if isinstance(module, WordWeights):
        module.requires_grad_(False)
    if isinstance(module, WordEmbeddings) and not module.emb_layer.weight[0].any():
        module.emb_layer.padding_idx = 0
