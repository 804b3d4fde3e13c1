"""What rebuilds an encoder's structure, and the words for what goes through it."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")
Features = dict[str, Any]
"""Token features of one or more texts as sentence-transformers' modules pass them on."""


class EncoderSpec(NamedTuple):
    """What rebuilds an encoder's structure, so that a checkpoint holds weights alone.

    Attributes:
        model_name_or_path: The base model: a hub's name, or a folder.
        query_prompt: Instead of the base model's own; empty for none.
        document_prompt: The same for documents.
        similarity: By sentence-transformers' names, instead of the base model's own.
        tokenizers: Digest of the base model's own (``models.tokenizer_state``), by which another
            base is known.
        structure: The same of its modules, prompts and similarity (``models.structure``).
        from_run_folder: Such a folder as it is seen from the run folder of a checkpoint; None where
            there is no checkpoint, or the base is the hub's.
    """

    model_name_or_path: str
    pooling: PoolingMode | None = None
    trust_remote_code: bool = False
    projection_dim: int | None = None
    max_seq_length: int | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    similarity: str | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    tokenizers: str | None = None
    structure: str | None = None
    from_run_folder: str | None = None

    @property
    def as_loaded(self) -> "EncoderSpec":
        """The same without what is added to the base model once it is loaded."""
        return self._replace(
            projection_dim=None,
            max_seq_length=None,
            query_prompt=None,
            document_prompt=None,
            similarity=None,
        )

    def prompt(self, role: Role) -> str | None:
        """Return the prompt for queries or documents, None where it is the base model's own."""
        return self.query_prompt if role == "query" else self.document_prompt

    def with_prompt(self, role: Role, prompt: str) -> "EncoderSpec":
        """Return the same with another prompt."""
        if role == "query":
            return self._replace(query_prompt=prompt)
        return self._replace(document_prompt=prompt)

    def kept_in(self, run_folder: Path) -> "EncoderSpec":
        """Return what a checkpoint keeps, so that any working folder finds a local base model."""
        base = Path(self.model_name_or_path)
        if not base.is_dir():
            return self
        try:
            seen = Path(os.path.relpath(base, run_folder)).as_posix()
        except ValueError:  # on another drive of Windows
            seen = None
        return self._replace(model_name_or_path=str(base.absolute()), from_run_folder=seen)
