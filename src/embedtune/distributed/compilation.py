"""What DeepSpeed compiles when it first runs, and the locks that a killed compilation leaves.

A lock is an empty file that its owner holds open. DeepSpeed waits for it to go away, for ever and
without a word.
"""

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger("embedtune")

COMPILED_IN_TIME = 600
"""Seconds after which a lock is nobody's, where its owner may be on another machine."""


def prepare_compilation(num_nodes: int, is_global_zero: bool) -> None:
    """Remove locks without an owner, and say so where something is going to be compiled.

    Args:
        num_nodes: Machines of the run, which may share the folder of what is compiled.
        is_global_zero: Whether this rank is the one that speaks.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_*/lock"):
        if _is_stale(lock, num_nodes):
            lock.unlink(missing_ok=True)
            log.warning("removed %s, a lock that a killed compilation has left", lock)
    if is_global_zero and not any(root.glob("**/deepspeed_shm_comm/*.so")):
        log.info("DeepSpeed compiles what CPU processes exchange by; once, for a minute or more")


def _is_stale(lock: Path, num_nodes: int) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # its owner has ended meanwhile
        return False
    return not _is_open(lock) and (num_nodes == 1 or age > COMPILED_IN_TIME)


def _is_open(path: Path) -> bool:
    """Tell whether a process of this machine and user holds a file open; True if unknown."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return True
    target = path.resolve()
    for folder in processes.glob("[0-9]*/fd"):
        try:
            if any(Path(os.readlink(link)) == target for link in folder.iterdir()):
                return True
        except OSError:  # another user's, or ended meanwhile
            continue
    return False
