"""Tell damage from data: digests of what was written, compared where it is read as a whole.

Files of torch carry checksums of their own (``checkpoints.damage``); the others are kept beside a
digest: XXH3 of 128 bits, which takes a tenth of the time of reading from a disk. It is no proof
against people, who can write the digest anew.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import xxhash

from embedtune.errors import InputError
from embedtune.whole_files import write_text

DIGESTS = "digests.xxh128"
"""File beside those it tells the digests of, as ``xxhsum --check`` reads it."""

COMMENT = "# "
"""How a line of it starts that ``xxhsum --check`` passes over."""

Hasher = xxhash.xxh3_128
"""Takes bytes by ``update``, and tells their ``hexdigest``."""


def digest_of(path: Path) -> str:
    """Return the digest of a file, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, Hasher).hexdigest()


def write_digests(folder: Path, files: Iterable[Path], others: Iterable[Path] = ()) -> None:
    """Write the digests of some files of a folder into it, by their names in it.

    Args:
        folder: It holds all of them.
        files: Those that must stay as they are.
        others: Those that may be edited, which are named alone, in comments.
    """
    lines = [f"{digest_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    lines += [f"{COMMENT}{path.relative_to(folder).as_posix()}\n" for path in others]
    write_text(folder / DIGESTS, "".join(lines))


def written_names(folder: Path) -> set[str]:
    """Return the names of the files that :func:`write_digests` tells of; none without any."""
    known = folder / DIGESTS
    if not known.is_file():
        return set()
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines()
    digested = {line.partition("  ")[2] for line in lines if not line.startswith(COMMENT)}
    return {DIGESTS} | digested | {line[2:] for line in lines if line.startswith(COMMENT)}


def refuse_damaged(folder: Path) -> None:
    """Refuse a folder where a file is not what was written; those that nothing is said of may be.

    Raises:
        InputError: It names the file.
    """
    known = folder / DIGESTS
    if not known.is_file():  # of an older version, or of somebody else
        return
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    # Who reads the folder says what is missing.
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        expected = digests.get(path.relative_to(folder).as_posix())
        if expected is not None and digest_of(path) != expected:
            raise InputError(
                f"{path}: is damaged: expected the bytes that were written, found others "
                f"(if they were changed on purpose, remove {known})"
            )
