"""Choose the loss of a run by the format of its data."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.errors import InputError, require_choice
from embedtune.losses.contract import Loss
from embedtune.losses.distillation import Distillation
from embedtune.losses.infonce import InfoNCE
from embedtune.losses.matryoshka import Matryoshka, unwrapped
from embedtune.losses.scope import Scope
from embedtune.losses.scored import SPREAD, CoSENT, ListwiseKL

log = logging.getLogger("embedtune")

WITH_ONE = (Format.PAIR, Format.TRIPLET, Format.SCORED)
"""Formats whose own loss has a temperature; that of scored pairs is 1 / scale."""
GRADUAL = 4
"""Times the temperature that tells relevant texts from others, for pairs that are alike by degrees
(docs/quality.md)."""
HARD = 2
"""Times the same, for rows that bring texts of their own to tell relevant ones from: more of these
then count (docs/quality.md)."""
FINEST = 0.01
"""Share of the spread of scores that float32 may leave untold."""
FLATTEST, STEEPEST = SPREAD / 5, SPREAD * 5
"""Within these a given teacher temperature may ask cosines of a list to spread."""


def choose_loss(
    loss: Loss | None,
    temperature: float | None,
    mrl_dims: list[int] | None,
    data: EmbeddingDataModule,
    derive_temperature: Callable[[], float] | None = None,
) -> Loss:
    """Return the loss of a run.

    Args:
        loss: What the user asked for, None for the format's own.
        temperature: Of the format's own loss; None is its default.
        mrl_dims: Widths to train; None trains the full width alone.
        data: The opened data.
        derive_temperature: Returns what is taken for a temperature where the format's own loss has
            one and none is given.

    Raises:
        InputError: The loss would learn nothing from the data, or has no temperature.
    """
    row_format = data.format
    assert row_format is not None, "only predict has no format"
    if loss is None:
        of_pairs = row_format == Format.SCORED and _main_rows(data).list_lengths.max() < 2
        loss = default_loss(row_format, temperature, of_pairs=of_pairs)
        if temperature is None and derive_temperature and row_format in WITH_ONE:
            _take_temperature(loss, derive_temperature(), row_format)
    elif isinstance(unwrapped(loss), Distillation | ListwiseKL):
        loss = copy.deepcopy(loss)  # another module may be given the same, with other data
    _refuse_without_signal(loss, data)
    _settle_teacher_temperature(loss, data)
    return loss if mrl_dims is None else at_widths(loss, mrl_dims)


def at_widths(loss: Loss, mrl_dims: list[int]) -> Loss:
    """Return a loss that trains each width, as a run with MRL trains it.

    Raises:
        InputError: It is given other widths of its own.
    """
    if isinstance(loss, Matryoshka):
        if sorted(loss.dims) != sorted(mrl_dims):
            raise InputError(
                f"model.loss: expected Matryoshka of model.mrl_dims {mrl_dims}, found {loss.dims}"
            )
        return loss
    if isinstance(loss, Distillation):
        if loss.mrl_dims not in (None, mrl_dims):
            raise InputError(
                f"model.loss: expected mrl_dims {mrl_dims} as model.mrl_dims, found {loss.mrl_dims}"
            )
        loss = copy.deepcopy(loss)  # another module may be given the same, with other widths
        loss.mrl_dims = mrl_dims
        return loss
    return Matryoshka(loss, mrl_dims)


def refuse_no_loss(loss: Any) -> None:
    """Refuse what is no loss, which Python alone does not, and one that sees nobody knows what.

    Raises:
        InputError: It is one.
    """
    if loss is None:
        return
    if not isinstance(loss, Loss):
        raise InputError(
            "model.loss: expected a loss that derives from embedtune.Loss, such as "
            f"embedtune.losses.InfoNCE(), found {loss!r}"
        )
    require_choice(f"model.loss: {type(loss).__name__}.scope", loss.scope, Scope)


def refuse_other_format(loss: Loss | None, row_format: Format) -> None:
    """Refuse a loss that does not take the data.

    Args:
        loss: What the user asked for, or what was chosen for the data of an earlier fit.
        row_format: That of the data.

    Raises:
        InputError: It takes others.
    """
    inner = unwrapped(loss)
    if isinstance(inner, Distillation) and inner is not loss:
        raise InputError(
            "model.loss: Distillation takes its widths itself, as mrl_dims: leave Matryoshka out"
        )
    if inner is not None and row_format not in inner.formats:
        raise InputError(
            f"model.loss: {type(inner).__name__} takes {' or '.join(sorted(inner.formats))} "
            f"data, found {row_format} rows"
        )


def _take_temperature(loss: Any, temperature: float, row_format: Format) -> None:
    """Give a format's own loss the temperature that follows from that of a model."""
    said = "by how alike texts are to the base model"
    if isinstance(loss, CoSENT):
        loss.scale = float(f"{1 / (GRADUAL * temperature):.2g}")
        log.info("scale %.2g, %s", loss.scale, said)
    else:
        loss.temperature = temperature * (1 if row_format == Format.PAIR else HARD)
        log.info("temperature %.2g, %s", loss.temperature, said)


