"""Parsers that answer a misspelt key in one line, with the nearest valid one."""

import re
from enum import Enum
from typing import Any, NoReturn

import jsonargparse
import yaml

from embedtune.cli.mistakes import fail, nearest

UNKNOWN_KEY = re.compile(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)")
"""How jsonargparse and argparse word that they do not know a key."""


# A default of a str, such as that of Lightning's Timer, may be one of an enumeration.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, one: dumper.represent_data(one.value))


class Parser(jsonargparse.ArgumentParser):
    """The parser of a command without a Trainer, and what every parser answers."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Take keys as they are: a part of one would pass by ``config_files``."""
        super().__init__(*args, allow_abbrev=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write one message, without the usage, and exit with code 2."""
        unknown = UNKNOWN_KEY.search(str(message))
        hint = self._nearest(unknown[1]) if unknown else ""
        fail(" ".join(str(message).split()) + hint)

    def _nearest(self, unknown: str) -> str:
        actions = [action for parser in self._parsers() for action in parser._actions]
        # One that follows from another has no flag.
        keys = sorted({a.dest for a in actions if all(s[0] == "-" for s in a.option_strings)})
        name = unknown.rpartition(".")[2]
        # The right name in the wrong place, or else a misspelt one.
        misplaced = [key for key in keys if key.rpartition(".")[2] == name]
        found = misplaced[0] if misplaced else nearest(unknown, keys)
        return f"; the nearest valid key is {found}" if found else ""

    def _parsers(self) -> list[Any]:
        subcommands = [
            action.choices for action in self._actions if isinstance(action.choices, dict)
        ]
        return [self, *(parser for choices in subcommands for parser in choices.values())]
