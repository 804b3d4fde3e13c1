"""What glibc does with memory that tensors no longer need, on a CPU.

By default it hands large tensors back to the system, and every page of the next one has to be
cleared and mapped again, which takes longer than many an operation on it.
"""

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> None:
    """Keep freed memory for the next tensors, in this process from now on."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Give what is free now back to the system, holes between tensors included."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Any:
    """Return a function of the C library; None where that is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