def _settle_teacher_temperature(loss: Loss, data: EmbeddingDataModule) -> None:
    """Derive that over lists where none is given, or warn where it does not fit their scores."""
    inner = unwrapped(loss)
    if not isinstance(inner, ListwiseKL) or inner.over != "list":
        return
    spread = _main_rows(data).score_spread
    if inner.teacher_temperature is None:
        derived = inner.derive_teacher_temperature(spread)
        said = "teacher temperature %.3g, for scores that spread by %.3g within a list"
        log.info(said, derived, spread)
        return
    asked = inner.temperature * spread / inner.teacher_temperature
    if spread and not FLATTEST < asked < STEEPEST:
        log.warning(
            "teacher_temperature: %.3g, with scores that spread by %.3g within a list, asks for "
            "cosines that spread by %.2g: %s; none given is derived, here %.3g",
            inner.teacher_temperature,
            spread,
            asked,
            "nearly all alike" if asked <= FLATTEST else "one text that is all there is",
            inner.temperature * spread / SPREAD,
        )


def _refuse_without_signal(loss: Loss, data: EmbeddingDataModule) -> None:
    """Refuse data that a loss learns nothing from, and warn of some."""
    inner = unwrapped(loss)
    if isinstance(inner, ListwiseKL) and inner.over == "list":
        _refuse_singleton_lists(data)
    if isinstance(inner, InfoNCE) and data.format == Format.PAIR:
        _refuse_lonely_pairs(inner, data)
    for name, examples in data.datasets.items():
        _tell_of_scores(name, examples.rows)


def _tell_of_scores(name: str, rows: Rows) -> None:
    """Warn of scores that order nothing, or not when they are float32."""
    if rows.score_range is None:
        return
    low, high = rows.score_range
    if low == high:
        log.warning("%s: all scores are %g: they order nothing", name, low)
        return
    step = np.spacing(np.float32(max(abs(low), abs(high))))
    if step > FINEST * (rows.score_spread or high - low):
        log.warning(
            "%s: scores from %.9g to %.9g: a loss sees them as float32, in steps of %.2g: "
            "subtract what they have in common",
            *(name, low, high, step),
        )


def _refuse_lonely_pairs(loss: InfoNCE, data: EmbeddingDataModule) -> None:
    for name, examples in data.datasets.items():
        batch = data.sampler(name).global_batch_size
        seen = data.batch_size if loss.over == "rank" else min(batch, len(examples))
        if name == "train" and len(examples) % batch == 1:
            log.warning("the last batch of an epoch is one pair, of which InfoNCE learns nothing")
        if seen < 2:
            raise InputError(
                f"data.batch_size: InfoNCE takes the other pairs of a batch for negatives: "
                f"expected at least 2 pairs in a batch, found {seen} of {name}"
            )


def _refuse_singleton_lists(data: EmbeddingDataModule) -> None:
    """Refuse lists of one text to train on; of others only the correlation is measured."""
    for name, opened in list(data.datasets.items()):
        rows = opened.rows
        lengths = rows.list_lengths
        if lengths.min() < 2 and name != "train" and "train" in data.datasets:
            log.info("%s: no loss, for ListwiseKL compares the texts of a list", name)
            del data.datasets[name]
        elif lengths.min() < 2:
            raise InputError(
                f"{rows.place(int(lengths.argmin()))}: expected lists of at least two texts for "
                "ListwiseKL, found one, which would be the best of its list whatever its score; "
                "use model.loss: embedtune.losses.CoSENT (sentence pairs with "
                "scores), or ListwiseKL with over: batch"
            )


def default_loss(row_format: Format, temperature: float | None, *, of_pairs: bool = False) -> Loss:
    """Return the loss for a format of data when none is given.

    Args:
        row_format: That of the rows.
        temperature: Of the loss; None is its default.
        of_pairs: Scored rows have a text each, as in sentence similarity: the order of all pairs
            is what there is to learn.

    Raises:
        InputError: It has no temperature, and one is given.
    """
    if row_format == Format.DISTILL or of_pairs:
        kind = CoSENT if of_pairs else Distillation
        if temperature is not None:
            raise InputError(f"model.temperature: {kind.__name__} has none; leave it out")
        return kind()
    with_temperature = ListwiseKL if row_format == Format.SCORED else InfoNCE
    return with_temperature() if temperature is None else with_temperature(temperature=temperature)


def _main_rows(data: EmbeddingDataModule) -> Rows:
    """Return the rows that are trained on, else the first that are evaluated."""
    return (data.datasets.get("train") or next(iter(data.datasets.values()))).rows
