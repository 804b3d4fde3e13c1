"""Say which rank has died or hangs, and end the others with it."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

from embedtune.cli.mistakes import first_line
from embedtune.cli.processes import how_it_ended, is_launched_by_rank_0, let_rank_0_speak
from embedtune.distributed import exchange

OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"
"""Logger of Lightning's thread that looks every 5 seconds for ranks that have died, and kills."""
DIED = re.compile(r"\[rank: (\d+)\] Child process with PID \d+ terminated with code (-?\d+)")
CLOSING = 2
"""Seconds for which the kernel may take to end a process whose connections are closed."""
SECONDS = 20
"""For which a rank waits for rank 0, which has lost the same rank, to end it."""


class _Obituary(logging.Handler):
    """Says on stderr what the observer says, before it kills this process."""

    def emit(self, record: logging.LogRecord) -> None:
        found = DIED.search(record.getMessage())
        if found:
            _say(f"rank {found[1]} {how_it_ended(int(found[2]))}; all ranks end with it")


def tell_of_dead_ranks() -> None:
    """Let it be said which rank has died, also where this one is killed in the middle of a step."""
    logger = logging.getLogger(OBSERVER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_Obituary()]


def lost_rank_said(error: Exception, trainer: Any, timeout: float) -> str | None:
    """Return what to say where an exchange has failed for want of a rank, None for other errors.

    Where rank 0 is the one that hangs, and has started this one, it is killed, and this one too.

    Args:
        error: What was raised.
        trainer: The Trainer that ran.
        timeout: Seconds for which a rank waits.
    """
    if not exchange.is_rank_lost(error):
        return None
    launcher = getattr(trainer.strategy, "launcher", None)
    dead = _dead_rank(getattr(launcher, "procs", []))
    if dead is not None:
        return dead
    if re.search(r"[Tt]imed? ?out", str(error)):
        said = f"a rank has neither come nor ended within rank_timeout, {timeout:g} seconds"
    else:
        said = f"another rank has ended: {first_line(error)}"
    said = f"step {trainer.global_step + 1:,}: {said}"
    if is_launched_by_rank_0():
        let_rank_0_speak(SECONDS)
        _say(f"{said}; rank 0 still runs, and is killed")
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)
    return said


def _dead_rank(processes: list[subprocess.Popen]) -> str | None:
    """Return how the first rank that has died has, which closes its connections before it ends."""
    end = time.monotonic() + CLOSING
    while processes and time.monotonic() < end:
        for rank, process in enumerate(processes, start=1):
            if process.poll():
                return f"rank {rank} {how_it_ended(process.returncode)}; all ranks end with it"
        time.sleep(0.1)
    return None


def _say(message: str) -> None:
    sys.stderr.write(f"embedtune: error: {message}\n")
    sys.stderr.flush()
