"""Arrow tables on disk: where they are kept, and how they are written and mapped into memory."""

import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa

from embedtune.whole_files import writing


def cache_folder() -> Path:
    """Return where Arrow tables are kept: ``$EMBEDTUNE_CACHE``, or beside those of ``datasets``."""
    default = Path(datasets.config.HF_DATASETS_CACHE) / "embedtune"
    return Path(os.environ.get("EMBEDTUNE_CACHE", default))


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a table batch by batch; one that another process has written meanwhile stays."""
    with (
        writing(path, keep_existing=True) as part,
        pa.OSFile(str(part), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def map_table(path: Path) -> datasets.Dataset:
    """Return the rows of a table, which stay on disk until they are read."""
    return datasets.Dataset.from_file(str(path))
