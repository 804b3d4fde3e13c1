"""Teacher embeddings on disk: float32 memory maps whose row i belongs to line i of the data."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from embedtune.data.lines import describe_value, unreadable
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.digests import Hasher, digest_of
from embedtune.errors import InputError
from embedtune.whole_files import naming, part_folder, put_together

log = logging.getLogger("embedtune")

FLOAT32_BYTES = 4
VALUES_PER_CHECK = 2**22
"""Values that are checked at once: 16 MiB of a store."""

NPY_MAGIC = b"\x93NUMPY"
OTHER_TYPES = ("<f2", "<f8", ">f4")
WIDEST_SPREAD, ORDINARY_SPREAD = 6.0, 4.0
"""Standard deviations of the values' exponents: that of normally distributed values is below 2."""
FEWEST = 64
"""Values of which a spread tells what chance would not."""


class Description(NamedTuple):
    """What is said of a memory map in the file beside it; those of old ones have no digest."""

    rows: int
    width: int
    queries_digest: str
    digest: str | None = None


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
            InputError: A file is missing, damaged or cannot be read, does not hold ``rows`` rows,
                or other texts' rows, or values that are not finite or of another type.
        """
        self._maps = [self._open(Path(path), rows, queries_digest) for path in paths]
        self.widths = [store.shape[1] for store in self._maps]
        self.width = sum(self.widths)
        if width is not None and width != self.width:
            widths = " + ".join(map(str, self.widths))
            raise InputError(
                f"data.teacher_embedding_dim: found {width}, but {_names(paths)} with {rows} rows "
                f"hold {widths} = {self.width} values a row"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what would be sent to another process as a copy of the whole file."""
        return {**vars(self), "_maps": [(store.filename, store.shape) for store in self._maps]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files, which were checked where they were opened."""
        vars(self).update(state, _maps=[_map(*place) for place in state["_maps"]])

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the teacher embedding of one row, float32 ``[width]``."""
        return np.concatenate([store[row] for store in self._maps])

    @staticmethod
    def _open(path: Path, rows: int, queries_digest: str | None) -> np.memmap:
        if not path.is_file():
            raise InputError(
                "data.teacher_path: expected a float32 memory map, such as the embeddings.f32 in a "
                f"folder of embedtune teach, found {'the folder' if path.is_dir() else 'no file'} "
                f"{path}"
            )
        known = read_description(path)
        try:
            with path.open("rb") as file:
                is_npy = file.read(len(NPY_MAGIC)) == NPY_MAGIC
            size = path.stat().st_size
            width, rest = divmod(size, rows * FLOAT32_BYTES)
            if is_npy:
                raise InputError(
                    f"{path}: expected values of float32 alone, found an .npy file; "
                    "write it anew with numpy.load(..).astype(numpy.float32).tofile(..)"
                )
            if rest or not width:
                raise InputError(
                    f"{path}: expected {rows} rows of float32 (a multiple of "
                    f"{rows * FLOAT32_BYTES} bytes), found {size} bytes"
                )
            if known is not None:
                _compare(path, known, rows, width, queries_digest)
                _refuse_damaged(path, known)
            store = _map(path, (rows, width))
        except OSError as error:
            raise unreadable(str(path), error) from None
        if known is None:
            _refuse_other_types(path, store)
        _check_values(path, store)
        return store


def _map(path: str | Path, shape: tuple[int, int]) -> np.memmap:
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)


