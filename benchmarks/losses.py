"""Measure the losses' time and memory against their direct forms: a markdown table.

    python benchmarks/losses.py

Times are medians of alternated runs of forward and backward. The direct rank hinge is the
reference's, over all m x m differences of the m = b (b - 1) / 2 pairs of texts. Memory is the
growth of a fresh process's peak (Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from embedtune.losses import Embeddings, InfoNCE, Loss, Matryoshka, functional
from embedtune.losses.inputs import Target

MARGIN = 0.015
QUERIES, NEGATIVES, WIDTH = 256, 3, 384
DIMS = [WIDTH * i // 8 for i in range(1, 9)]


def milliseconds(*steps: Callable[[], None], repeats: int) -> list[float]:
    """Return the median time of each step, all of them taking turns after one run each."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds[1:]) for seconds in times]


def similarities(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return those of a student, which take a gradient, and of a teacher."""
    generator = torch.Generator().manual_seed(b)
    embeddings = torch.randn(2, b, 16, generator=generator)
    student, teacher = (functional.cosine_similarity(e, e) for e in embeddings)
    return student.requires_grad_(), teacher


def rank_hinge(b: int) -> Callable[[], None]:
    """Return a step of the rank hinge, O(m log^2 m)."""
    student, teacher = similarities(b)
    return lambda: functional.rank_hinge(student, functional.pair_order(teacher), MARGIN).backward()


def direct_rank_hinge(b: int) -> Callable[[], None]:
    """Return a step of the same over all pairs of pairs, O(m^2)."""
    student, teacher = similarities(b)

    def step() -> None:
        scores = student.flatten()[functional.pair_order(teacher)]
        m = len(scores)
        hinge = (scores[:, None] - scores[None, :] + MARGIN).relu().triu(1)
        (hinge.sum() / (m * (m - 1) / 2)).backward()

    return step


def peak() -> float:
    """Return this process's peak memory in MiB; getrusage's holds the parent's too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def growth(b: int) -> float:
    """Return the MiB by which a step of the rank hinge raises this process's peak."""
    rank_hinge(8)()  # what a first step loads is not the loss's
    step = rank_hinge(b)
    before = peak()
    step()
    return peak() - before


def growth_in_fresh_process(b: int) -> float:
    """Return :func:`growth` of a process that has done nothing else."""
    command = [sys.executable, __file__, "--growth", str(b)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def triplets() -> Embeddings:
    """Return queries with a positive and hard negatives each."""
    generator = torch.Generator().manual_seed(0)
    rows = QUERIES, QUERIES, QUERIES * NEGATIVES
    return Embeddings(*(torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in rows))


def kept_for_backward(loss: Loss, embeddings: Embeddings) -> float:
    """Return the MiB of the distinct tensors that autograd keeps, beside the embeddings."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(embeddings, Target())
    for leaf in embeddings:
        assert leaf is not None
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each step")
    parser.add_argument("--growth", type=int, metavar="B", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        sys.stdout.write(str(growth(args.growth)))
        return
    fast, direct = milliseconds(rank_hinge(128), direct_rank_hinge(128), repeats=args.repeats)
    (large,) = milliseconds(rank_hinge(1024), repeats=args.repeats)
    embeddings, plain = triplets(), InfoNCE()
    nested = Matryoshka(plain, DIMS)
    one, eight = milliseconds(
        lambda: plain(embeddings, Target())["loss"].backward(),
        lambda: nested(embeddings, Target())["loss"].backward(),
        repeats=4 * args.repeats,
    )
    documents = QUERIES * (1 + NEGATIVES)
    size = f"{QUERIES} queries, {documents} documents, width {WIDTH}"
    table = f"""| what | value |
|---|---|
| rank hinge, 128 texts: O(m log^2 m) | {fast:.1f} ms |
| rank hinge, 128 texts: all m x m | {direct:.0f} ms |
| ratio | {direct / fast:.0f} |
| rank hinge, 1024 texts | {large:.0f} ms |
| rank hinge, 1024 texts: extra memory | {growth_in_fresh_process(1024):.0f} MiB |
| InfoNCE, {size} | {one:.1f} ms |
| the same at 8 widths | {eight:.1f} ms |
| ratio | {eight / one:.1f} |
| a matrix of similarities | {QUERIES * documents * 4 / 2**20:.1f} MiB |
| kept for backward, InfoNCE | {kept_for_backward(plain, embeddings):.1f} MiB |
| kept for backward, 8 widths | {kept_for_backward(nested, embeddings):.1f} MiB |
"""
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
