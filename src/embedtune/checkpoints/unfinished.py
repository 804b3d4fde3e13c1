"""Finish what a fit had begun to save when it was killed."""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune.checkpoints.find import LAST, last_checkpoint, moved
from embedtune.checkpoints.read import read_facts
from embedtune.errors import InputError
from embedtune.whole_files import discard, part_of, put, remove


def finish_save(keepers: Iterable[ModelCheckpoint], saved: Path) -> None:
    """Delete the checkpoints that a later one replaced, and let ``last.ckpt`` be that one.

    Lightning does both after it has saved; a fit that was killed in between has left the former
    ones, which no later save would know of, and a ``last.ckpt`` that is one of them, or nothing.

    Args:
        keepers: Callbacks of the fit that goes on.
        saved: The checkpoint that it has gone on from, the latest of its folder.
    """
    folder = saved.parent
    last = folder / LAST
    own = [keeper for keeper in keepers if Path(str(keeper.dirpath)).resolve() == folder.resolve()]
    is_former = saved.suffix != last.suffix  # it was about to be replaced, by the same name
    if not own or saved == last or is_former or last_checkpoint(folder) != saved:
        return
    before: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # it leads nowhere, or is damaged
        before = read_facts(last)
    now = read_facts(saved)
    for path in _kept(before, own, folder) - _kept(now, own, folder) - {saved}:
        discard(path)
    asked = {keeper.save_last for keeper in own}
    if "link" in asked:
        remove(last)
        last.symlink_to(saved.name)
    elif True in asked:
        part = part_of(last)
        remove(part)
        (shutil.copytree if saved.is_dir() else shutil.copyfile)(saved, part)
        put(part, last)


def _kept(facts: dict[str, Any], keepers: list[ModelCheckpoint], folder: Path) -> set[Path]:
    """Return the checkpoints that those callbacks knew of which delete some, when one was saved."""
    kept: set[Path] = set()
    for keeper in keepers:
        state = facts.get("callbacks", {}).get(keeper.state_key, {})
        paths = state.get("best_k_models", {}) if keeper.monitor else [state.get("best_model_path")]
        if keeper.monitor or keeper.save_top_k == 1:  # with 1 a save replaces the one before
            kept |= {moved(path, state.get("dirpath"), folder) for path in paths if path}
    return kept
