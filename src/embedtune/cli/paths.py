"""The folders, file names and checkpoints that a command is given, looked at before a model is."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune.checkpoints.read import read_facts
from embedtune.cli.mistakes import first_line
from embedtune.errors import InputError
from embedtune.whole_files import refuse_in_the_way

CHECKPOINT_NAMES = ("last", "best")
"""Values of ``ckpt_path`` that are no paths."""


def refuse_paths(config: Any) -> None:
    """Refuse what leads nowhere.

    Args:
        config: That of a command.

    Raises:
        InputError: It names the key.
    """
    _refuse_no_folder("trainer.default_root_dir", config.trainer.default_root_dir)
    checkpoints = Path(config.trainer.default_root_dir, "checkpoints")
    refuse_in_the_way(checkpoints, "trainer.default_root_dir: expected a folder")
    if config.checkpoint.dirpath is not None:
        _refuse_no_folder("checkpoint.dirpath", config.checkpoint.dirpath)
    _refuse_filename(config.checkpoint.filename)
    if config.ckpt_path not in (None, *CHECKPOINT_NAMES):
        _refuse_no_checkpoint(Path(config.ckpt_path))


def _refuse_no_folder(key: str, given: Any) -> None:
    found = None
    if given is None:
        found = "null"
    elif "://" in str(given):
        found = f"the URL {given}"
    if found is not None:
        raise InputError(f"{key}: expected a folder of this machine, found {found}")
    refuse_in_the_way(Path(given), f"{key}: expected a folder")


class AnyMetric(dict[str, float]):
    """A number for each name that a file name may ask for."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: Any) -> float:
        if isinstance(name, str):
            return 0.5
        raise KeyError(name)


def _refuse_filename(given: str | None) -> None:
    """Refuse what Lightning would fill in after an epoch, and raise of or follow elsewhere."""
    expected = "checkpoint.filename: expected a file name such as {epoch}-{step}, found"
    numbers: Any = AnyMetric(epoch=0, step=0)
    try:
        filled = Path(ModelCheckpoint().format_checkpoint_name(numbers, given))
    except Exception as error:  # whatever str.format leads to
        raise InputError(f"{expected} {given!r}: {first_line(error)}") from error
    if filled.is_absolute() or ".." in filled.parts:
        raise InputError(f"{expected} the path {given!r}; checkpoint.dirpath names the folder")


def _refuse_no_checkpoint(path: Path) -> None:
    if not path.exists():
        raise InputError(
            f"ckpt_path: expected a checkpoint or one of {', '.join(CHECKPOINT_NAMES)}, "
            f"found nothing at {path}"
        )
    try:
        read_facts(path)
    except InputError as error:
        raise InputError(f"ckpt_path: {error}") from error
