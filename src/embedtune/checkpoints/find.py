"""Find the checkpoints of a fit."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedtune.checkpoints.read import read_facts
from embedtune.checkpoints.shards import kind_of
from embedtune.errors import InputError
from embedtune.whole_files import FORMER


def folder_of(callbacks: Iterable[Any]) -> Path | None:
    """Return the folder where the first of a Trainer's checkpoint callbacks that has one saves."""
    folders = (getattr(callback, "dirpath", None) for callback in callbacks)
    return next(map(Path, filter(None, folders)), None)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a fit's folder to go on from, None where there is none.

    That is ``last.ckpt``; or the newest whole one, if a fit was killed before it could link it.
    """
    paths = [*Path(folder).glob("*.ckpt"), *Path(folder).glob(f"*.ckpt{FORMER}")]
    found = sorted(paths, key=lambda path: path.lstat().st_mtime)
    for path in (Path(folder) / "last.ckpt", *reversed(found)):
        with contextlib.suppress(InputError):
            kind_of(path)
            return path
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a fit's folder by ``checkpoint.monitor``, None without one."""
    last = last_checkpoint(folder)
    states = {} if last is None else read_facts(last).get("callbacks", {})
    for name, state in states.items():
        if name.startswith("ModelCheckpoint") and state.get("monitor"):
            # By its name in the folder, which may have been moved.
            path = Path(folder) / Path(state["best_model_path"]).name
            return path if state["best_model_path"] and path.exists() else None
    return None
