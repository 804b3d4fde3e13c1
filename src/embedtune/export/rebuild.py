"""Rebuild the encoder of a training checkpoint, and export it."""

from pathlib import Path

import torch
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
    base = encoder.state_dict()
    encoder.load_state_dict(
        {k: base[k] if _is_rounded(base[k], v) else v for k, v in weights.items()}
    )
    return encoder


def _is_rounded(base: Tensor, weight: Tensor) -> bool:
    """Tell whether a weight is the base model's, in the half precision that ZeRO computes with.

    It keeps no other of what is frozen.
    """
    is_half = weight.dtype != base.dtype and weight.is_floating_point()
    return is_half and torch.equal(base.to(weight.dtype), weight)


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    trust_remote_code: bool = False,
    model_name_or_path: str | None = None,
) -> float:
    """Rebuild the encoder of a training checkpoint and export it.

    Args:
        checkpoint: A checkpoint of a fit under any strategy: a file, or a folder of shards.
        folder: Where the sentence-transformers folder goes.
        trust_remote_code: Run code that the base model brings along; a checkpoint cannot allow
            that itself.
        model_name_or_path: Where the base model is now; the default is what the checkpoint says.

    Returns:
        The largest difference found, as of :func:`export_encoder`.

    Raises:
        InputError: Not a checkpoint of embedtune, its weights are incomplete, its base model is not
            found, or wants to run code.
    """
    checkpoint = Path(checkpoint)
    spec, weights = read_checkpoint(checkpoint)
    if spec.trust_remote_code and not trust_remote_code:
        raise InputError(
            f"{checkpoint}: its base model {spec.model_name_or_path} brings code along; if you "
            "trust it, give --trust_remote_code true"
        )
    base = model_name_or_path or _find_base(spec, checkpoint)
    found = read_facts(checkpoint).get("training_facts")  # older checkpoints have none
    facts = TrainingFacts(**found) if found else None
    rebuilt = rebuild(spec._replace(model_name_or_path=base), weights, str(checkpoint))
    return export_encoder(rebuilt, folder, facts=facts)


def _find_base(spec: EncoderSpec, checkpoint: Path) -> str:
    base = Path(spec.model_name_or_path)
    if not base.is_absolute() or base.is_dir():
        return spec.model_name_or_path
    # Run folder and base may have moved together; checkpoints lie in a folder of the run folder.
    moved = checkpoint.resolve().parent.parent / (spec.from_run_folder or base)
    if moved.is_dir():
        return str(moved.resolve())
    raise InputError(
        f"{checkpoint}: its base model is not at {base}: say with --model_name_or_path where it is"
    )
