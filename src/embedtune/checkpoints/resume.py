"""Where a fit is in its data, and how it goes on from there.

The place is a fact of its own, which each checkpoint carries. Lightning's counters, of which many
combinations mean the same place, are set from it and never read.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune.checkpoints.find import moved, places_of
from embedtune.errors import InputError

log = logging.getLogger("embedtune")


class Place(NamedTuple):
    """A place in the data of a fit.

    Attributes:
        epoch: Counted from 0.
        batch: Batches of the epoch that are trained on.
        step: Optimiser steps of the fit.
        batches: Batches of an epoch.
        examples: Examples of an epoch.
        global_batch: Examples of a full global batch.
        seed: Of the order and of the negatives.
        shuffle: Whether it is another in each epoch.
        data: Digest of the rows.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    batches: int = 0
    examples: int = 0
    global_batch: int = 0
    seed: int = 0
    shuffle: bool = True
    data: str = ""

    def among(self, batches: int) -> "Place":
        """Return the same place where an epoch has so many batches: its end is the next's start."""
        if batches and self.batch >= batches:
            return self._replace(epoch=self.epoch + 1, batch=0, batches=batches)
        return self._replace(batches=batches)


def place_of(checkpoint: dict[str, Any]) -> Place:
    """Return the place that a checkpoint carries.

    Raises:
        InputError: It carries none, or weights alone.
    """
    if "callbacks" not in checkpoint:  # which lie beside the optimiser's states of any strategy
        raise InputError(
            "ckpt_path: expected a checkpoint with the optimiser's states, found weights alone "
            "(checkpoint.save_weights_only); embedtune export makes a model of it to start from"
        )
    if "place" not in checkpoint:
        raise InputError(
            "ckpt_path: expected a checkpoint that tells its place in the data, found one of an "
            "older version; embedtune export makes a model of it to start from"
        )
    return Place(**checkpoint["place"])


def set_counters(checkpoint: dict[str, Any], place: Place, accumulated: int) -> None:
    """Let Lightning's counters in a checkpoint say what ``place`` says.

    Args:
        checkpoint: Its ``loops`` are changed.
        place: Within an epoch, or at the start of one.
        accumulated: Batches of an optimiser step.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epoch, trained = place.epoch, place.batch
    is_within = trained > 0
    # Within an epoch: as on_train_batch_end finds them after the last batch.
    epochs = _counters(epoch + is_within, processed=epoch, completed=epoch)
    loops["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
    total = epoch * place.batches + trained
    loops["epoch_loop.batch_progress"] = {
        "total": _counters(total, processed=total, completed=total - is_within),
        "current": _counters(trained, processed=trained, completed=trained - is_within),
        "is_last_batch": False,
    }
    # Lightning adds a step when it starts within an epoch, where no gradients are being gathered.
    adds = is_within and trained % accumulated == 0
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = place.step - adds


def _counters(ready: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": ready, "processed": processed, "completed": completed}


def start_epoch(trainer: Any) -> None:
    """Let an epoch begin as any other, though a checkpoint was loaded.

    With ``max_steps`` Lightning would take it for one that was interrupted.
    """
    fit_loop = trainer.fit_loop
    for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
        loop._restarting = False
        loop.reset_restart_stage()


def refuse_another_order(
    saved: Place, now: Place, batch_size: int, ranks: int, accumulated: int
) -> None:
    """Refuse to go on in the middle of an epoch whose order or steps are others.

    Args:
        saved: Of the checkpoint.
        now: Of this run.
        batch_size: Examples per rank in a batch.
        ranks: Number of processes.
        accumulated: Batches of an optimiser step.

    Raises:
        InputError: The data, their order, the global batch or a step is another.
    """
    if not saved.batch:
        if saved.data != now.data:
            log.info("ckpt_path: the training data are others than those of the epochs before")
        return
    within = "ckpt_path: it was saved in the middle of an epoch: expected"
    if saved.examples != now.examples:
        raise InputError(
            f"{within} the same data, {saved.examples:,} examples, found {now.examples:,}"
        )
    if saved.data != now.data:
        raise InputError(f"{within} the same data, found other rows, or others in their order")
    if (saved.seed, saved.shuffle) != (now.seed, now.shuffle):
        raise InputError(
            f"{within} the order of data.seed {saved.seed} and data.shuffle {saved.shuffle}, "
            f"found {now.seed} and {now.shuffle}"
        )
    if saved.global_batch != now.global_batch:
        raise InputError(
            f"{within} its global batch of {saved.global_batch}, found data.batch_size "
            f"{batch_size} x {ranks} rank(s) = {now.global_batch}; give data.batch_size "
            f"{saved.global_batch / ranks:g}"
        )
    if saved.batch % accumulated:
        raise InputError(
            f"{within} trainer.accumulate_grad_batches to divide the {saved.batch} batches that "
            f"were trained on, found {accumulated}"
        )


def validates_at(place: Place, trainer: Any) -> bool:
    """Tell whether a fit validates at a place, after the batch that it follows.

    Args:
        place: Within an epoch, or at the start of one, which is the end of the one before.
        trainer: Whose loops are set up.
    """
    epoch, batch = place.epoch, place.batch
    if not batch:
        epoch, batch = epoch - 1, place.batches
    every, within = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if epoch < 0 or trainer._val_check_time_interval is not None:  # or nobody knows
        return False
    if every is None:
        return (epoch * place.batches + batch) % within == 0
    if (epoch + 1) % every:
        return False
    return batch == place.batches if within == math.inf else batch % within == 0


def refuse_other_weights(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those of the model.

    Args:
        saved: Weights of the checkpoint by their names.
        own: Those of the model.

    Raises:
        InputError: It names the first weight that differs.
    """
    for name in {**own, **saved}:
        needed, found = (
            f"of shape {list(getattr(weights[name], 'shape', []))}" if name in weights else "none"
            for weights in (own, saved)
        )
        if needed != found:
            raise InputError(
                f"ckpt_path: expected the weights of this model: {name} {needed}, found {found}; "
                "give model.model_name_or_path, model.use_mrl, model.mrl_dims, "
                "model.projection_init and model.loss as it was trained with"
            )


