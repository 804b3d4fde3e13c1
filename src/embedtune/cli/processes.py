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


def let_rank_0_speak() -> None:
    """Give rank 0, which most likely fails alike, 5 seconds to say so and to end this rank."""
    if launched_rank():
        time.sleep(5)


def end_with_rank_0() -> None:
    """Let the kernel end this rank with rank 0, for which it would wait until a timeout.

    torchrun and SLURM see to that themselves.
    """
    is_ours = launched_rank() and not {"RANK", "SLURM_PROCID"} & os.environ.keys()
    if is_ours and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
