"""What the ranks of a run exchange; with one process nothing is, and every function is trivial."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedtune.errors import InputError


def is_distributed() -> bool:
    """Tell whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the number of this rank, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the counts of every rank, rank by rank, in one small exchange.

    Args:
        counts: As many numbers on every rank.
        device: That of the run: the backend exchanges tensors of its own kind alone.
    """
    if not is_distributed():
        return [list(counts)]
    own = torch.tensor(list(counts), device=device)
    found = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(found, own)
    return found.view(-1, len(own)).tolist()


def refuse_other_ranks(told: Mapping[str, str], device: torch.device) -> None:
    """Refuse a run whose ranks differ in what all must have alike, or they would hang later.

    Args:
        told: What this rank has, by what to call it; the same names on every rank.
        device: That of the run.

    Raises:
        InputError: It names the first rank that differs from rank 0, and in what; on every rank.
    """
    digests = (hashlib.blake2b(text.encode(), digest_size=7).digest() for text in told.values())
    first, *others = gather_counts([int.from_bytes(digest) for digest in digests], device)
    for number, other in enumerate(others, start=1):
        differing = [name for name, a, b in zip(told, first, other, strict=True) if a != b]
        if differing:
            raise InputError(
                f"rank {number}: expected the {' and '.join(differing)} of rank 0, found another"
            )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of every rank's ``values``, without gradient."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: Tensor) -> Tensor:
    """Return the largest of every rank's ``value``, without gradient."""
    if not is_distributed():
        return value
    largest = value.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the rows of all ranks in their order, ``[sum(sizes), ..]``, with gradient.

    The gradient of a row is the sum of what every rank's loss asks of it. With a strategy that
    averages parameter gradients, a mean of this rank's queries against gathered rows, or a loss
    of gathered rows alone that every rank computes alike, so has the gradient of one process.

    Args:
        rows: ``[sizes[rank], ..]``.
        sizes: Rows of each rank, as :func:`gather_counts` tells.
    """
    return GatherRows.apply(rows, list(sizes)) if is_distributed() else rows


class GatherRows(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward; short shares are padded for the exchange."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        """Return the rows of all ranks."""
        ctx.sizes = sizes
        largest, shape = max(sizes), rows.shape[1:]
        if len(rows) < largest:
            rows = torch.cat([rows, rows.new_zeros(largest - len(rows), *shape)])
        found = rows.new_empty(len(sizes) * largest, *shape)
        dist.all_gather_into_tensor(found, rows.contiguous())
        if min(sizes) == largest:
            return found
        shares = zip(found.split(largest), sizes, strict=True)
        return torch.cat([share[:size] for share, size in shares])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return the sum over ranks of the gradient of this rank's rows."""
        (gradient,) = grad_outputs
        sizes, largest, shape = ctx.sizes, max(ctx.sizes), gradient.shape[1:]
        if min(sizes) < largest:
            padded = gradient.new_zeros(len(sizes) * largest, *shape)
            for share, part in zip(padded.split(largest), gradient.split(sizes), strict=True):
                share[: len(part)] = part
            gradient = padded
        own = gradient.new_empty(largest, *shape)
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own[: sizes[dist.get_rank()]], None


def is_rank_lost(error: BaseException) -> bool:
    """Tell whether an exchange has failed because a rank has ended, or has not come in time."""
    # gloo, on CPUs, raises no class of its own.
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_of_gloo or (dist.is_available() and isinstance(error, dist.DistError))


def leave() -> None:
    """Wait for all ranks and leave the process group: one that exits earlier aborts the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
