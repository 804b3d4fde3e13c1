"""How the command line answers a mistake: one line, with the nearest valid name."""

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn

from embedtune.cli.processes import let_rank_0_speak


def fail(message: str, code: int = 2) -> NoReturn:
    """Write one error line to stderr and exit."""
    let_rank_0_speak()
    sys.stderr.write(f"embedtune: error: {message}\n")
    sys.exit(code)


def nearest(unknown: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely stands for, if any is near.

    >>> nearest("vlaidate", ["fit", "validate"]), nearest("train", ["fit"])
    ('validate', None)
    """
    return next(iter(difflib.get_close_matches(unknown, known, n=1)), None)
