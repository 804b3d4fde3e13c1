"""Read jsonl rows of the four training formats; a row that does not fit is named, never dropped."""

import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import zstandard

from embedtune.errors import InputError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""A JSON escape of half a surrogate pair: alone it is no text and cannot be written anywhere."""


class Format(StrEnum):
    """What the rows of a training file hold."""

    PAIR = "pair"
    TRIPLET = "triplet"
    SCORED = "scored"
    DISTILL = "distill"


FIELDS: dict[Format, tuple[str, ...]] = {
    Format.PAIR: ("query", "pos"),
    Format.TRIPLET: ("query", "pos", "neg"),
    Format.SCORED: ("query", "pos", "scores"),
    Format.DISTILL: ("query",),
}
"""The required fields of each format; ``prompt_for_query`` is optional in all of them."""


class Record(NamedTuple):
    """One validated row. Fields that its format does not have are empty."""

    query: str
    prompt: str | None = None
    positives: Sequence[str] = ()
    negatives: Sequence[str] = ()
    scores: Sequence[float] = ()


class Example(NamedTuple):
    """What one unit of ``batch_size`` holds.

    Attributes:
        example_id: Its number in the data set.
        query: The query without its prompt.
        prompt: The row's own query prompt, or None.
        positives: One text (pair, triplet), the whole list (scored) or none (distill).
        negatives: ``neg_nums`` hard negatives (triplet).
        known_positives: Every positive of the row (pair, triplet): none of them is a negative.
        scores: One score per positive (scored).
        teacher: float32 ``[D]`` teacher embedding of the query (distill).
        spare: It is encoded, but does not count (see :class:`~embedtune.sampler.Key`).
        tokens: Token ids, int32 ``[t]``, of texts that are tokenised already, by (role, text).
    """

    example_id: int
    query: str
    prompt: str | None = None
    positives: Sequence[str] = ()
    negatives: Sequence[str] = ()
    known_positives: Sequence[str] = ()
    scores: Sequence[float] = ()
    teacher: np.ndarray | None = None
    spare: bool = False
    tokens: Mapping[tuple[str, str], np.ndarray] | None = None


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
        raise InputError(f"{path}:{number}: expected a JSON object, found {_describe(fields)}")
    return fields


def detect_format(line: Line) -> Format:
    """Tell the format of one line from the fields it has (a null field counts as absent).

    Raises:
        InputError: The fields fit no format, or fit two.
    """
    present = {name for name, value in line.fields.items() if value is not None}
    if {"neg", "scores"} <= present:
        raise line.error(
            "fields 'neg' and 'scores' are both present, so the format is ambiguous; "
            "declare data.format: triplet (scores ignored) or scored (neg ignored)"
        )
    if "neg" in present:
        return Format.TRIPLET
    if "scores" in present:
        return Format.SCORED
    return Format.PAIR if "pos" in present else Format.DISTILL


def parse_record(line: Line, row_format: Format) -> Record:
    """Validate one line against a format.

    Raises:
        InputError: A field is missing or holds something else than the format asks for.
    """
    query = line.fields.get("query")
    if not isinstance(query, str) or not query.strip():
        raise _field_error(line, "query", "a non-empty string")
    prompt = line.fields.get("prompt_for_query")
    if prompt is not None and not isinstance(prompt, str):
        raise _field_error(line, "prompt_for_query", "a string or null")
    needed = FIELDS[row_format]
    record = Record(
        query=query,
        prompt=prompt or None,
        positives=_texts(line, "pos") if "pos" in needed else (),
        negatives=_texts(line, "neg") if "neg" in needed else (),
        scores=_scores(line) if "scores" in needed else (),
    )
    if record.negatives and not set(record.negatives) - set(record.positives):
        raise line.error(
            "field 'neg': expected at least one text that is not also a positive, found none"
        )
    return record


def _texts(line: Line, name: str) -> list[str]:
    value = line.fields.get(name)
    expected = "a non-empty list of non-empty strings"
    if not isinstance(value, list) or not value:
        raise _field_error(line, name, expected)
    for position, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise line.error(
                f"field '{name}': expected {expected}, "
                f"found {_describe(text)} at position {position}"
            )
    return value


def _scores(line: Line) -> list[float]:
    value, count = line.fields.get("scores"), len(line.fields["pos"])
    if not isinstance(value, list):
        raise _field_error(line, "scores", f"a list of {count} numbers, one per 'pos'")
    if len(value) != count:
        raise line.error(
            f"field 'scores': expected {count} numbers, one per 'pos', found {len(value)}"
        )
    for position, score in enumerate(value):
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score):
            raise line.error(
                f"field 'scores': expected finite numbers, "
                f"found {_describe(score)} at position {position}"
            )
    return [float(score) for score in value]


def _field_error(line: Line, name: str, expected: str) -> InputError:
    if name not in line.fields:
        return line.error(f"field '{name}' is missing; expected {expected}")
    return line.error(f"field '{name}': expected {expected}, found {_describe(line.fields[name])}")


def _describe(value: object) -> str:
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


class RecordReader:
    """Iterate over the validated records of one data set, and gather what its rows share.

    With ``declared`` None the format is that of the first line, and a later line of another
    format is an error that names both. After the iteration ``format``, ``ignored_fields`` (names
    that no part of embedtune reads), ``prompts`` (the distinct query prompts, at most two kept)
    and ``rows_per_file`` are complete.
    """

    def __init__(self, paths: list[Path], declared: Format | None = None) -> None:
        """Prepare to read ``paths`` in their order."""
        self.paths = paths
        self.format = declared
        self.first: Line | None = None
        self.ignored_fields: set[str] = set()
        self.prompts: list[str | None] = []
        self.rows_per_file = [0] * len(paths)
        self._declared = declared is not None

    def __iter__(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            InputError: A line does not fit the format of the data set.
        """
        for line in read_lines(self.paths):
            row_format = self._format_of(line)
            record = parse_record(line, row_format)
            self.ignored_fields |= line.fields.keys() - {*FIELDS[row_format], "prompt_for_query"}
            if record.prompt not in self.prompts and len(self.prompts) < 2:
                self.prompts.append(record.prompt)
            self.rows_per_file[line.file] += 1
            yield record

    def _format_of(self, line: Line) -> Format:
        if self._declared and self.format is not None:
            return self.format
        found = detect_format(line)
        if self.first is None or self.format is None:
            self.first, self.format = line, found
        elif found != self.format:
            raise line.error(
                f"found a {found} row ({', '.join(FIELDS[found])}), but {self.first.path}:"
                f"{self.first.number} is a {self.format} row ({', '.join(FIELDS[self.format])}); "
                "expected one format in all rows, or data.format to declare one"
            )
        return found
