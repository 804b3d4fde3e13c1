"""Write a sentence-transformers folder, and prove that it is the model that was trained."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from embedtune.checkpoints.training_facts import TrainingFacts
from embedtune.digests import DIGESTS, write_digests, written_names
from embedtune.errors import ExportError, InputError
from embedtune.export.model_card import write_model_card
from embedtune.export.probes import embed_exported, embed_probes, largest_difference
from embedtune.models.encoder import Encoder
from embedtune.models.tokenizer_state import restore_tokenizers
from embedtune.whole_files import bring_back, put, refuse_in_the_way, writing

UNVERIFIED = "UNVERIFIED"
"""File that marks an exported folder whose embeddings are not those of the training graph."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest absolute value of the embeddings."""

LOOSE_TOLERANCE = 0.1
"""The same for a model in training that computes in half precision or on another device: it tells
missing, misplaced or stale weights from rounding."""

SUFFIX = ".unverified"
"""Added to the name of a folder that differs, where a good one has that name."""


def export_encoder(
    encoder: Encoder,
    folder: Path,
    trained: Tensor | None = None,
    tolerance: float = TOLERANCE,
    facts: TrainingFacts | None = None,
) -> float:
    """Write ``encoder`` to ``folder`` and compare what the reloaded folder computes.

    It is written and compared beside ``folder``, and takes its place when it has proven itself:
    whatever fails, a former export there stays as it was.

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
        ExportError: A difference is above its tolerance: what was written is kept and marked, as
            ``folder``, or beside it where that is a verified export. Or it cannot be written.
        InputError: ``folder`` is not to be replaced (:func:`refuse_to_replace`).
    """
    folder = Path(folder)
    refuse_to_replace(folder, encoder.spec.model_name_or_path)
    bring_back(folder)
    encoder = encoder.cpu().eval()
    try:
        with writing(folder) as part:
            _write(part, encoder, facts)
            rebuilt = embed_probes(encoder, lambda chunks: torch.cat([encoder(c) for c in chunks]))
            exported = _embed_exported(part, folder, encoder.spec.trust_remote_code)
            difference = largest_difference(exported, rebuilt)
            _verify(part, folder, difference, TOLERANCE)
            if trained is not None:
                _verify(part, folder, largest_difference(exported, trained), tolerance)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{folder}: cannot be written: {reason}") from error
    return difference


def is_verified(folder: Path) -> bool:
    """Tell whether a folder is an export that has proven itself."""
    return (folder / "modules.json").is_file() and not (folder / UNVERIFIED).exists()


def refuse_to_replace(folder: Path, base: str) -> None:
    """Refuse a place for an export where something would be lost.

    Args:
        folder: Where it would go: nothing may be there, or what an export of embedtune has written.
        base: The model that was trained, which nobody may have anywhere else.

    Raises:
        InputError: It names what would be lost, or is in the way.
    """
    if folder.name in ("", ".."):
        raise InputError(f"expected the name of a folder to export to, found {str(folder)!r}")
    refuse_in_the_way(folder, f"{folder}: expected no folder or an exported model")
    if os.path.ismount(folder):  # which no other folder can take the place of
        raise InputError(f"{folder}: expected no folder or one to replace, found a mounted one")
    if Path(base).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: expected another folder than the base model's, found {base}")
    written = written_names(folder) | {UNVERIFIED}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in written and (path.is_symlink() or not path.is_dir()):
            found = f"{name}, which embedtune has not written"
            if DIGESTS not in written:
                found = f"something else: it has no {DIGESTS}"
            raise InputError(
                f"{folder}: expected no folder or an exported model, found {found}; "
                "move it, or give another folder"
            )


def _write(folder: Path, encoder: Encoder, facts: TrainingFacts | None) -> None:
    model = encoder.model
    restore_tokenizers(model)  # other runtimes obey what is left of the last call
    if encoder.normalizes:
        model.append(Normalize())
    try:
        model.save_pretrained(str(folder), safe_serialization=True, create_model_card=False)
    finally:
        if encoder.normalizes:
            del model[-1]
    for code in folder.glob("*/*.py"):
        # sentence-transformers writes it beside a module's weights, and looks for it here.
        shutil.copy(code, folder)
    write_model_card(folder, encoder, facts)
    weights = sorted(folder.rglob("*.safetensors"))
    others = (path for path in sorted(folder.rglob("*")) if path.is_file())
    # Of weights alone: what people edit, such as the card, is theirs.
    write_digests(folder, weights, (path for path in others if path not in weights))


def _embed_exported(part: Path, folder: Path, trust_remote_code: bool) -> Tensor:
    try:
        return embed_exported(part, trust_remote_code)
    except (InputError, OSError, SafetensorError) as error:
        raise _unverified(part, folder, f"cannot be loaded again: {error}") from error


def _verify(part: Path, folder: Path, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # true of nan
        reason = (
            f"embeddings differ from those of the training graph by {difference:.1e} of the "
            f"largest value, expected at most {tolerance:.0e}"
        )
        raise _unverified(part, folder, reason)


def _unverified(part: Path, folder: Path, reason: str) -> ExportError:
    """Keep what was written at ``part``, marked; return the error that says where it is, and why.

    A verified export at ``folder`` is not touched.
    """
    kept, note = folder, f"it is marked {UNVERIFIED}"
    if is_verified(folder):
        kept = folder.with_name(folder.name + SUFFIX)
        note = f"it is kept as {kept}, marked {UNVERIFIED}, beside the former export"
    message = f"{folder}: {reason}; {note}"
    (part / UNVERIFIED).write_text(message + "\n", encoding="utf-8")
    put(part, kept)
    return ExportError(message, reason)
