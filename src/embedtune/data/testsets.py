"""Test sets by path and by name: a BEIR folder, or a jsonl file of scored pairs."""

import glob
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from embedtune.data.beir import RetrievalSet, is_beir, read_beir
from embedtune.data.scored_pairs import ScoredPairs, read_scored
from embedtune.errors import InputError


def set_name(path: Path) -> str:
    """Return a short name of the test set at ``path``.

    >>> set_name(Path("sets/scifact")), set_name(Path("sets/scifact/qrels/dev.tsv"))
    ('scifact', 'scifact')
    >>> set_name(Path("sts/dev.jsonl.gz"))
    'dev'
    """
    path = path.absolute()
    return path.parent.parent.name if path.suffix == ".tsv" else path.name.partition(".jsonl")[0]


def open_testset(path: Path, splits: Sequence[str] = ("test",)) -> RetrievalSet | ScoredPairs:
    """Read a BEIR folder, one of its qrels files, or a jsonl file of scored pairs.

    Args:
        path: Where it is.
        splits: See :func:`read_beir`.

    Raises:
        InputError: There is nothing, or it cannot be read.
    """
    if path.is_dir() or path.suffix == ".tsv":
        return read_beir(path, splits)
    if not path.is_file():
        kinds = "a BEIR folder, one of its qrels files or a jsonl file of scored pairs"
        raise InputError(f"{path}: expected {kinds}, found nothing")
    return read_scored(path)


def _folders(spec: str) -> list[str]:
    """Return the BEIR folders that a glob stands for, anything else as it is."""
    found = [] if Path(spec).exists() else sorted(glob.glob(spec, recursive=True))
    return found if found and all(is_beir(Path(path)) for path in found) else [spec]


def _paths(spec: Any, place: str) -> list[str]:
    """Return a path, or several, as a list."""
    paths = [spec] if isinstance(spec, str | PathLike) else spec
    if isinstance(paths, list | tuple) and all(isinstance(path, str | PathLike) for path in paths):
        return [str(path) for path in paths]
    raise InputError(f"{place}: expected a path or a list of paths, found {spec!r}")


def name_sets(spec: str | Sequence[Any] | dict[str, Any] | None, key: str) -> dict[str, list[str]]:
    """Name the data sets that a run evaluates.

    Args:
        spec: What the user gave: a path, several, or paths by name. Every BEIR folder is a set of
            its own; files that have no name of their own are one set together.
        key: The YAML key it was given under, for messages.

    Returns:
        The paths of each set. A set that was given no name has that of its folder or first file.

    Raises:
        InputError: A name is taken twice, or cannot be part of a metric's name; what is named is
            no path.
    """
    if isinstance(spec, dict):
        # A YAML key may be a number.
        given = [(str(name), _paths(paths, f"{key}: {name}")) for name, paths in spec.items()]
        named = [(name, [path for one in paths for path in _folders(one)]) for name, paths in given]
    else:
        paths = [path for one in _paths(spec or (), key) for path in _folders(one)]
        folders = [path for path in paths if is_beir(Path(path))]
        files = [path for path in paths if path not in folders]
        groups = [[path] for path in folders] + ([files] if files else [])
        named = [(set_name(Path(group[0])), group) for group in groups]
    sets: dict[str, list[str]] = {}
    for name, group in named:
        if name in sets:
            raise InputError(f"{key}: expected a name for each set, found {name!r} twice")
        if not name or "/" in name:
            raise InputError(f"{key}: expected names without '/', found {name!r}")
        if not group:
            raise InputError(f"{key}: {name}: expected a path, found an empty list")
        if len(group) > 1 and any(is_beir(Path(path)) for path in group):
            raise InputError(f"{key}: {name}: expected one BEIR folder or files, found {group}")
        sets[name] = group
    return sets
