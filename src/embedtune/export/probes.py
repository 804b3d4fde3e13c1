"""Embed a few texts by the training graph and by an exported folder, and compare.

Texts are embedded one at a time: padding would shift rotary positions, by thousands beside a long
text, and the embeddings by more than rounding.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedtune.data.chunks import Text, make_chunks
from embedtune.models.encoder import Encoder
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.spec import ROLES, Features, Role
from embedtune.models.towers import tower
from embedtune.models.words import known_words

PROBES = (
    "probe",
    "How do I reset the password of my account?",
    "A model that was exported answers as the model that was trained.",
    "UPPER case, digits 0123456789, and punctuation: (a) [b] {c} <d> #e @f ~g!",
    "Straße, naïve café, Ελληνικά, русский текст, 中文文本, 日本語のテキスト, 한국어, العربية",
    "  white space at both ends,\ttabs\nand line breaks  ",
    "A text that is longer than the longest input of most encoders. " * 120,
)


def probes_of(model: SentenceTransformer, role: Role) -> list[str]:
    """Return the probe texts of a model: of one that looks words up, a text of these, too."""
    words = known_words(tower(model, role))
    return [*PROBES, " ".join(words)] if words else list(PROBES)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two sets of embeddings, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    scale = expected.abs().max()
    return ((found - expected).abs().max() / scale).nan_to_num(torch.inf).item()


def embed_exported(folder: Path, trust_remote_code: bool) -> Tensor:
    """Embed the probe texts with the reloaded folder, in float32, as queries and as documents."""
    model = load_sentence_transformer(
        str(folder), trust_remote_code=trust_remote_code, device="cpu"
    )
    with torch.autocast("cpu", enabled=False):
        found = []
        for role, encode in zip(ROLES, (model.encode_query, model.encode_document), strict=True):
            texts = probes_of(model, role)
            embeddings = encode(
                texts, batch_size=1, convert_to_tensor=True, show_progress_bar=False
            )
            found.append(embeddings.float())
    return torch.cat(found)


@torch.no_grad()
def embed_probes(encoder: Encoder, forward: Callable[[list[Features]], Tensor]) -> Tensor:
    """Embed the probe texts at the longest input, as queries and then as documents, on the CPU.

    Args:
        encoder: Tells how texts are tokenised; its weights are not touched.
        forward: Embeds chunks of token features, one text each, ``[n, width]``.
    """
    chunks = [
        chunk
        for role in ROLES
        for text in probes_of(encoder.model, role)
        for chunk in make_chunks(
            encoder,
            [Text(text, role, encoder.default_prompt(role), encoder.longest(role))],
            tokens_per_chunk=1,
        )[0]
    ]
    embeddings = forward(chunks).float().cpu()
    return torch.nn.functional.normalize(embeddings, dim=-1) if encoder.normalizes else embeddings
