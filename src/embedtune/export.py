"""Write a sentence-transformers folder, and prove that it is the model that was trained."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from embedtune.batch import Text, make_chunks
from embedtune.checkpoint import read_checkpoint, read_facts
from embedtune.encoder import Encoder, EncoderSpec, Features, Role
from embedtune.errors import InputError
from embedtune.loading import UNLIMITED, load_sentence_transformer
from embedtune.model_card import TrainingFacts, training_facts, write_model_card
from embedtune.module import EmbeddingModule
from embedtune.strategies import FSDP, ZeRO, whole_weights

log = logging.getLogger("embedtune")

UNVERIFIED = "UNVERIFIED"
"""File that marks an exported folder whose embeddings are not those of the training graph."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest absolute value of the embeddings."""

LOOSE_TOLERANCE = 0.1
"""The same for a model in training that computes in half precision or on another device: it tells
missing, misplaced or stale weights from rounding."""

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


def export_running(trainer: pl.Trainer, module: EmbeddingModule, folder: Path) -> None:
    """Export the model of a running fit; all ranks must call it."""
    strategy, encoder = trainer.strategy, module.encoder
    training, facts = encoder.training, training_facts(trainer, module)
    # Attention that was asked for may be one that a CPU does not have.
    if isinstance(strategy, FSDP | ZeRO) or encoder.attn_implementation is not None:
        trained = _embed_probes_in_training(trainer, module)
        weights = whole_weights(strategy, encoder)
        if trainer.is_global_zero:
            exact = strategy.root_device.type == "cpu" and trainer.precision == "32-true"
            tolerance = TOLERANCE if exact else LOOSE_TOLERANCE
            whole = rebuild(encoder.spec, weights, "the weights of all ranks")
            difference = export_encoder(whole, folder, trained, tolerance, facts)
    elif trainer.is_global_zero:
        device = module.device
        difference = export_encoder(encoder, folder, facts=facts)
        encoder.to(device)
    module.train(training)
    if trainer.is_global_zero:
        log.info("exported and verified %s (largest difference %.1e)", folder, difference)
    strategy.barrier()


def _embed_probes_in_training(trainer: pl.Trainer, module: EmbeddingModule) -> Tensor:
    strategy = trainer.strategy

    def forward(chunks: list[Features]) -> Tensor:
        batch = module.transfer_batch_to_device(chunks, strategy.root_device, 0)
        # Through the wrapper, which gathers the parameters of every layer where they are sharded.
        with trainer.precision_plugin.val_step_context():
            return cast(Any, strategy.model)(batch)

    module.eval()
    return embed_probes(module.encoder, forward)


def best_keeper(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the callback that has kept the best checkpoint by a metric, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback
    return None


def describe_choice(trainer: pl.Trainer) -> str:
    """Return a sentence that says which model ``model/`` is."""
    keeper = best_keeper(trainer)
    if keeper is None:
        return (
            f"model/ is the model of the last step, {trainer.global_step:,}; checkpoint.monitor "
            "makes it the best by a metric of data.val_path"
        )
    step = read_facts(Path(keeper.best_model_path))["global_step"]
    score = float(cast(Tensor, keeper.best_model_score))
    return f"model/ is the model of step {step:,}, the best by {keeper.monitor} ({score:.4f})"


class ExportModel(pl.Callback):
    """Export at the end of every epoch and of the fit.

    ``<default_root_dir>/model`` is the best checkpoint where ``checkpoint.monitor`` tells which is,
    else the model of the last step; ``checkpoints/epoch-1``, ``epoch-2``, .. are those of the
    epochs.
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
        if not self.save_on_epoch_end:
            return
        epochs = Path(trainer.default_root_dir) / "checkpoints"
        number = trainer.current_epoch + 1
        export_running(trainer, cast(EmbeddingModule, pl_module), epochs / f"epoch-{number}")
        oldest = number - self.num_max_checkpoints
        if oldest >= 1 and trainer.is_global_zero:
            shutil.rmtree(epochs / f"epoch-{oldest}", ignore_errors=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the final model: the best checkpoint, or what the strategy still holds."""
        if cast(Any, trainer).fast_dev_run:
            return
        folder = Path(trainer.default_root_dir) / "model"
        keeper = best_keeper(trainer)
        if keeper is None:
            export_running(trainer, cast(EmbeddingModule, pl_module), folder)
        else:
            if trainer.is_global_zero:
                difference = export_checkpoint(Path(keeper.best_model_path), folder)
                log.info("exported and verified %s (largest difference %.1e)", folder, difference)
            trainer.strategy.barrier()
        if trainer.is_global_zero:
            log.info(describe_choice(trainer))
