"""Rebuild the encoder of a training checkpoint, and export it."""

from pathlib import Path

from torch import Tensor

from embedtune.checkpoints.read import read_checkpoint, read_facts
from embedtune.checkpoints.training_facts import TrainingFacts
from embedtune.errors import InputError
from embedtune.export.folder import export_encoder
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec


def rebuild(spec: EncoderSpec, weights: dict[str, Tensor], origin: str) -> Encoder:
    """Build the encoder that ``spec`` describes with the given weights.

    Raises:
        InputError: A weight is missing, unknown or of another shape, as placeholders are; the
            message names ``origin``.
    """
    encoder = Encoder(spec)
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{origin}: weights do not fit {spec.model_name_or_path}: {name}: expected "
                f"{expected.get(name, 'none')}, found {found.get(name, 'none')}"
            )
    encoder.load_state_dict(weights)
    return encoder


def export_checkpoint(checkpoint: Path, folder: Path) -> float:
    """Rebuild the encoder of a training checkpoint and export it.

    Args:
        checkpoint: A checkpoint of a fit under any strategy: a file, or a folder of shards.
        folder: Where the sentence-transformers folder goes.

    Returns:
        The largest difference found, as of :func:`export_encoder`.

    Raises:
        InputError: Not a checkpoint of embedtune, or its weights are incomplete.
    """
    spec, weights = read_checkpoint(Path(checkpoint))
    found = read_facts(Path(checkpoint)).get("training_facts")  # older checkpoints have none
    facts = TrainingFacts(**found) if found else None
    return export_encoder(rebuild(spec, weights, str(checkpoint)), folder, facts=facts)
