"""What a user is told in one line, without a traceback: every other exception is a defect."""

import errno
import math
from typing import Any, get_args

OF_ALLOCATORS = ("DefaultCPUAllocator", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says of memory where it raises no class of its own."""


class InputError(ValueError):
    """Bad input: its message names the file, line, field or YAML key, what was found and expected.

    The command line prints the message alone and exits with code 2; Python callers catch it as the
    ``ValueError`` it is.
    """


class ExportError(RuntimeError):
    """An exported folder does not give the embeddings of the trained model; the exit code is 1.

    Attributes:
        reason: How the embeddings differ; None where the folder cannot be written.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        """Take what is printed, and how the embeddings differ."""
        super().__init__(message)
        self.reason = reason


class TrainingError(RuntimeError):
    """A fit that cannot go on, though nothing that it was given is wrong; the exit code is 1."""


def require_positive(key: str, value: float) -> float:
    """Return ``value``.

    Raises:
        InputError: It is not above 0, or infinite; the message names ``key``.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{key}: expected a positive number, found {value}")
    return value


def require_not_negative(key: str, value: float) -> float:
    """Return ``value``.

    Raises:
        InputError: It is below 0, infinite or no number; the message names ``key``.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"{key}: expected a number from 0 on, found {value}")
    return value


def require_choice(key: str, value: Any, kind: Any) -> None:
    """Refuse what is none of the values of a ``Literal``, which Python alone does not.

    Raises:
        InputError: It names ``key``.
    """
    choices = get_args(kind)
    if value not in choices:
        raise InputError(f"{key}: expected one of {', '.join(choices)}, found {value!r}")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory has not sufficed, on a GPU or in this process; without torch.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("size mismatch"))
    (True, False)
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    of_torch = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    is_told = isinstance(error, RuntimeError) and any(s in str(error) for s in OF_ALLOCATORS)
    return isinstance(error, MemoryError) or of_torch or is_told
