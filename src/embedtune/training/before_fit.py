"""What is settled or refused before a fit, because it would fail or mislead later."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn

from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.digests import Hasher
from embedtune.distributed import FSDP, ZeRO, exchange
from embedtune.distributed.strategies import (
    describe_strategy,
    refuse_unsupported,
    shards_parameters,
)
from embedtune.errors import InputError
from embedtune.models.encoder import Encoder
from embedtune.models.loading import ATTENTION_DROPOUT, OTHER_DROPOUT
from embedtune.models.spec import Role
from embedtune.models.towers import backbones

log = logging.getLogger("embedtune")


FAR = 10
"""Times by which a given learning rate may be off."""
FEW_STEPS = 10
"""In fewer a schedule of the learning rate cannot rise and fall."""
MOST_SPECIAL = 8
"""Tokens that tokenizers add to a text, at most."""
AVERAGING = (StochasticWeightAveraging, WeightAveraging)
"""Callbacks that copy a module when a fit begins, and change its weights when it ends."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def refuse_what_fails_later(trainer: Any, module: Any) -> None:
    """Refuse what no command can do with a module.

    Args:
        trainer: The Trainer.
        module: Its :class:`~embedtune.training.module.EmbeddingModule`.

    Raises:
        InputError: It names the key.
    """
    refuse_unsupported(trainer)
    _refuse_average_of_parts(trainer)
    _refuse_two_accumulations(trainer)
    _refuse_other_data(trainer.datamodule)
    _refuse_another_precision(str(trainer.precision))
    _refuse_flash_in_float32(module.encoder, str(trainer.precision))
    _refuse_dropout(module.encoder)
    if module.compiles:
        _refuse_compilation(trainer.strategy)


def _refuse_dropout(encoder: Encoder) -> None:
    """Refuse a share to drop that a model has no place for, such as T5 for attention's alone.

    Raises:
        InputError: It names the key, and what a model's configuration may call it.
    """
    spec = encoder.spec
    configs = [backbone.config for backbone in backbones(encoder.model)]
    for key, share, names in (
        ("dropout", spec.dropout, (*OTHER_DROPOUT, *ATTENTION_DROPOUT)),
        ("attention_dropout", spec.attention_dropout, ATTENTION_DROPOUT),
    ):
        is_there = any(hasattr(config, name) for config in configs for name in names)
        if share is not None and not is_there:
            raise InputError(
                f"model.{key}: expected a model whose configuration has one of "
                f"{', '.join(names)}; {spec.model_name_or_path!r} has none"
            )


def _refuse_average_of_parts(trainer: Any) -> None:
    """Refuse to average what a rank does not hold as a whole, or DeepSpeed trains a copy of.

    Raises:
        InputError: A callback would, at the first validation or after the last step.
    """
    if trainer.state.fn != TrainerFn.FITTING or not isinstance(trainer.strategy, FSDP | ZeRO):
        return
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            raise InputError(
                f"callbacks: {type(callback).__name__} averages whole weights: expected "
                f"trainer.strategy ddp or one device, found {describe_strategy(trainer.strategy)}"
            )


def _refuse_two_accumulations(trainer: Any) -> None:
    """Refuse what Lightning's callback refuses in the first step.

    Raises:
        InputError: Both it and the Trainer say how many batches a step accumulates.
    """
    accumulated = trainer.accumulate_grad_batches
    has_scheduler = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)
    if trainer.state.fn == TrainerFn.FITTING and has_scheduler and accumulated != 1:
        raise InputError(
            "trainer.accumulate_grad_batches: expected 1 beside a GradientAccumulationScheduler, "
            f"found {accumulated}"
        )


