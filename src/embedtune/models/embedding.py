"""Use a trained model in a few words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedtune.errors import require_positive
from embedtune.models.loading import cap_length, load_sentence_transformer, refuse_filled
from embedtune.models.towers import cutting_at, towers

PROGRESS_BATCHES = 20
"""Batches from which on a progress bar is shown."""


class Embedding:
    """An exported folder, or any sentence-transformers model, that encodes lists of texts."""

    def __init__(self, model_name_or_path: str | Path, trust_remote_code: bool = False) -> None:
        """Load a model in float32.

        Raises:
            InputError: Nothing loadable is there.
        """
        self.model = load_sentence_transformer(
            str(model_name_or_path), trust_remote_code=trust_remote_code
        )

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, trust_remote_code: bool = False
    ) -> Self:
        """Load a model, by the name that users of transformers look for."""
        return cls(model_name_or_path, trust_remote_code)

    def to(self, device: str | torch.device) -> Self:
        """Move the model to a device and return it."""
        self.model.to(device)
        return self

    def encode(
        self,
        texts: str | Sequence[str],
        device: str | None = None,
        prompt: str = "",
        max_len: int = 512,
        batch_size: int = 64,
    ) -> Tensor:
        """Encode texts without gradients.

        Args:
            texts: Any number of texts, or one.
            device: Where to encode; None leaves the model where it is.
            prompt: Prepended to each text; empty for none.
            max_len: Longest input in tokens, prompt included.
            batch_size: Texts that are encoded at once.

        Returns:
            float32 ``[n, d]`` on the CPU, in the order of ``texts``; ``[d]`` for one text.

        Raises:
            InputError: A number is below 1, or the prompt leaves no room for a text.
        """
        require_positive("batch_size", batch_size)
        require_positive("max_len", max_len)
        if isinstance(texts, str):
            return self.encode([texts], device, prompt, max_len, batch_size)[0]
        if len(texts) == 0:  # an array of numpy has no truth
            return torch.empty(0, int(self.model.get_embedding_dimension() or 0))
        longest = cap_length(self.model, max_len)
        refuse_filled(self.model, prompt, longest)
        with cutting_at(towers(self.model), longest):
            embeddings = self.model.encode(
                with_tokens(self.model, texts, prompt),
                prompt=prompt,
                batch_size=batch_size,
                device=device,
                convert_to_tensor=True,
                show_progress_bar=len(texts) > PROGRESS_BATCHES * batch_size,
                processing_kwargs={"text": {"max_length": longest}},
            )
        return embeddings.float().cpu().clone()


def with_tokens(model: SentenceTransformer, texts: Sequence[str], prompt: str | None) -> list[str]:
    """Return texts that have a token each: as in training, of none is made one of padding.

    A tokenizer that adds no tokens of its own makes none of an empty text, and models compute
    nothing where all texts of a batch are such.

    Args:
        model: It will encode them.
        texts: Any texts.
        prompt: What will be prepended to each.
    """
    padding = getattr(model.tokenizer, "pad_token", None)
    blank = {text for text in texts if not text.strip()}
    if padding is None or prompt or not blank:
        return list(texts)
    empty = {text for text in blank if model.preprocess([text])["input_ids"].shape[-1] == 0}
    return [padding if text in empty else text for text in texts]