def read_description(path: Path) -> Description | None:
    """Return what is said of a memory map beside it, None where nothing is.

    Raises:
        InputError: It cannot be read, or is not a description.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        known = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(str(sidecar), error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{sidecar}: expected JSON, found an error: {error}") from None
    if not isinstance(known, dict):
        found = describe_value(known)
        raise InputError(f"{sidecar}: expected a JSON object, found {found}")
    for name, kind in Description.__annotations__.items():
        value = known.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = describe_value(known[name]) if name in known else "no such field"
            expected = "a whole number" if kind is int else "a string"
            raise InputError(f"{sidecar}: {name}: expected {expected}, found {found}")
    values: list[Any] = [known.get(name) for name in Description._fields]
    return Description(*values)


def _compare(
    path: Path, known: Description, rows: int, width: int, queries_digest: str | None
) -> None:
    if (known.rows, known.width) != (rows, width):
        raise InputError(
            f"{path}: expected {rows} rows for this data, but its description says "
            f"{known.rows} rows of width {known.width}"
        )
    if queries_digest is not None and known.queries_digest != queries_digest:
        raise InputError(
            f"{path}: expected the embeddings of this data's texts in their order, "
            "found those of other texts or of another order"
        )


def _refuse_damaged(path: Path, known: Description) -> None:
    if known.digest is not None and digest_of(path) != known.digest:
        raise InputError(
            f"{path}: is damaged: expected the bytes that its description tells the digest of, "
            "found others"
        )


def _refuse_other_types(path: Path, store: np.ndarray) -> None:
    """Refuse a file that reads better as another type: sizes alone would let it pass.

    Values of one type read as another have exponents of all sizes.
    """
    sample = np.ascontiguousarray(store[:: len(store) // 1000 + 1])
    # Every second value of bfloat16 is what a float32 consists of but for its last digits.
    halves = sample.reshape(-1).view(np.uint16).astype(np.uint32) << 16
    if len(halves) >= FEWEST and _spread(halves.view(np.float32)) <= ORDINARY_SPREAD:
        raise InputError(f"{path}: expected float32, found what looks like bfloat16")
    if _spread(sample) <= WIDEST_SPREAD:
        return
    for name in OTHER_TYPES:
        fits = sample.nbytes % np.dtype(name).itemsize == 0
        if fits and _spread(sample.reshape(-1).view(name)) <= ORDINARY_SPREAD:
            kind = np.dtype(name).name + (" of reversed bytes" if name[0] == ">" else "")
            raise InputError(f"{path}: expected float32, found what looks like {kind}")


def _spread(values: np.ndarray) -> float:
    """Return the standard deviation of the exponents; infinite where many values are 0 or worse."""
    with np.errstate(invalid="ignore"):
        kept = values[np.isfinite(values) & (values != 0)]
    if len(kept) < 0.9 * values.size:
        return float("inf")
    return float(np.frexp(kept)[1].std())


def _check_values(path: Path, store: np.ndarray) -> None:
    """Refuse a row without a finite norm, and rows that are all equal; warn of those of zeros."""
    zeros: list[np.ndarray] = []
    differ = len(store) < 2
    step = max(1, VALUES_PER_CHECK // store.shape[1])
    for start in range(0, len(store), step):
        block = store[start : start + step]
        squares = np.einsum("ij,ij->i", block, block)  # infinite for a value of 1e30, too
        for row in np.flatnonzero(~np.isfinite(squares))[:1]:
            worst = np.where(np.isnan(block[row]), np.inf, np.abs(block[row])).argmax()
            raise InputError(
                f"{path}: row {start + row + 1}: expected values of a finite norm, "
                f"found {block[row, worst]!s}"
            )
        zeros.append(start + np.flatnonzero(squares == 0))
        differ = differ or bool((block != store[0]).any())
    if not differ:
        raise InputError(
            f"{path}: expected embeddings that tell texts apart, found {len(store):,} equal rows"
        )
    rows = np.concatenate(zeros)
    if len(rows):
        log.warning(
            "%s: %s rows are zero, the first is row %s", path, f"{len(rows):,}", rows[0] + 1
        )


def _names(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths))


class TeacherWriter:
    """Write a memory map row block by row block, and its description when complete.

    Nothing is in its place before :meth:`close`; a context that ends with an exception leaves no
    trace.
    """

    def __init__(self, path: Path, rows: int, width: int) -> None:
        """Open a file beside ``path``."""
        self.path, self.rows, self.width = path, rows, width
        self._exit = ExitStack()
        self._folder = self._exit.enter_context(part_folder(path))
        self._file = self._exit.enter_context((self._folder / path.name).open("wb"))
        self._next, self._digest = 0, Hasher()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove what was written, unless it is in its place."""
        self._exit.__exit__(*error)

    def write(self, embeddings: np.ndarray) -> None:
        """Append a block ``[n, width]``."""
        assert embeddings.shape[1] == self.width, "the width of the store"
        block = np.ascontiguousarray(embeddings, np.float32).data
        with naming(self.path):
            self._file.write(block)
        self._digest.update(block)
        self._next += len(embeddings)

    def close(
        self, queries_digest: str, others: Mapping[Path, Path] | None = None, **about: str
    ) -> None:
        """Put the file in its place, and the description that a :class:`TeacherStore` checks.

        Args:
            queries_digest: Of the texts that were embedded.
            others: Files that belong to it, which go with it: where each is written, and its place.
            about: What else the description tells.
        """
        assert self._next == self.rows, "every row is written exactly once"
        digest = self._digest.hexdigest()
        known = Description(self.rows, self.width, queries_digest, digest)._asdict() | about
        part, sidecar = self._folder / self.path.name, sidecar_path(self.path)
        described = self._folder / sidecar.name
        with naming(self.path):
            self._file.close()
            described.write_text(json.dumps(known, indent=2), encoding="utf-8")
            put_together({**(others or {}), part: self.path, described: sidecar})
        self._exit.close()


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
    if not stores:
        raise InputError(f"{key}: expected the teacher's memory map, found an empty list")
    store = TeacherStore(stores, len(rows), width, rows.queries_digest)
    _tell_of_one_each(store, stores, rows, key)
    return store


def _tell_of_one_each(store: TeacherStore, stores: Sequence[str], rows: Rows, key: str) -> None:
    """Warn of memory maps that may be of a file of rows each: by their sizes one cannot tell."""
    described = any(sidecar_path(Path(path)).exists() for path in stores)
    sizes = [width * len(rows) for width in store.widths]
    if described or len(stores) < 2 or sizes != [n * store.width for n in rows.rows_per_file]:
        return
    log.warning(
        "%s: read side by side, as %s values of each of the %s rows; if each has the %d values of "
        "the rows of one file, write them into one, one after another",
        *(key, " + ".join(map(str, store.widths)), f"{len(rows):,}", store.width),
    )
