"""How the command line answers a mistake: one line, with the nearest valid key."""

import difflib
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from embedtune import gather

UNKNOWN_KEY = re.compile(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)")
"""How jsonargparse and argparse word that they do not know a key."""


class Parser(LightningArgumentParser):
    """A parser that answers a misspelt key with the nearest valid one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write one message, without the usage, and exit with code 2."""
        unknown = UNKNOWN_KEY.search(str(message))
        hint = self._nearest(unknown[1]) if unknown else ""
        fail(" ".join(str(message).split()) + hint)

    def _nearest(self, unknown: str) -> str:
        keys = sorted({action.dest for parser in self._parsers() for action in parser._actions})
        name = unknown.rpartition(".")[2]
        # The right name in the wrong place, or else a misspelt one.
        nearest = [key for key in keys if key.rpartition(".")[2] == name]
        nearest = nearest or difflib.get_close_matches(unknown, keys, n=1)
        return f"; the nearest valid key is {nearest[0]}" if nearest else ""

    def _parsers(self) -> list[Any]:
        subcommands = [
            action.choices for action in self._actions if isinstance(action.choices, dict)
        ]
        return [self, *(parser for choices in subcommands for parser in choices.values())]


def fail(message: str, code: int = 2) -> NoReturn:
    """Write one error line to stderr and exit."""
    gather.let_rank_0_speak()
    sys.stderr.write(f"embedtune: error: {message}\n")
    sys.exit(code)
