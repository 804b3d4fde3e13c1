"""Look at YAML before jsonargparse does, which would end with a traceback or not at all."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import yaml

from embedtune.errors import InputError

CONFIG = "config"
SECTIONS = ("model", "data", "trainer", "checkpoint")
"""Keys whose value may be a file as well, on the command line and in a configuration."""
DATA_SEED = re.compile(r"(\w+\.)?data\.seed")
"""It follows from another key; also below a command's name."""
CLASS = re.compile(rf"(\w+\.)?({'|'.join(SECTIONS)})\.class_path")
FROM_PYTHON = "a class of one's own is used from Python"
MERGE = "tag:yaml.org,2002:merge"
MOST_VALUES = 100_000
"""Values of a file once all its aliases are written out; a run has some hundred."""


def refuse_broken_configs(args: Sequence[str]) -> None:
    """Refuse what cannot be a configuration among the files and the YAML that ``args`` give.

    Raises:
        InputError: A file cannot be read, is not YAML in UTF-8, or does not hold keys, or a section
            of it does not; a key is there twice, follows from another, or names a section's class.
    """
    for key, value in _given(args):
        if key in (CONFIG, *SECTIONS):
            _refuse_broken(key, value, Path())
        elif CLASS.fullmatch(key):
            raise InputError(f"expected other keys, found --{key}; {FROM_PYTHON}")


def _given(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys of flags and their values, which may be joined to them."""
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        if arg.startswith("--"):
            key, joined, value = arg[2:].partition("=")
            yield key, value if joined else following
        elif arg.startswith("-c"):
            yield CONFIG, arg[2:].removeprefix("=") or following


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key that is there twice: YAML itself would keep the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:  # as they are written: what << merges is not among them yet
            found, line = (key.tag, key.value), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            if found in lines:
                again = f"found the key {key.value} of line {lines[found]} again in line {line}"
                raise yaml.YAMLError(again)
            lines[found] = line
        return node


def _refuse_broken(key: str, value: str, folder: Path) -> None:
    path = folder / value
    is_file = os.path.isfile(path)  # else a configuration itself
    place = str(path) if is_file else f"--{key}"
    config = _read(place, path if is_file else value)
    if isinstance(config, dict):
        _refuse_keys(place, config if key == CONFIG else {key: config})
    elif is_file:
        _refuse_no_keys(place, config, "an empty file")
    elif key != CONFIG and value:
        found = f"found {value!r}; {FROM_PYTHON}"
        raise InputError(f"{place}: expected a YAML file, or keys and their values, {found}")
    for section in SECTIONS if key == CONFIG and isinstance(config, dict) else ():
        held = config.get(section, {})
        if isinstance(held, str):
            _refuse_broken(section, held, path.parent if is_file else folder)
        elif not isinstance(held, dict):
            # It would take away what an earlier file says in this section.
            _refuse_no_keys(f"{place}: {section}", held, "nothing")


def _refuse_no_keys(place: str, found: Any, nothing: str) -> NoReturn:
    found = nothing if found is None else f"a {type(found).__name__}"
    raise InputError(f"{place}: expected keys and their values, found {found}")


def _read(place: str, given: Path | str) -> Any:
    try:
        text = given if isinstance(given, str) else given.read_text(encoding="utf-8")
        config = _Loader(text).get_single_data()
        size = _size(config, {})
    except OSError as error:
        raise InputError(f"{place}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: expected YAML in UTF-8, found {error.reason}") from None
    except RecursionError:
        found = "values nested too deep or within themselves"
        raise InputError(f"{place}: expected YAML, found {found}") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise InputError(f"{place}: expected YAML: {said}") from None
    if size > MOST_VALUES:
        raise InputError(f"{place}: expected a configuration, found aliases of {size} values")
    return config


def _refuse_keys(place: str, config: dict[Any, Any]) -> None:
    """Refuse a key that is there dotted and nested, or that nobody would read."""
    for name, count in Counter(_dotted(config)).items():
        if count > 1:
            raise InputError(f"{place}: expected each key once, found {name} dotted and nested")
        if DATA_SEED.fullmatch(name):
            expected = "seed_everything, which is the seed of the data too"
            raise InputError(f"{place}: expected {expected}, found {name}")
        if CLASS.fullmatch(name):
            raise InputError(f"{place}: expected other keys, found {name}; {FROM_PYTHON}")


def _dotted(config: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


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
