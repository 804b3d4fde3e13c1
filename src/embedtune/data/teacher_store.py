"""Teacher embeddings on disk: float32 memory maps whose row i belongs to line i of the data."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.errors import InputError

FLOAT32_BYTES = 4


def sidecar_path(memmap: Path) -> Path:
    """Return where the description of a memory map lies: its own name with ``.json`` added."""
    return memmap.with_name(memmap.name + ".json")


class TeacherStore:
    """One or several float32 memory maps read side by side as one matrix ``[rows, width]``.

    Several stores are concatenated along the width when a row is read: nothing is written anew.
    A memory map is checked against the number of rows before the first read, because a wrong
    width would not fail: it would read misaligned vectors.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        rows: int,
        width: int | None = None,
        queries_digest: str | None = None,
    ) -> None:
        """Open the memory maps.

        Args:
            paths: The files, each ``rows * its width * 4`` bytes.
            rows: Number of rows of the data.
            width: Width of all files together; None takes it from the files' sizes.
            queries_digest: Digest of the data's queries, compared with a sidecar that has one.

        Raises:
            InputError: A file is missing, or does not hold ``rows`` rows, or other texts' rows.
        """
        self._maps = [self._open(Path(path), rows, queries_digest) for path in paths]
        self.width = sum(store.shape[1] for store in self._maps)
        if width is not None and width != self.width:
            widths = " + ".join(str(store.shape[1]) for store in self._maps)
            raise InputError(
                f"data.teacher_embedding_dim: found {width}, but {_names(paths)} with {rows} rows "
                f"hold {widths} = {self.width} values a row"
            )

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the teacher embedding of one row, float32 ``[width]``."""
        return np.concatenate([store[row] for store in self._maps])

    @staticmethod
    def _open(path: Path, rows: int, queries_digest: str | None) -> np.memmap:
        if not path.is_file():
            raise InputError(
                f"data.teacher_path: expected a float32 memory map, found no file {path}"
            )
        size = path.stat().st_size
        width, rest = divmod(size, rows * FLOAT32_BYTES)
        if rest or not width:
            raise InputError(
                f"{path}: expected {rows} rows of float32 (a multiple of {rows * FLOAT32_BYTES} "
                f"bytes), found {size} bytes"
            )
        if sidecar_path(path).is_file():
            known = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
            if (known["rows"], known["width"]) != (rows, width):
                raise InputError(
                    f"{path}: expected {rows} rows for this data, but its description says "
                    f"{known['rows']} rows of width {known['width']}"
                )
            if queries_digest is not None and known["queries_digest"] != queries_digest:
                raise InputError(
                    f"{path}: expected the embeddings of this data's texts in their order, "
                    "found those of other texts or of another order"
                )
        return np.memmap(path, dtype=np.float32, mode="r", shape=(rows, width))


def _names(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths))


class TeacherWriter:
    """Write a memory map row block by row block, and its description when complete."""

    def __init__(self, path: Path, rows: int, width: int) -> None:
        """Create the file at its full size."""
        self.path = path
        self._map = np.memmap(path, dtype=np.float32, mode="w+", shape=(rows, width))
        self._next = 0

    def write(self, embeddings: np.ndarray) -> None:
        """Append a block ``[n, width]``."""
        self._map[self._next : self._next + len(embeddings)] = embeddings
        self._next += len(embeddings)

    def close(self, queries_digest: str, **about: str) -> None:
        """Flush, and write the description that a :class:`TeacherStore` checks."""
        rows, width = self._map.shape
        assert self._next == rows, "every row is written exactly once"
        self._map.flush()
        known = {"rows": rows, "width": width, "queries_digest": queries_digest, **about}
        sidecar_path(self.path).write_text(json.dumps(known, indent=2), encoding="utf-8")


def open_teacher(
    rows: Rows, paths: str | Sequence[str] | None, width: int | None, key: str
) -> TeacherStore | None:
    """Open the teacher's embeddings of ``rows``, None for rows that have no teacher.

    Args:
        rows: The rows; row i of the store is for row i of these.
        paths: Memory maps; several are concatenated along the width.
        width: Of all of them together, None takes it from the files' sizes.
        key: The YAML key that ``paths`` were given under, for messages.

    Raises:
        InputError: Distill rows have no teacher, others have one, or the store is not of the rows.
    """
    is_distill = rows.format == Format.DISTILL
    if is_distill and paths is None:
        raise InputError(
            f"{key}: expected the teacher's memory map for distill data, found nothing"
        )
    if paths is not None and not is_distill:
        raise InputError(
            f"{key}: expected distill data (rows of 'query' alone), found {rows.format} rows"
        )
    if paths is None:
        return None
    stores = [paths] if isinstance(paths, str) else list(paths)
    return TeacherStore(stores, len(rows), width, rows.queries_digest)
