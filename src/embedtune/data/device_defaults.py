"""How many tokens are encoded at once, and how many processes make batches, where nobody says."""

import multiprocessing
import os

CPU_TOKENS, GPU_TOKENS, NARROW_TOKENS = 2048, 65536, 131072
"""Of a chunk: on a CPU, whose caches they fill; on a GPU; there, for narrow layers, whose kernels
end before a processor has started the next ones."""
NARROW = 512
"""Width up to which layers are narrow."""
MOST_WORKERS = 8


def tokens_per_chunk(device_type: str, width: int | None, grad_cache: bool) -> int:
    """Return the tokens of a chunk, padding included.

    Args:
        device_type: torch's name of it.
        width: That of the model's layers, None where it has none.
        grad_cache: Whether one chunk's activations are all that memory holds.
    """
    if device_type == "cpu":
        return CPU_TOKENS
    tokens = NARROW_TOKENS if width is not None and width <= NARROW else GPU_TOKENS
    return tokens // 2 if grad_cache else tokens


def num_workers(device_type: str, ranks: int) -> int:
    """Return the processes of a rank that make batches ahead, of as many ranks on this machine.

    A small model takes short texts faster than one process makes batches of them.
    """
    # Started otherwise than by fork, each would be sent a copy of the encoder.
    if device_type == "cpu" or multiprocessing.get_start_method() != "fork":
        return 0
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))
