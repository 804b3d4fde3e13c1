"""The order of the examples: a pure function of (seed, epoch, step), whatever the ranks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch.utils.data


class Key(NamedTuple):
    """An example in an epoch.

    Attributes:
        epoch: Counted from 0; negatives are drawn anew in each.
        example: Its number in its data set.
        spare: It does not count: a rank whose share of the last global batch is empty encodes it
            to keep step with the others.
    """

    epoch: int
    example: int
    spare: bool = False


Cursor = tuple[int, int]
"""Where an epoch's batches start: (epoch, number of batches of it already trained on)."""


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the examples of an epoch in order, int64 ``[num_examples]``.

    >>> epoch_order(4, seed=1, epoch=0, shuffle=False).tolist()
    [0, 1, 2, 3]
    """
    if not shuffle:
        return np.arange(num_examples)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_examples)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Return the seed of what a rank draws in a step, such as dropout.

    >>> step_seed(1, 0, 0, rank=0) == step_seed(1, 0, 0, rank=1)
    False
    """
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0])


class GlobalBatchSampler(torch.utils.data.Sampler[list[Key]]):
    """Yield this rank's share of each global batch, as keys of its examples.

    Global batch ``s`` of an epoch is the slice ``[s * B, (s + 1) * B)`` of the epoch's order,
    ``B = batch_size * num_ranks``; the ranks take consecutive parts of it, equal up to one
    example. The last global batch holds what is left; where that is less than one example a rank,
    the others get its first example as a spare. Nothing is kept between batches: a run resumes
    from its cursor alone, on any number of ranks.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        num_ranks: int = 1,
        cursor: Callable[[], Cursor] = lambda: (0, 0),
    ) -> None:
        """Describe the order.

        Args:
            num_examples: Examples in an epoch.
            batch_size: Examples per rank in a batch.
            seed: Seed of the order.
            shuffle: False keeps the files' order.
            rank: This process.
            num_ranks: Number of processes.
            cursor: Asked whenever an iteration starts.
        """
        self.num_examples, self.batch_size = num_examples, batch_size
        self.seed, self.shuffle, self.rank, self.num_ranks = seed, shuffle, rank, num_ranks
        self.cursor = cursor

    @property
    def global_batch_size(self) -> int:
        """Examples in a full global batch."""
        return self.batch_size * self.num_ranks

    def __len__(self) -> int:
        """Return the number of global batches in an epoch."""
        return -(-self.num_examples // self.global_batch_size)

    def examples_in(self, step: int) -> int:
        """Return the number of examples of a global batch, those of all ranks together.

        >>> order = GlobalBatchSampler(11, 2, seed=1, shuffle=False, num_ranks=2)
        >>> [order.examples_in(step) for step in range(3)]
        [4, 4, 3]
        """
        return min(self.global_batch_size, self.num_examples - step * self.global_batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the batches from the cursor to the end of its epoch."""
        epoch, first = self.cursor()
        order = epoch_order(self.num_examples, self.seed, epoch, self.shuffle)
        for step in range(first, len(self)):
            start = step * self.global_batch_size
            batch = order[start : start + self.global_batch_size]
            share = np.array_split(batch, self.num_ranks)[self.rank]
            if len(share):
                yield [Key(epoch, int(index)) for index in share]
            else:
                yield [Key(epoch, int(batch[0]), spare=True)]