def _refuse_another_precision(precision: str) -> None:
    """Refuse precisions whose weights are not float32.

    Steps below their spacing would be lost, and the export would not be the model that was trained.

    Raises:
        InputError: It is one.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: expected {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, in "
            f"which weights stay float32, found {precision}"
        )


def _refuse_compilation(strategy: Any) -> None:
    """Refuse to compile layers where that does not pay, or cannot be.

    Raises:
        InputError: It is on a CPU, or where parameters are divided.
    """
    if strategy.root_device.type != "cuda" or shards_parameters(strategy):
        raise InputError(
            "model.compile: expected false on a CPU (it takes minutes) and under FSDP and ZeRO-3, "
            "found true"
        )


def _refuse_other_data(data: Any) -> None:
    """Refuse to train or run a module on bare data loaders, or on another's data module.

    Raises:
        InputError: ``data`` of the Trainer is no EmbeddingDataModule.
    """
    if not isinstance(data, EmbeddingDataModule):
        found = "none" if data is None else type(data).__name__
        raise InputError(
            "Trainer: expected an EmbeddingDataModule beside the EmbeddingModule, as in "
            f"fit(module, EmbeddingDataModule('rows.jsonl')), found {found}"
        )


def refuse_another_base(encoder: Encoder, device: torch.device) -> None:
    """Refuse ranks that have loaded other weights than rank 0, such as from a disk of their own.

    FSDP takes from each rank its part, and would train what is no model of anybody's.

    Args:
        encoder: As it was loaded.
        device: That of the run.

    Raises:
        InputError: It names the first such rank; on every rank.
    """
    if not exchange.is_distributed():
        return
    hasher = Hasher()
    for name, weight in encoder.named_parameters():
        if weight.requires_grad:  # what no embedding is computed from, a rank may have drawn
            hasher.update(name.encode())
            values = weight.detach().cpu().contiguous().reshape(-1)
            hasher.update(values.view(torch.uint8).numpy().data)
    exchange.refuse_other_ranks({"base model": hasher.hexdigest()}, device)


def compare_directions(encoder: Encoder) -> None:
    """Make cosine the similarity of a model that takes another, for losses compare directions.

    Of vectors of length 1 the dot product and the distance order as cosine does.
    """
    if encoder.compared_by == "cosine":
        return
    log.warning(
        "similarity: cosine from now on, in training, evaluation and the export: losses compare "
        "directions, and the base model's %s compares lengths as well",
        encoder.similarity,
    )
    encoder.set_similarity("cosine")


def _refuse_flash_in_float32(encoder: Encoder, precision: str) -> None:
    """Refuse flash attention in a precision that it does not take.

    Raises:
        InputError: It was asked for in float32.
    """
    attention = encoder.attn_implementation or ""
    if "flash" in attention and precision == "32-true":
        raise InputError(
            f"trainer.precision: model.attn_implementation {attention} needs bf16-mixed or "
            "16-mixed, found 32-true"
        )


def refuse_long_interval(trainer: Any, batches: int) -> None:
    """Refuse to validate less often than once in the ``batches`` of an epoch.

    Raises:
        InputError: The interval counts within epochs, and is longer than one.
    """
    interval = getattr(trainer, "val_check_interval", None)  # there is none of a time
    counts_within = trainer.check_val_every_n_epoch is not None
    if counts_within and isinstance(interval, int) and interval > batches:
        raise InputError(
            f"trainer.val_check_interval: expected at most the {batches} batches of an epoch, "
            f"found {interval}; trainer.check_val_every_n_epoch null counts over epochs"
        )


def refuse_long_prompts(
    encoder: Encoder, data: EmbeddingDataModule, part: Literal["train", "predict"] = "train"
) -> None:
    """Refuse prompts, the model's or those of rows, that fill the longest input.

    Raises:
        InputError: Nothing would be left of a text.
    """
    collate = data.collator(encoder, part)
    limits: list[tuple[Role, str, int]] = [("query", "data.query_max_len", collate.query_max_len)]
    if part == "train":
        limits.append(("document", "data.passage_max_len", collate.passage_max_len))
    own_prompt = data.datasets[part].rows.longest_prompt
    for role, key, longest in limits:
        prompt = collate.prompts[role]
        if role == "query":
            prompt = max(prompt, own_prompt, key=lambda text: len(text or ""))
        if prompt is None and longest > MOST_SPECIAL:
            continue
        alone = encoder.tokenize([""], role, prompt, longest)["input_ids"]
        if alone.shape[-1] >= longest:
            filled = f"the {role} prompt {prompt!r} takes" if prompt else "begin and end a text"
            raise InputError(
                f"{key}: expected more tokens than {filled}, found {longest}: nothing would be "
                "left of a text"
            )


def average_all(trainer: Any, module: Any, stage: str) -> None:
    """Let callbacks that average weights know those that a module got in its own ``setup``.

    They have copied it before: what is appended to it would be left out of the average, or be taken
    for another weight, for they go by the order of the weights.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            callback.setup(trainer, module, stage)


@contextmanager
def averaged(trainer: Any, module: Any) -> Iterator[None]:
    """Give a module the average of its weights, where a callback validates and saves that."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
    for callback in callbacks:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.on_validation_epoch_end(trainer, module)


def has_other_weights(trainer: Any) -> bool:
    """Tell whether a fit has ended with an average of weights, which no validation has seen."""
    is_over = trainer.state.fn == TrainerFn.FITTING and trainer.current_epoch == trainer.max_epochs
    return is_over and any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)


def tell_of_far_rate(rate: float, usual: float) -> None:
    """Warn of a learning rate that is far from what a model of this size takes."""
    if not usual / FAR <= rate <= usual * FAR:
        said = "hardly moves the model" if rate < usual else "may ruin what the base model knows"
        log.warning("model.lr: %.3g %s: %.3g is usual for its width", rate, said, usual)


def tell_of_few_steps(steps: int) -> None:
    """Warn of a fit that ends before it has begun."""
    if steps < FEW_STEPS:
        log.warning(
            "steps: %d: a model hardly changes in so few; more trainer.max_epochs or a smaller "
            "data.batch_size give more",
            steps,
        )
