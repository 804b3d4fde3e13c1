"""What glibc does with memory that tensors no longer need, on a CPU.

By default it hands large tensors back to the system, and every page of the next one has to be
cleared and mapped again, which takes longer than many an operation on it.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed() -> None:
    """Keep freed memory for the next tensors, in this process from now on."""
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)


def return_freed() -> None:
    """Return to the system what is free between allocations of many shapes."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    """Return a function of glibc, None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
