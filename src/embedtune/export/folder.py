"""Write a sentence-transformers folder, and prove that it is the model that was trained."""

import shutil
from pathlib import Path

import torch
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from embedtune.checkpoints.training_facts import TrainingFacts
from embedtune.errors import ExportError, InputError
from embedtune.export.model_card import write_model_card
from embedtune.export.probes import embed_exported, embed_probes, largest_difference
from embedtune.models.encoder import Encoder
from embedtune.whole_files import naming

UNVERIFIED = "UNVERIFIED"
"""File that marks an exported folder whose embeddings are not those of the training graph."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest absolute value of the embeddings."""

LOOSE_TOLERANCE = 0.1
"""The same for a model in training that computes in half precision or on another device: it tells
missing, misplaced or stale weights from rounding."""


def export_encoder(
    encoder: Encoder,
    folder: Path,
    trained: Tensor | None = None,
    tolerance: float = TOLERANCE,
    facts: TrainingFacts | None = None,
) -> float:
    """Write ``encoder`` to ``folder`` and compare what the reloaded folder computes.

    Args:
        encoder: The trained encoder; it is left in eval mode, on the CPU.
        folder: An existing export there is replaced.
        trained: What :func:`embed_probes` found in the training graph that ``encoder`` was rebuilt
            from; the default takes ``encoder`` itself for it.
        tolerance: Of the comparison with ``trained``.
        facts: What the model card tells of the training; None leaves that out.

    Returns:
        The largest difference, relative to the largest absolute value.

    Raises:
        ExportError: A difference is above its tolerance; the folder stays, marked unverified.
        InputError: ``folder`` holds something else than an exported model.
    """
    folder = Path(folder)
    is_replaceable = (folder / "modules.json").is_file() or (folder / UNVERIFIED).is_file()
    if folder.exists() and not is_replaceable and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected no folder or an exported model, found something else")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The mark comes first and goes last: a folder half written is never taken for a good one.
    (folder / UNVERIFIED).write_text("The embeddings of this folder have not been compared.\n")
    encoder = encoder.cpu().eval()
    model = encoder.model
    if encoder.normalizes:
        model.append(Normalize())
    try:
        with naming(folder):
            model.save_pretrained(str(folder), safe_serialization=True, create_model_card=False)
    finally:
        if encoder.normalizes:
            del model[-1]
    write_model_card(folder, encoder, facts)
    exported = embed_exported(folder, encoder.spec.trust_remote_code)
    rebuilt = embed_probes(encoder, lambda chunks: torch.cat([encoder(c) for c in chunks]))
    difference = largest_difference(exported, rebuilt)
    _verify(folder, difference, TOLERANCE)
    if trained is not None:
        _verify(folder, largest_difference(exported, trained), tolerance)
    (folder / UNVERIFIED).unlink()
    return difference


def _verify(folder: Path, difference: float, tolerance: float) -> None:
    if difference <= tolerance:  # false of nan
        return
    message = (
        f"{folder}: embeddings differ from those of the training graph by {difference:.1e} of "
        f"the largest value, expected at most {tolerance:.0e}; it is marked {UNVERIFIED}"
    )
    (folder / UNVERIFIED).write_text(message + "\n")
    raise ExportError(message)
