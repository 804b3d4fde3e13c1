"""Arrow tables on disk: where they are kept, how they get there, and which of them go again."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa

from embedtune.errors import InputError
from embedtune.whole_files import writing

GB = 10**9
LIMIT = 100
"""GB that all tables may take, unless ``$EMBEDTUNE_CACHE_LIMIT`` says otherwise."""
IN_USE = 3600
"""Seconds for which a table stays after it was opened, whatever the limit."""


class Table(NamedTuple):
    """A cached table: its file, its bytes with what is said of it, and when it was last opened."""

    path: Path
    size: int
    used: float


def cache_folder() -> Path:
    """Return where Arrow tables are kept: ``$EMBEDTUNE_CACHE``, or beside those of ``datasets``."""
    default = Path(datasets.config.HF_DATASETS_CACHE) / "embedtune"
    return Path(os.environ.get("EMBEDTUNE_CACHE", default))


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a table batch by batch; one that another process has written meanwhile stays.

    Tables that were not opened for the longest time make room for it.
    """
    limit = _limit()
    with (
        writing(path, keep_existing=True) as part,
        pa.OSFile(str(part), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
    _keep_within(limit, path)


def map_table(path: Path) -> datasets.Dataset:
    """Return the rows of a table, which stay on disk until they are read."""
    with contextlib.suppress(OSError):  # a cache of somebody else's
        os.utime(path)
    return datasets.Dataset.from_file(str(path))


def cached_tables() -> list[Table]:
    """Return the tables of the cache, the one that was opened last first."""
    tables = []
    for path in cache_folder().glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            about = path.with_suffix(".json")
            size = path.stat().st_size + (about.stat().st_size if about.exists() else 0)
            tables.append(Table(path, size, path.stat().st_mtime))
    return sorted(tables, key=lambda table: -table.used)


def remove_table(table: Table) -> None:
    """Remove a table. A process that has it open keeps what it has."""
    for path in (table.path, table.path.with_suffix(".json")):
        path.unlink(missing_ok=True)


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
