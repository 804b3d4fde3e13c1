"""What rebuilds an encoder's structure, and the words for what goes through it."""

from typing import Any, Literal, NamedTuple

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Role = Literal["query", "document"]
Features = dict[str, Any]
"""Token features of one or more texts as sentence-transformers' modules pass them on."""


class EncoderSpec(NamedTuple):
    """What rebuilds an encoder's structure, so that a checkpoint holds weights alone."""

    model_name_or_path: str
    pooling: PoolingMode | None = None
    trust_remote_code: bool = False
    projection_dim: int | None = None
    max_seq_length: int | None = None
    query_prompt: str | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
