"""Arrow tables on disk: where they are kept, how they get there, and which of them go again.

A file holds a stream of Arrow, which knows its own end; what is said of the table, as JSON; the
length of that; and the digest of all before. A table that is damaged is made anew.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from embedtune.digests import Hasher
from embedtune.errors import InputError
from embedtune.whole_files import refuse_in_the_way, sweep, writing

log = logging.getLogger("embedtune")

GB = 10**9
LIMIT = 100
"""GB that all tables may take, unless ``$EMBEDTUNE_CACHE_LIMIT`` says otherwise."""
NAMES = f"{'[0-9a-f]' * 32}.arrow"
"""A pattern of the names of all tables, digests: other files in their folder are others'."""
IN_USE = 3600
"""Seconds for which a table stays after it was opened, whatever the limit."""


BLOCK = 2**20
"""Bytes that are read at once."""
LENGTH_BYTES = 8
DIGEST_BYTES = Hasher().digest_size
Facts = dict[str, Any]
"""What is said of a table, as JSON holds it."""


class Table(NamedTuple):
    """A cached table: its file, its bytes, and when it was last opened."""

    path: Path
    size: int
    used: float


def cache_folder() -> Path:
    """Return where Arrow tables are kept: ``$EMBEDTUNE_CACHE``, or beside those of ``datasets``.

    Raises:
        InputError: It cannot be made.
    """
    default = Path(datasets.config.HF_DATASETS_CACHE) / "embedtune"
    given = Path(os.environ.get("EMBEDTUNE_CACHE") or default)
    expected = "EMBEDTUNE_CACHE: expected a folder"
    try:
        folder = given.expanduser()
    except RuntimeError:
        raise InputError(f"{expected}, found {given}: {given.parts[0]} is not known") from None
    refuse_in_the_way(folder, expected)
    return folder


def open_table(
    path: Path,
    schema: pa.Schema,
    write: Callable[[], Iterator[pa.RecordBatch]],
    facts: Callable[[], Facts] = dict,
) -> tuple[datasets.Dataset, Facts]:
    """Return the rows of a table, which stay on disk until they are read, and what is said of it.

    It is written where there is none, or none that is whole. Tables that were not opened for the
    longest time make room for it.

    Args:
        path: Where it is kept.
        schema: Its columns.
        write: Yields its rows.
        facts: Returns what is said of it, when all are written.

    Raises:
        InputError: ``$EMBEDTUNE_CACHE_LIMIT`` is no number of GB.
    """
    limit = _limit()
    sweep(path.parent)  # none of the others' leftovers has a name that is written again
    is_there = path.exists()
    if is_there:
        _touch(path)  # so that no other process makes room of it while it is read
    if is_there and not _is_whole(path):
        log.warning("%s: is damaged, and made anew", path)
    elif is_there:
        return _map(path)
    # One that another process has written meanwhile stays.
    with writing(path, keep_existing=not is_there) as part:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in write():
                writer.write_batch(batch)
        _seal(part, facts())
    _keep_within(limit, path)
    return _map(path)


def _seal(path: Path, facts: Facts) -> None:
    said = json.dumps(facts).encode()
    with path.open("ab") as file:
        file.write(said + len(said).to_bytes(LENGTH_BYTES))
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, Hasher).digest()
        file.write(digest)


def _is_whole(path: Path) -> bool:
    hasher, left = Hasher(), path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, BLOCK))):
            hasher.update(block)
            left -= len(block)
        return file.read() == hasher.digest()


def _touch(path: Path) -> None:
    """Mark a table as used now."""
    with contextlib.suppress(OSError):  # a cache of somebody else's
        os.utime(path)


def _map(path: Path) -> tuple[datasets.Dataset, Facts]:
    with path.open("rb") as file:
        file.seek(-DIGEST_BYTES - LENGTH_BYTES, os.SEEK_END)
        end = file.tell()
        length = int.from_bytes(file.read(LENGTH_BYTES))
        file.seek(end - length)
        return datasets.Dataset.from_file(str(path)), json.loads(file.read(length))


def cached_tables() -> list[Table]:
    """Return the tables of the cache, the one that was opened last first."""
    tables = []
    for path in cache_folder().glob(NAMES):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            tables.append(Table(path, path.stat().st_size, path.stat().st_mtime))
    return sorted(tables, key=lambda table: -table.used)


def remove_table(table: Table) -> None:
    """Remove a table. A process that has it open keeps what it has."""
    table.path.unlink(missing_ok=True)


def _keep_within(limit: float, new: Path) -> None:
    taken = 0
    for table in cached_tables():
        taken += table.size
        is_kept = table.path == new or time.time() - table.used < IN_USE
        if taken > limit and not is_kept:
            remove_table(table)


def _limit() -> float:
    given = os.environ.get("EMBEDTUNE_CACHE_LIMIT", str(LIMIT))
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise InputError(f"EMBEDTUNE_CACHE_LIMIT: expected GB, 0 or more, found {given!r}")
    return limit * GB
