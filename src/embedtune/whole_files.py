"""The one way to write what others read: a file or folder is whole, or not there.

It is written beside its place, under a name that ends in ``.part``, reaches the disk, and is then
renamed. What a killed process left beside is swept by the next one that writes there.
"""

import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embedtune.errors import InputError

try:
    import fcntl
except ModuleNotFoundError:  # there are none on Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]

PART = ".part"
RANDOM = "[a-z0-9_]" * 8
"""What ``tempfile`` makes a name its own by, as a pattern."""
FORMER = ".former"
"""What a folder is called that is about to be replaced where two cannot be swapped at once."""
AT_WORKING_FOLDER, SWAP = -100, 2
"""Of Linux: AT_FDCWD and RENAME_EXCHANGE."""

LOST = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO") if hasattr(errno, name)}
"""Errors by which the system says that what was written has not reached the disk."""

MAKES = 3
"""Times that a part is made, before the file system is taken for one without locks."""

RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors ends what it says of an error of the system."""


def part_of(path: Path) -> Path:
    """Return where several processes write together what becomes ``path``."""
    return path.with_name(path.name + PART)


def put(part: Path, path: Path) -> None:
    """Let what was written at ``part``, a file or a folder, take the place of ``path``.

    Raises:
        InputError: A file would take that of a folder, and of all that is in it.
    """
    if not part.is_dir():
        refuse_folder(path)
    _reach_disk(part)
    former = path.with_name(path.name + FORMER)
    bring_back(path)
    remove(former)
    is_replaced = part.is_dir() and path.exists()  # files are replaced at once
    is_swapped = is_replaced and _swap(part, path)
    try:
        if not is_swapped:
            if is_replaced:
                path.rename(former)
            part.replace(path)
        _sync(path.parent)
    except OSError:
        if is_swapped:
            _swap(part, path)
        bring_back(path)
        raise
    remove(part if is_swapped else former)


def _swap(one: Path, other: Path) -> bool:
    """Let two names stand for each other's file or folder, at once, where the system can: Linux."""
    swaps = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    names = [(AT_WORKING_FOLDER, os.fsencode(path)) for path in (one, other)]
    return swaps is not None and swaps(*names[0], *names[1], SWAP) == 0


def put_together(parts: Mapping[Path, Path]) -> None:
    """Let files that belong together take their places: all of them, or on an error none.

    A process that is killed meanwhile leaves no file of one kind beside one of the other. The last
    of them is the last to leave its place and the first to take it: it says whose the others are.

    Args:
        parts: Where each file is written, and its place.

    Raises:
        InputError: A file would take the place of a folder.
    """
    for part, path in parts.items():
        refuse_folder(path)
        _reach_disk(part)
    formers = {path: path.with_name(path.name + FORMER) for path in parts.values()}
    held = [path for path in formers if path.exists()]
    try:
        for path in held:
            path.replace(formers[path])
        for part, path in reversed(list(parts.items())):
            part.replace(path)
        for folder in {path.parent for path in formers}:
            _sync(folder)
    except BaseException:
        for path, former in formers.items():
            if path not in held:
                remove(path)
            elif former.exists():
                former.replace(path)
        raise
    for former in formers.values():
        remove(former)


def refuse_folder(path: Path) -> None:
    """Refuse a folder where a file is to go, which would cost all that it holds.

    Raises:
        InputError: There is one.
    """
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"{path}: expected a file or nothing, found a folder: it is not replaced")


def refuse_in_the_way(folder: Path, expected: str) -> None:
    """Refuse a folder that cannot be made, for a file or a dead link has its name or a parent's.

    Args:
        folder: It is there, or is to be made.
        expected: The start of the message, such as ``trainer.default_root_dir: expected a folder``.

    Raises:
        InputError: It names what is in the way.
    """
    for path in (folder, *folder.absolute().parents):
        if path.is_dir():
            return
        if os.path.lexists(path):
            found = f"the file {path}" if path.exists() else f"the link {path}, which leads nowhere"
            raise InputError(f"{expected}, found {found}")


def bring_back(path: Path) -> None:
    """Give a folder its name again, which a killed process took from it to put another there."""
    former = path.with_name(path.name + FORMER)
    if former.is_dir() and not path.exists():
        former.rename(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk be an ``OSError`` that names ``path``: many name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = RUST_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` to write in, which goes with the block.

    What processes that were killed have left of theirs is swept; the folder that holds ``path`` is
    made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    folder, lock = _make_part(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield where to write what becomes ``path`` once the block has ended well.

    Any number of processes may write the same at once; the last one wins, or the first.

    Args:
        path: A file or folder; those that hold it are made.
        keep_existing: Leave alone what another process has put there meanwhile, and may have mapped
            into memory.
    """
    with part_folder(path) as folder, naming(path):
        yield folder / path.name
        if not (keep_existing and path.exists()):
            put(folder / path.name, path)


def _make_part(path: Path) -> tuple[Path, int | None]:
    """Make a folder beside ``path`` and lock it."""
    for _ in range(MAKES):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        lock = _lock(folder)
        if lock is not None and folder.exists():
            break  # else another process took it for a leftover, or nothing can be locked
    folder.mkdir(exist_ok=True)
    return folder, lock


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the parts that killed processes have left in ``folder``, but not what one writes now.

    Args:
        folder: It may hold files of others that end in ``.part``, as downloads do: those stay.
        name: Of what was written; None stands for any.
    """
    of = "*" if name is None else glob.escape(name)
    _sweep(path for path in folder.glob(f".{of}.{RANDOM}{PART}") if path.is_dir())


def sweep_together(folder: Path, names: str) -> None:
    """Remove what killed processes have left in ``folder`` at places of :func:`part_of`.

    And folders that they had replaced, but not removed yet.

    Args:
        folder: Where nobody else writes what ends in this.
        names: A pattern of what was written.
    """
    _sweep(folder.glob(names + PART))
    formers = [path for path in folder.glob(names + FORMER) if path.is_dir()]
    _sweep(former for former in formers if former.with_suffix("").exists())


def _sweep(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        lock = _lock(leftover)
        if lock is not None:
            remove(leftover)
            os.close(lock)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove what is whole, so that a kill leaves it whole, or as what a sweep takes.

    A folder is removed file by file; under its own name a half of it would stay for good.
    """
    if path.is_dir() and not path.is_symlink():
        remove(part_of(path))
        path = path.rename(part_of(path))
    remove(path)


def _lock(path: Path) -> int | None:
    """Lock a path until the returned descriptor is closed, or this process ends however it does.

    Returns:
        None where another process holds the lock, or nothing can be locked.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # gone meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


_held: dict[Path, int] = {}
"""Folders that this process holds, and their descriptors."""


def hold(folder: Path) -> bool:
    """Take a folder for this process, until it gives it back or ends; False if another has it."""
    key = folder.resolve()
    if fcntl is None or key in _held:
        return True
    descriptor = os.open(key, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        pass
    _held[key] = descriptor
    return True


def release(folder: Path) -> None:
    """Give a folder back, if this process holds it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _hold_nothing() -> None:
    """Close what a parent holds: a loader's worker may outlive it for seconds."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hold_nothing)


def _reach_disk(path: Path) -> None:
    """Wait until a file, or all that a folder holds, would survive a loss of power."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if path.is_file():
        _sync(path)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a link to nothing; Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in LOST:
            error.filename = str(path)
            raise
        return  # a file system without it
    finally:
        os.close(descriptor)
