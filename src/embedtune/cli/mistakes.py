"""How the command line answers a mistake: one line, with the nearest valid name."""

import difflib
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterable
from typing import NoReturn

from embedtune.cli.processes import let_rank_0_speak
from embedtune.errors import is_out_of_memory

SURROUNDINGS = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "ENODEV"),
        *("ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE", "ETXTBSY"),
    )
    if hasattr(errno, name)
}
"""Errors of disks and permissions. A file that is not there may well be a defect."""
OF_TORCHS_WRITER = ("inline_container", "iostream error", "Parent directory ")
"""In what torch says, without a cause, when it cannot write to a path, as DeepSpeed has it do."""
log = logging.getLogger("embedtune")

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def fail(message: str, code: int = 2) -> NoReturn:
    """Write one error line to stderr and exit."""
    let_rank_0_speak()
    line = CONTROL.sub(lambda found: repr(found[0])[1:-1], message)
    sys.stderr.write(f"embedtune: error: {line}\n")
    sys.exit(code)


def surroundings_said(error: Exception) -> str | None:
    """Return what to say of an error of memory, disks or permissions, None for any other.

    >>> surroundings_said(MemoryError())
    'out of memory: MemoryError'
    >>> surroundings_said(OSError(errno.ENOSPC, "No space left on device", "run/last.ckpt"))
    'run/last.ckpt: No space left on device'
    >>> surroundings_said(KeyError("query"))
    """
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    if isinstance(error, RuntimeError) and any(said in str(error) for said in OF_TORCHS_WRITER):
        return f"a checkpoint cannot be written as a whole; is the disk full? ({first_line(error)})"
    if not isinstance(error, OSError) or error.errno not in SURROUNDINGS:
        return None
    said, name = os.strerror(error.errno or 0), error.filename
    if isinstance(name, bytes):  # as TensorBoard's writer asks
        name = os.fsdecode(name)
    return said if name is None else f"{name}: {said}"


def tell_of_threads() -> None:
    """Let such an error in a thread, as in TensorBoard's, be a line; other errors are defects.

    The thread that it works for learns of it by itself.
    """

    def say(failed: threading.ExceptHookArgs) -> None:
        error = failed.exc_value
        said = surroundings_said(error) if isinstance(error, Exception) else None
        if said is None:
            threading.__excepthook__(failed)
        else:
            log.warning("%s", said)

    threading.excepthook = say


def first_line(error: Exception) -> str:
    r"""Return the first line of what an error says, or else its kind.

    >>> first_line(ValueError("no such backend\nTry another.")), first_line(ValueError())
    ('no such backend', 'ValueError')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(unknown: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely stands for, if any is near.

    >>> nearest("vlaidate", ["fit", "validate"]), nearest("train", ["fit"])
    ('validate', None)
    """
    return next(iter(difflib.get_close_matches(unknown, known, n=1)), None)
