"""Short names of models and test sets, as tables and charts show them."""

from collections.abc import Sequence
from pathlib import Path

from embedtune.data.testsets import set_name
from embedtune.evaluation.compare import Result
from embedtune.evaluation.metrics import TITLES

NAME = 40
"""Characters of a model's name in a line of the table or the legend."""


def short_names(results: Sequence[Result]) -> dict[str, str]:
    """Return a short name of each model: the last parts of its path, as many as tell it apart."""
    parts = {result.model: Path(result.model).parts for result in results}
    for count in range(2, max(map(len, parts.values()), default=0)):
        labels = {model: "/".join(path[-count:]) for model, path in parts.items()}
        if len(set(labels.values())) == len(parts):
            return labels
    return {model: model for model in parts}


def set_names(results: Sequence[Result], are_paths: bool = True) -> dict[str, str]:
    """Return a name of each test set that tells it apart: its own, or one by its path."""
    if not are_paths:
        return {result.data: result.data for result in results}
    names = {result.data: set_name(Path(result.data)) for result in results}
    if len(set(names.values())) < len(names):
        names = {data: data for data in names}
    return names


def set_titles(results: Sequence[Result], are_paths: bool = True) -> dict[tuple[str, str], str]:
    """Return a title of each test set and main metric: a name that tells it apart, and both."""
    names = set_names(results, are_paths)
    return {(r.data, r.main): f"{names[r.data]}, {TITLES.get(r.main, r.main)}" for r in results}
