"""What each of the batches of an optimiser step weighs."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from embedtune.data.sampler import GlobalBatchSampler


def accumulated_in(trainer: Any, epoch: int) -> int:
    """Return the batches of an optimiser step in an epoch, which a callback may change."""
    scheduler = _scheduler(trainer)
    if scheduler is not None:
        return scheduler.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def last_change(trainer: Any) -> int:
    """Return the epoch from which on their number stays."""
    scheduler = _scheduler(trainer)
    return 0 if scheduler is None else max(scheduler.scheduling)


def _scheduler(trainer: Any) -> GradientAccumulationScheduler | None:
    found = (c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler))
    return next(found, None)


def batches_of_step(batch: int, accumulated: int, batches: int) -> range:
    """Return the batches that share the optimiser step of one of them; an epoch's last has fewer.

    Args:
        batch: One of them.
        accumulated: As many as a step has.
        batches: Batches of an epoch.

    >>> [batches_of_step(batch, accumulated=2, batches=5) for batch in (2, 3, 4)]
    [range(2, 4), range(2, 4), range(4, 5)]
    """
    first = batch - batch % accumulated
    return range(first, min(first + accumulated, batches))


def loss_factor(
    batch: int, of_step: Sequence[int], accumulated: int, order: GlobalBatchSampler
) -> float:
    """Return what to multiply a batch's loss by, so that the step's is the mean over its queries.

    The Trainer divides each loss by ``accumulated``, whatever a step holds.

    >>> order = GlobalBatchSampler(11, 4, seed=1, shuffle=False)
    >>> [loss_factor(batch, range(3), 3, order) for batch in range(3)]
    [1.0909090909090908, 1.0909090909090908, 0.8181818181818182]
    """
    return accumulated * order.examples_in(batch) / sum(map(order.examples_in, of_step))


class StepMeans:
    """Means over the batches of an optimiser step so far, weighed by their queries."""

    def __init__(self) -> None:
        """Start with none."""
        self._queries, self._means = 0, dict[str, Tensor]()

    def add(
        self, values: Mapping[str, Tensor], queries: int, *, is_first: bool
    ) -> dict[str, Tensor]:
        """Take a batch's values, and return their means.

        Args:
            values: Scalars by name.
            queries: Those of all ranks.
            is_first: Whether the batch is the first of its step.
        """
        if is_first:
            self._queries, self._means = 0, {}
        self._queries += queries
        for name, value in values.items():
            before = self._means.get(name)
            share = queries / self._queries
            self._means[name] = value if before is None else before.lerp(value, share)
        return {name: self._means[name] for name in values}
