"""Tell a damaged checkpoint from a whole one: a flipped bit in a tensor would load as a weight.

torch saves zip files, which hold a CRC32 of each of their parts, and does not look at it when it
loads. FSDP's shards are such files one after another; what tells where each starts has a digest.
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from embedtune.checkpoints.pickles import FSDP_METADATA, read_fsdp_metadata
from embedtune.digests import refuse_damaged, write_digests
from embedtune.errors import InputError


def refuse_damaged_file(path: Path) -> None:
    """Refuse a file of torch with a part that is not what was saved. It is read as a whole.

    Raises:
        InputError: It names the file.
    """
    with path.open("rb") as file:
        _refuse_damaged_zip(path, file)


def write_shard_digests(folder: Path) -> None:
    """Write the digests of the files of a folder of shards that hold no checksums."""
    metadata = folder / FSDP_METADATA
    if metadata.is_file():
        write_digests(folder, [metadata])


def refuse_damaged_shards(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Refuse a folder of shards with a part that is not what was saved.

    Args:
        folder: Of FSDP or ZeRO, without code (:mod:`embedtune.checkpoints.pickles`).
        share: Which share of its files is read, counted from 0.
        shares: So many read all together.

    Raises:
        InputError: It names the file.
    """
    refuse_damaged(folder)
    files = sorted(path for path in folder.rglob("*.pt") if path.is_file())
    checks: list[Callable[[], None]] = [partial(refuse_damaged_file, path) for path in files]
    if (folder / FSDP_METADATA).is_file():
        places = defaultdict(list)
        for place in read_fsdp_metadata(folder).storage_data.values():
            places[folder / place.relative_path].append((place.offset, place.length))
        checks += [partial(_refuse_damaged_shard, path, places[path]) for path in sorted(places)]
    for check in checks[share::shares]:
        check()


def _refuse_damaged_shard(path: Path, places: list[tuple[int, int]]) -> None:
    if not path.is_file():  # who reads the weights says what is missing
        return
    with path.open("rb") as file:
        for offset, length in places:
            file.seek(offset)
            _refuse_damaged_zip(path, io.BytesIO(file.read(length)))


def _refuse_damaged_zip(path: Path, file: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
    except Exception as error:  # whatever a broken directory of its parts leads to
        raise InputError(f"{path}: is damaged: {error}") from error
    if damaged is not None:
        raise InputError(
            f"{path}: is damaged: expected what was saved, found other bytes in its part {damaged}"
        )
