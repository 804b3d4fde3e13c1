"""Embed a few texts by the training graph and by an exported folder, and compare."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from embedtune.data.chunks import Text, make_chunks
from embedtune.models.encoder import Encoder
from embedtune.models.loading import UNLIMITED, load_sentence_transformer
from embedtune.models.spec import Features, Role

PROBES = (
    "probe",
    "How do I reset the password of my account?",
    "A model that was exported answers as the model that was trained.",
    "UPPER case, digits 0123456789, and punctuation: (a) [b] {c} <d> #e @f ~g!",
    "Straße, naïve café, Ελληνικά, русский текст, 中文文本, 日本語のテキスト, 한국어, العربية",
    "  white space at both ends,\ttabs\nand line breaks  ",
    "A text that is longer than the longest input of most encoders. " * 120,
)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two sets of embeddings, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max()
    return ((found - expected).abs().max() / scale).nan_to_num(torch.inf).item()


def embed_exported(folder: Path, trust_remote_code: bool) -> Tensor:
    """Embed the probe texts with the reloaded folder, in float32, as queries and as documents."""
    model = load_sentence_transformer(
        str(folder), trust_remote_code=trust_remote_code, device="cpu"
    )
    with torch.autocast("cpu", enabled=False):
        found = [
            encode(list(PROBES), convert_to_tensor=True, show_progress_bar=False).float()
            for encode in (model.encode_query, model.encode_document)
        ]
    return torch.cat(found)


@torch.no_grad()
def embed_probes(encoder: Encoder, forward: Callable[[list[Features]], Tensor]) -> Tensor:
    """Embed the probe texts at the longest input, as queries and then as documents, on the CPU.

    Args:
        encoder: Tells how texts are tokenised; its weights are not touched.
        forward: Embeds chunks of token features, ``[n, width]``.
    """
    roles: tuple[Role, Role] = ("query", "document")
    max_len = encoder.max_seq_length or UNLIMITED
    found = []
    for role in roles:
        texts = [Text(text, role, encoder.default_prompt(role), max_len) for text in PROBES]
        chunks, order = make_chunks(encoder, texts, tokens_per_chunk=8192)
        found.append(forward(chunks).float().cpu()[order])
    embeddings = torch.cat(found)
    return torch.nn.functional.normalize(embeddings, dim=-1) if encoder.normalizes else embeddings
