"""The processes that a launcher, or Lightning, has started for one run."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where Lightning looks for the number of a rank, in its order."""


def launched_rank() -> int:
    """Return the number of this rank before the ranks have found each other, without torch."""
    utilities: Any = sys.modules.get("lightning.pytorch.utilities")
    if utilities is not None:  # which by now may know it from elsewhere
        return utilities.rank_zero_only.rank
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def let_rank_0_speak(seconds: float = 5) -> None:
    """Give rank 0, which most likely fails alike, the time to say so and to end this rank."""
    if launched_rank():
        time.sleep(seconds)


def is_launched_by_rank_0() -> bool:
    """Tell whether rank 0 has started this rank, as torchrun and SLURM would otherwise."""
    return bool(launched_rank()) and not {"RANK", "SLURM_PROCID"} & os.environ.keys()


def end_with_rank_0() -> None:
    """Let the kernel end this rank with rank 0, for which it would wait until a timeout.

    torchrun and SLURM see to that themselves.
    """
    if is_launched_by_rank_0() and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """Return how a process has ended, for messages.

    >>> how_it_ended(1), how_it_ended(-15)
    ('ended with exit code 1', 'was ended by SIGTERM')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does where memory is short" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
