"""Write a sentence-transformers folder, and prove that it is the model that was trained."""

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from embedtune.batch import Text, make_chunks
from embedtune.encoder import UNLIMITED, Encoder, EncoderSpec, load_sentence_transformer
from embedtune.errors import InputError
from embedtune.module import EmbeddingModule

log = logging.getLogger("embedtune")

UNVERIFIED = "UNVERIFIED"
"""File that marks an exported folder whose embeddings are not those of the training graph."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest absolute value of the embeddings."""

PROBES = (
    "probe",
    "How do I reset the password of my account?",
    "A model that was exported answers as the model that was trained.",
    "UPPER case, digits 0123456789, and punctuation: (a) [b] {c} <d> #e @f ~g!",
    "Straße, naïve café, Ελληνικά, русский текст, 中文文本, 日本語のテキスト, 한국어, العربية",
    "  white space at both ends,\ttabs\nand line breaks  ",
    "A text that is longer than the longest input of most encoders. " * 120,
)


class ExportError(RuntimeError):
    """An exported folder does not give the embeddings of the model that was trained."""


def export_encoder(encoder: Encoder, folder: Path) -> float:
    """Write ``encoder`` to ``folder`` and compare what the reloaded folder computes.

    Args:
        encoder: The trained encoder; it is left in eval mode, on the CPU.
        folder: An existing export there is replaced.

    Returns:
        The largest difference, relative to the largest absolute value.

    Raises:
        ExportError: The difference is above ``TOLERANCE``; the folder stays, marked unverified.
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
        model.save_pretrained(str(folder), safe_serialization=True)
    finally:
        if encoder.normalizes:
            del model[-1]
    difference = largest_difference(encoder, folder)
    if not difference <= TOLERANCE:  # also true of nan
        message = (
            f"{folder}: embeddings differ from those of the training graph by {difference:.1e} of "
            f"the largest value, expected at most {TOLERANCE:.0e}; it is marked {UNVERIFIED}"
        )
        (folder / UNVERIFIED).write_text(message + "\n")
        raise ExportError(message)
    (folder / UNVERIFIED).unlink()
    return difference


def largest_difference(encoder: Encoder, folder: Path) -> float:
    """Compare the training graph with the reloaded folder on probe texts, in float32.

    Queries and documents are compared, each with its prompt, at the longest input.
    """
    exported = load_sentence_transformer(
        str(folder), trust_remote_code=encoder.spec.trust_remote_code, device="cpu"
    )
    worst = 0.0
    with torch.autocast("cpu", enabled=False):
        for encode, role in (
            (exported.encode_query, "query"),
            (exported.encode_document, "document"),
        ):
            found = encode(list(PROBES), convert_to_tensor=True, show_progress_bar=False).float()
            expected = _training_embeddings(encoder, role)
            if found.shape != expected.shape:
                return float("inf")
            scale = expected.abs().max()
            worst = max(
                worst, ((found - expected).abs().max() / scale).nan_to_num(torch.inf).item()
            )
    return worst


@torch.no_grad()
def _training_embeddings(encoder: Encoder, role: Any) -> Tensor:
    max_len = encoder.max_seq_length or UNLIMITED
    prompt = encoder.default_prompt(role)
    texts = [Text(text, role, prompt, max_len) for text in PROBES]
    chunks, order = make_chunks(encoder, texts, tokens_per_chunk=8192)
    embeddings = torch.cat([encoder(features) for features in chunks])[order]
    return torch.nn.functional.normalize(embeddings, dim=-1) if encoder.normalizes else embeddings


def export_checkpoint(checkpoint: Path, folder: Path) -> float:
    """Rebuild the encoder of a training checkpoint and export it.

    Args:
        checkpoint: A ``.ckpt`` file of a fit.
        folder: Where the sentence-transformers folder goes.

    Returns:
        The largest difference found, as of :func:`export_encoder`.

    Raises:
        InputError: Not a checkpoint of embedtune, or its weights are incomplete.
    """
    if not Path(checkpoint).is_file():
        raise InputError(f"{checkpoint}: expected a checkpoint file, found none")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        spec = EncoderSpec(**content["encoder_spec"])
    except Exception as error:
        raise InputError(
            f"{checkpoint}: expected a checkpoint of embedtune fit: {error}"
        ) from error
    encoder = Encoder(spec)
    weights = {
        name.removeprefix("encoder."): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith("encoder.")
    }
    missing = encoder.load_state_dict(weights, strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise InputError(f"{checkpoint}: weights do not fit {spec.model_name_or_path}: {missing}")
    return export_encoder(encoder, folder)


class ExportModel(pl.Callback):
    """Export at the end of every epoch and of the fit.

    ``<default_root_dir>/model`` is the final model; ``checkpoints/epoch-1``, ``epoch-2``, .. are
    those of the epochs.
    """

    def __init__(self, save_on_epoch_end: bool = True, num_max_checkpoints: int = 5) -> None:
        """Describe what is written.

        Args:
            save_on_epoch_end: Write an exported folder an epoch.
            num_max_checkpoints: Epochs' folders that are kept, the last ones.
        """
        if num_max_checkpoints < 1:
            raise InputError(
                f"num_max_checkpoints: expected at least 1, found {num_max_checkpoints}"
            )
        self.save_on_epoch_end, self.num_max_checkpoints = save_on_epoch_end, num_max_checkpoints

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the epoch, and delete the folder that is one too many."""
        if not self.save_on_epoch_end or not trainer.is_global_zero:
            return
        epochs = Path(trainer.default_root_dir) / "checkpoints"
        self._export(pl_module, epochs / f"epoch-{trainer.current_epoch + 1}")
        oldest = trainer.current_epoch + 1 - self.num_max_checkpoints
        if oldest >= 1:
            shutil.rmtree(epochs / f"epoch-{oldest}", ignore_errors=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the final model."""
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run:
            self._export(pl_module, Path(trainer.default_root_dir) / "model")

    def _export(self, module: pl.LightningModule, folder: Path) -> None:
        assert isinstance(module, EmbeddingModule)
        device, training = module.device, module.encoder.training
        difference = export_encoder(module.encoder, folder)
        module.encoder.to(device).train(training)
        log.info("exported and verified %s (largest difference %.1e)", folder, difference)
