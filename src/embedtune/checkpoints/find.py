"""Find the checkpoints of a fit."""

import contextlib
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedtune.checkpoints.read import read_facts
from embedtune.checkpoints.shards import kind_of
from embedtune.errors import InputError
from embedtune.whole_files import FORMER

LAST = "last.ckpt"
"""Name of the link to the latest checkpoint of a fit."""


def folder_of(callbacks: Iterable[Any]) -> Path | None:
    """Return the folder where the first of a Trainer's checkpoint callbacks that has one saves."""
    folders = (getattr(callback, "dirpath", None) for callback in callbacks)
    return next(map(Path, filter(None, folders)), None)


def places_of(keepers: Iterable[Any]) -> dict[Path, int]:
    """Return the folders where callbacks save checkpoints, and how deep in it their names lead.

    A metric's name in ``checkpoint.filename`` makes folders of its own.
    """
    places: dict[Path, int] = {}
    for keeper in keepers:
        if keeper.dirpath:
            folder, depth = Path(keeper.dirpath).resolve(), (keeper.filename or "").count("/")
            places[folder] = max(depth, places.get(folder, 0))
    return places


def names_of(filename: str | None, with_names: bool = True) -> str:
    """Return a glob of the file names that ``checkpoint.filename`` comes to, folders among them.

    Args:
        filename: As Lightning fills it in.
        with_names: Whether it writes the name of a metric before its value.

    >>> names_of("{epoch}-{val/sts/spearman:.4f}")
    'epoch*-val/sts/spearman*.ckpt'
    """
    parts = re.split(r"\{([^}:\[]*)[^}]*\}", filename or "")  # every second is a metric's name
    for i, part in enumerate(parts):
        is_name = i % 2 == 1
        parts[i] = glob.escape(part) * (with_names or not is_name) + "*" * is_name
    return "".join(parts).removesuffix("*") + "*.ckpt"


def last_checkpoint(folder: Path, names: str = "*.ckpt") -> Path | None:
    """Return the checkpoint of a fit's folder to go on from, None where there is none.

    That is ``last.ckpt``, unless a later run that does not write it has saved a later step; or the
    newest whole one, if a fit was killed before it could link it.

    Args:
        folder: Where it saves.
        names: A glob of the names that it saves under, which may lead to folders in there.
    """
    paths = {*Path(folder).glob("*.ckpt"), *Path(folder).glob(f"*.ckpt{FORMER}")}
    paths |= set(Path(folder).glob(names))
    found = sorted(paths, key=lambda path: path.lstat().st_mtime, reverse=True)
    whole = [path for path in found if _is_whole(path)]
    last = Path(folder) / LAST
    if last not in whole:
        return next(iter(whole), None)
    newer = whole[: whole.index(last)]  # a copied folder has other times
    return next((path for path in newer if step_of(path) > step_of(last)), last)


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(InputError):
        kind_of(path)
        return True
    return False


def step_of(path: Path) -> int:
    """Return the optimiser steps that a checkpoint was saved after, -1 of one that is damaged."""
    with contextlib.suppress(InputError):
        return int(read_facts(path).get("global_step", 0))
    return -1


def moved(path: str, folder: str | Path | None, now: Path) -> Path:
    """Return where a checkpoint lies whose folder has moved; a metric's name may make more folders.

    Args:
        path: Where it was.
        folder: The folder that it was saved in.
        now: Where that is.

    >>> moved("/old/checkpoints/val/ndcg=0.5.ckpt", "/old/checkpoints", Path("run")).as_posix()
    'run/val/ndcg=0.5.ckpt'
    """
    was, saved_in = Path(path), Path(folder or "")
    return now / (was.relative_to(saved_in) if was.is_relative_to(saved_in) else was.name)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a fit's folder by ``checkpoint.monitor``, None without one."""
    last = last_checkpoint(folder)
    states = {} if last is None else read_facts(last).get("callbacks", {})
    for name, state in states.items():
        if name.startswith("ModelCheckpoint") and state.get("monitor"):
            path = moved(state["best_model_path"], state.get("dirpath"), Path(folder))
            return path if state["best_model_path"] and path.exists() else None
    return None
