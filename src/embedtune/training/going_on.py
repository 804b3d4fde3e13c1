"""Go on from a checkpoint: the place in the data, and what was measured before."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from embedtune.checkpoints.resume import (
    Place,
    follow_move,
    forget_scores,
    keep_states,
    know_saved,
    place_of,
    refuse_another_order,
    set_counters,
)
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.evaluation.intervals import Interval
from embedtune.training.accumulation import accumulated_in

log = logging.getLogger("embedtune")


class Validation(NamedTuple):
    """What was last measured, and after which step."""

    step: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]


class Before(NamedTuple):
    """What a fit that goes on knows of the one before.

    Attributes:
        place: Where it starts.
        measured: What was measured of these weights.
        base_losses: Of the base model, by their names: they need the projection as it started.
        changed_sets: Sets whose data are others than those that were measured.
    """

    place: Place
    measured: Validation
    base_losses: dict[str, float]
    changed_sets: list[str]


def go_on(checkpoint: dict[str, Any], trainer: Any, data: EmbeddingDataModule) -> Before:
    """Go on at the place that a checkpoint carries; what it says to Lightning is changed.

    Raises:
        InputError: It is in the middle of an epoch of other data, or of another order.
    """
    saved = place_of(checkpoint)
    saved = saved.among(saved.batches)
    place = saved.among(data.batches_per_epoch)
    ranks, accumulated = trainer.world_size, accumulated_in(trainer, place.epoch)
    refuse_another_order(saved, data.start, data.batch_size, ranks, accumulated)
    set_counters(checkpoint, place, accumulated)
    facts, keepers = checkpoint.get("training_facts", {}), trainer.checkpoint_callbacks
    keep_states(keepers, checkpoint.get("callbacks", {}))
    know_saved(keepers, place.step)
    changed = _changed_sets(checkpoint, data)
    if changed:
        begins = tuple(f"{name}/" for name in changed)
        forget_scores(trainer.callbacks, checkpoint.get("callbacks", {}), begins)
        facts = {**facts, "metrics": {}, "intervals": {}}
    folder = Path(str(trainer.ckpt_path)).absolute().parent
    follow_move(keepers, checkpoint.get("callbacks", {}), folder)
    begins = tuple(f"{name}/" for name in data.datasets.keys() - {*changed})
    of_base = facts.get("base_metrics", {}).items()
    known = {name: tuple(ends) for name, ends in (facts.get("intervals") or {}).items()}
    return Before(
        place,
        Validation(place.step, facts.get("metrics", {}), known),
        {name: value for name, value in of_base if name.startswith(begins)},
        changed,
    )


def _changed_sets(checkpoint: dict[str, Any], data: EmbeddingDataModule) -> list[str]:
    """Return the sets of ``data.val_path`` that are others than those that were measured."""
    now, saved = data.digests("val"), checkpoint.get("evaluated", {})
    changed = [name for name in now if saved.get(name, now[name]) != now[name]]
    if changed:
        log.warning(
            "ckpt_path: %s: other data than before: what was measured of them counts no more",
            ", ".join(changed),
        )
    return changed


def tell_of_another_base(kept: dict[str, Any], base: str) -> None:
    """Warn of a base model that is another than the checkpoint's."""
    if kept["model_name_or_path"] != base:
        log.warning(
            "ckpt_path: it was trained from %s: what compares with the base model takes %s",
            *(kept["model_name_or_path"], base),
        )
