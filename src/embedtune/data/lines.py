"""Find jsonl files and read their lines, each with its place for messages."""

import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard

from embedtune.errors import InputError

UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)
"""What reading a plain or compressed file of text raises, at its start or in the middle."""

READ_SIZE = 2**16
"""Bytes of a zstandard file that are decompressed at once."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""A JSON escape of half a surrogate pair: alone it is no text and cannot be written anywhere."""


class Line(NamedTuple):
    """One parsed line of a jsonl file, with its place for messages.

    ``file`` counts the files of the data set from 0, ``number`` the lines of the file from 1.
    """

    path: Path
    file: int
    number: int
    fields: dict[str, Any]

    @property
    def present(self) -> set[str]:
        """Names of the fields that it has; null is what many tools write for a field without."""
        return {name for name, value in self.fields.items() if value is not None}

    def error(self, message: str) -> InputError:
        """Return an error that starts with this line's place."""
        return InputError(f"{self.path}:{self.number}: {message}")


def read_lines(paths: Iterable[Path]) -> Iterator[Line]:
    """Yield every line of plain, ``.gz`` or ``.zst`` jsonl files as a JSON object.

    A line of a ``.txt`` file stands for ``{"query": line}``.

    Raises:
        InputError: A file has no rows, or a line is not a JSON object in UTF-8.
    """
    for file, path in enumerate(paths):
        number = 0
        blank: int | None = None
        parse = _parse_text if suffixes_of(path)[0] == ".txt" else _parse_object
        for number, text in numbered_lines(path):
            if not text.strip():
                blank = blank or number
                continue
            if blank is not None:
                # Row i of a teacher store is line i: a gap would shift all that follows.
                raise InputError(f"{path}:{blank}: expected a row, found a blank line")
            yield Line(path, file, number, parse(path, number, text))
        if number == 0 or blank == 1:
            raise InputError(f"{path}: expected a row a line, found an empty file")


def suffixes_of(path: Path) -> tuple[str, str]:
    """Return what of a file's name tells how it is read: what its lines are, and how packed.

    >>> suffixes_of(Path("rows.v2.txt.GZ")), suffixes_of(Path("rows.jsonl"))
    (('.txt', '.gz'), ('.jsonl', ''))
    """
    compression = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else ""
    plain = path.with_suffix("") if compression else path
    return plain.suffix.lower(), compression


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a plain, ``.gz`` or ``.zst`` file, counted from 1.

    Raises:
        InputError: It cannot be read to its end, or is not UTF-8.
    """
    number = 0
    try:
        with open_text(path) as lines:
            for number, text in enumerate(lines, start=1):
                yield number, text
    except UNREADABLE as error:
        raise unreadable(f"{path}, after line {number}" if number else str(path), error) from None


def unreadable(place: str, error: Exception) -> InputError:
    """Return what to say of one of :data:`UNREADABLE`."""
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"{place}: expected UTF-8 text, found {error.reason}")
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{place}: cannot be read: {error.strerror}")
    return InputError(f"{place}: cannot be decompressed: {error}")


def open_text(path: Path) -> TextIO:
    """Open a plain, gzip or zstandard file as UTF-8 text (a byte-order mark is dropped).

    Lines end where other tools count one: a carriage return alone is part of its line.
    """
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "\n"}
    _, compression = suffixes_of(path)
    if compression == ".gz":
        return gzip.open(path, "rt", **how)
    if compression == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(path), READ_SIZE), **how)
    return path.open(**how)


class _ZstdFile(io.RawIOBase):
    """The bytes of a zstandard file of one or several frames.

    The package's own reader takes a file that was cut short for one that has ended.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._rest, self._decompressed = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            data = self._rest or self._file.read(READ_SIZE)
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("it ended in the middle of a frame")
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._decompressed = memoryview(self._frame.decompress(data))
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count], self._decompressed = self._decompressed[:count], self._decompressed[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _parse_text(path: Path, number: int, text: str) -> dict[str, Any]:
    return {"query": text.rstrip("\r\n")}


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields; JSON itself would keep the last of a name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"found the field {json.dumps(name)} twice in one object")
    return fields


_parse = json.JSONDecoder(object_pairs_hook=_object_of).decode


def _parse_object(path: Path, number: int, text: str) -> dict[str, Any]:
    place = f"{path}:{number}"
    try:
        fields = _parse(text)
        if SURROGATE.search(text):
            json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        found = f"{error.msg}; found {_show(text.rstrip())}"
        raise InputError(f"{place}: invalid JSON at column {error.colno}: {found}") from None
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise InputError(f"{place}: expected Unicode text, found half a pair, {found}") from None
    except RecursionError:
        raise InputError(f"{place}: expected a row, found JSON nested too deep") from None
    except ValueError as error:  # such a field, or an integer of thousands of digits
        raise InputError(f"{place}: invalid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{place}: expected a JSON object, found {describe_value(fields)}")
    return fields


def resolve_paths(spec: str | Sequence[str], key: str) -> list[Path]:
    """Expand a path, a glob or a list of these into files, globs in sorted order.

    Args:
        spec: What the user gave.
        key: The YAML key it was given under, for messages.

    Raises:
        InputError: Nothing is there.
    """
    paths: list[Path] = []
    if not spec:
        raise InputError(f"{key}: expected a jsonl file or a glob, found {spec!r}")
    for pattern in [spec] if isinstance(spec, str) else spec:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{key}: expected a jsonl file or a glob, found nothing at {pattern}")
        for path in map(Path, found):
            if path.is_dir():
                expected = "a jsonl file"
                if key in ("data.val_path", "data.test_path"):
                    expected += " or a BEIR folder"
                raise InputError(f"{key}: expected {expected}, found the folder {path}")
            if not path.is_file():  # a pipe can be read once, a device may have no end
                raise InputError(f"{key}: expected a jsonl file, found {path}, which is no file")
            paths.append(path)
    return paths


def describe_value(value: object) -> str:
    """Return what a field of a row holds, for messages."""
    names = {str: "the string", list: "a list", dict: "an object", bool: "the boolean"}
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    if isinstance(value, list) and not value:
        return "an empty list"
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        shown = "nested too deep to be shown"
    return f"{names.get(type(value), 'the number')} {_show(shown)}"


def _show(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
