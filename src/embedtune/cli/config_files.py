"""Look at YAML files before jsonargparse does, which would end with a traceback or not at all."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from embedtune.errors import InputError

FLAGS = ("-c", "--config")
MOST_VALUES = 100_000
"""Values of a file once all its aliases are written out; a run has some hundred."""


def refuse_broken_configs(args: Sequence[str]) -> None:
    """Refuse what cannot be a configuration among the files that ``args`` name.

    Raises:
        InputError: A file cannot be read, is not YAML in UTF-8, or does not hold keys.
    """
    joined = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    for name in [*joined, *(value for flag, value in pairwise(args) if flag in FLAGS)]:
        path = Path(name)
        if "\n" not in name and path.is_file():  # else a configuration itself
            _refuse_broken(path)


def _refuse_broken(path: Path) -> None:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _size(config, {})
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected YAML in UTF-8, found {error.reason}") from None
    except RecursionError:
        found = "values nested too deep or within themselves"
        raise InputError(f"{path}: expected YAML, found {found}") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise InputError(f"{path}: expected YAML: {said}") from None
    if size > MOST_VALUES:
        raise InputError(f"{path}: expected a configuration, found aliases of {size} values")
    if not isinstance(config, dict):
        found = "an empty file" if config is None else f"a {type(config).__name__}"
        raise InputError(f"{path}: expected keys and their values, found {found}")


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values within one, those of an alias each time.

    Raises:
        RecursionError: A value is within itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]
