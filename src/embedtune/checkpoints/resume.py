"""Go on where a checkpoint was saved."""

from typing import Any

from embedtune.errors import InputError


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that was stopped within an epoch, by time or steps, go on within it.

    Lightning counts such an epoch as done.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]
    trained = loops["epoch_loop.batch_progress"]["current"]["ready"]
    is_open = 0 < trained < checkpoint.get("EmbeddingDataModule", {}).get("batches", 0)
    if is_open and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for progress in epochs.values():
            progress["processed"] -= 1
            progress["completed"] = progress["processed"]


Cursor = tuple[int, int]
"""Where an epoch's batches start: (epoch, number of batches of it already trained on)."""


class Place:
    """Where a fit is in its data, as a checkpoint brings it.

    Attributes:
        saved: What the place depends on, as the checkpoint says: ``batches`` of an epoch,
            ``examples`` and ``global_batch``; empty without a checkpoint.
    """

    def __init__(self) -> None:
        """Start at the beginning."""
        self.saved: dict[str, int] = {}

    def cursor(self, trainer: Any) -> Cursor:
        """Return where an epoch goes on: asked at its start, and after a resume in its middle."""
        if self._ended_with_an_epoch(trainer):
            # Loader workers ask before Lightning has turned to the next epoch.
            return trainer.fit_loop.epoch_progress.current.ready, 0
        return trainer.current_epoch, self._trained(trainer)

    def _trained(self, trainer: Any) -> int:
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _ended_with_an_epoch(self, trainer: Any) -> bool:
        return bool(self.saved) and self._trained(trainer) >= self.saved["batches"]

    def refuse_another_order(self, now: dict[str, int], batch_size: int, trainer: Any) -> None:
        """Refuse to go on in the middle of an epoch whose order is another.

        Args:
            now: The same as ``saved``, of this run.
            batch_size: Examples per rank in a batch.
            trainer: The Trainer.

        Raises:
            InputError: The data or the global batch is another.
        """
        saved = self.saved
        if not saved or not self._trained(trainer) or self._ended_with_an_epoch(trainer):
            return
        if saved["examples"] != now["examples"]:
            raise InputError(
                "ckpt_path: it was saved in the middle of an epoch: expected the same data, "
                f"{saved['examples']:,} examples, found {now['examples']:,}"
            )
        if saved["global_batch"] != now["global_batch"]:
            ranks = trainer.world_size
            raise InputError(
                "ckpt_path: it was saved in the middle of an epoch: expected its global batch of "
                f"{saved['global_batch']}, found data.batch_size {batch_size} x {ranks} "
                f"rank(s) = {now['global_batch']}; give data.batch_size "
                f"{saved['global_batch'] / ranks:g}"
            )