OFTEN = ", 'every_n_train_steps'"
"""Where a key of Lightning's begins to tell how often a callback saves, after what it looks for."""


def keep_states(callbacks: list[Any], states: dict[str, Any]) -> None:
    """Let a callback that saves more or less often than before know what it has kept.

    Lightning finds its state by a key that tells how often it saves, too.

    Args:
        callbacks: Those that keep checkpoints.
        states: Of callbacks by their keys, as a checkpoint brings them; changed.
    """
    others = states.keys() - {callback.state_key for callback in callbacks}
    for callback in callbacks:
        own, looks_for = callback.state_key, callback.state_key.partition(OFTEN)[0]
        same = [key for key in sorted(others) if key.partition(OFTEN)[0] == looks_for]
        if own not in states and len(same) == 1:
            states[own] = states.pop(same[0])
            others.remove(same[0])


def know_saved(callbacks: list[Any], step: int) -> None:
    """Let callbacks that keep checkpoints know that a step is saved, with which a fit goes on.

    They would save it once more before the next is done, by what the next's first batches lead to.
    Only a validation that is made up for tells more of it.
    """
    for callback in callbacks:
        if not (getattr(callback, "monitor", None) or "").startswith("val/"):
            callback._last_global_step_saved = step


def follow_move(callbacks: list[Any], states: dict[str, dict[str, Any]], folder: Path) -> None:
    """Let what callbacks remember of the checkpoints that they kept be true of this run's folder.

    A run folder may have been moved or copied, or be seen from another working folder. What was
    kept in a folder that this run does not write to is forgotten: it is another run's.

    Args:
        callbacks: Those that keep checkpoints.
        states: Of callbacks by their keys, as a checkpoint brings them; changed.
        folder: Where the checkpoint lies that brings them.
    """
    lies_in, places = [folder.resolve(), *folder.resolve().parents], places_of(callbacks)
    for callback in callbacks:
        state = states.get(callback.state_key)
        if state is None:
            continue
        own, saved_in = Path(str(callback.dirpath)), state.get("dirpath", "")
        is_here = own.resolve() in lies_in[: places.get(own.resolve(), 0) + 1]

        def here(path: str, own: Path = own, is_here: bool = is_here, was: Any = saved_in) -> str:
            kept = moved(path, was, own)
            return str(kept) if path and is_here and kept.exists() else ""

        state["dirpath"] = callback.dirpath
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = here(state.get(name, ""))
        kept = {here(path): score for path, score in state.get("best_k_models", {}).items()}
        state["best_k_models"] = {path: score for path, score in kept.items() if path}
        _keep_fewer(callback, state)
        if not state["best_model_path"]:
            state["best_model_score"] = None


def forget_scores(
    callbacks: list[Any], states: dict[str, dict[str, Any]], changed: tuple[str, ...]
) -> None:
    """Let callbacks that compare by a metric start anew where its set is another than before.

    Args:
        callbacks: Of the Trainer.
        states: Of callbacks by their keys, as a checkpoint brings them; changed.
        changed: How the metrics of such sets begin.
    """
    for callback in callbacks:
        if (getattr(callback, "monitor", None) or "").startswith(changed):
            state = states.pop(callback.state_key, None)
            if state is not None and isinstance(callback, ModelCheckpoint):
                kept = {"dirpath": state["dirpath"], "last_model_path": state["last_model_path"]}
                states[callback.state_key] = {**callback.state_dict(), **kept}


def _keep_fewer(callback: Any, state: dict[str, Any]) -> None:
    """Let a state know no more checkpoints than ``callback`` keeps, and which of them is worst."""
    count, known = callback.save_top_k, state["best_k_models"]
    if not 0 < count <= len(known):
        return
    ordered = sorted(known, key=known.__getitem__, reverse=callback.mode == "max")
    state["best_k_models"] = {path: known[path] for path in ordered[:count]}
    state["kth_best_model_path"] = ordered[count - 1]
    state["kth_value"] = known[ordered[count - 1]]
