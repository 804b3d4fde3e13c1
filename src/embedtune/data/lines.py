"""Find jsonl files and read their lines, each with its place for messages."""

import glob
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard

from embedtune.errors import InputError

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
        plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        parse = _parse_text if plain.suffix == ".txt" else _parse_object
        try:
            with open_text(path) as lines:
                for number, text in enumerate(lines, start=1):
                    if not text.strip():
                        blank = blank or number
                        continue
                    if blank is not None:
                        # Row i of a teacher store is line i: a gap would shift all that follows.
                        raise InputError(f"{path}:{blank}: expected a row, found a blank line")
                    yield Line(path, file, number, parse(path, number, text))
        except UnicodeDecodeError as error:
            place = f"{path}, after line {number}"
            raise InputError(f"{place}: expected UTF-8 text, found {error.reason}") from None
        except (gzip.BadGzipFile, zstandard.ZstdError, EOFError) as error:
            raise InputError(f"{path}: cannot be decompressed: {error}") from None
        if number == 0 or blank == 1:
            raise InputError(f"{path}: expected a row a line, found an empty file")


def open_text(path: Path) -> TextIO:
    """Open a plain, gzip or zstandard file as UTF-8 text (a byte-order mark is dropped)."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        return zstandard.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parse_text(path: Path, number: int, text: str) -> dict[str, Any]:
    return {"query": text.rstrip("\r\n")}


def _parse_object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{number}: invalid JSON at column {error.colno}"
        raise InputError(f"{place}: {error.msg}; found {_show(text.rstrip())}") from None
    if SURROGATE.search(text):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            found = ascii(error.object[error.start])
            place = f"{path}:{number}"
            raise InputError(
                f"{place}: expected Unicode text, found half a pair, {found}"
            ) from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}:{number}: expected a JSON object, found {describe_value(fields)}")
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
    return f"{names.get(type(value), 'the number')} {_show(json.dumps(value, ensure_ascii=False))}"


def _show(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
