"""What glibc does with memory that tensors no longer need, on a CPU.

By default it hands large tensors back to the system, and every page of the next one has to be
cleared and mapped again, which takes longer than many an operation on it.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> None:
    """Keep freed memory for the next tensors, in this process from now on."""
    # None where the C library is not glibc.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
