"""Read jsonl rows of the four training formats; a row that does not fit is named, never dropped."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedtune.data.lines import Line, describe_value, read_lines
from embedtune.errors import InputError


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
"""The required fields of each format; a query prompt is optional in all of them."""
PROMPT_FIELDS = ("prompt_for_query", "prompt")
"""What the query prompt of a row is called: the second name is FlagEmbedding's."""


LARGEST_SCORE = float(np.finfo(np.float32).max)
"""Scores are float32 when a loss sees them."""


class Record(NamedTuple):
    """One validated row. Fields that its format does not have are empty."""

    query: str
    prompt: str | None = None
    positives: Sequence[str] = ()
    negatives: Sequence[str] = ()
    scores: Sequence[float] = ()


def detect_format(line: Line) -> Format:
    """Tell the format of one line from the fields it has (a null field counts as absent).

    Raises:
        InputError: The fields fit no format, or fit two.
    """
    present = line.present
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
    needed = FIELDS[row_format]
    record = Record(
        query=query,
        prompt=_prompt(line),
        positives=_texts(line, "pos") if "pos" in needed else (),
        negatives=_texts(line, "neg") if "neg" in needed else (),
        scores=_scores(line) if "scores" in needed else (),
    )
    if record.negatives and not set(record.negatives) - {query, *record.positives}:
        raise line.error(
            "field 'neg': expected at least one text that is not also a positive, or the query, "
            "found none"
        )
    return record


def _prompt(line: Line) -> str | None:
    given = {name: line.fields[name] for name in PROMPT_FIELDS if line.fields.get(name) is not None}
    for name, prompt in given.items():
        if not isinstance(prompt, str):
            raise _field_error(line, name, "a string or null")
    if len(set(given.values())) > 1:
        raise line.error(
            f"fields {' and '.join(map(repr, given))}: expected one query prompt, found two"
        )
    return next(iter(given.values()), None) or None


def _texts(line: Line, name: str) -> list[str]:
    value = line.fields.get(name)
    expected = "a non-empty list of non-empty strings"
    if not isinstance(value, list) or not value:
        raise _field_error(line, name, expected)
    for position, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise line.error(
                f"field '{name}': expected {expected}, "
                f"found {describe_value(text)} at position {position}"
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
        if not is_number or not abs(score) <= LARGEST_SCORE:  # nor is NaN
            raise line.error(
                f"field 'scores': expected finite numbers of float32, "
                f"found {describe_value(score)} at position {position}"
            )
    return [float(score) for score in value]


def _field_error(line: Line, name: str, expected: str) -> InputError:
    if name not in line.fields:
        return line.error(f"field '{name}' is missing; expected {expected}")
    return line.error(
        f"field '{name}': expected {expected}, found {describe_value(line.fields[name])}"
    )


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
            self.ignored_fields |= line.fields.keys() - {*FIELDS[row_format], *PROMPT_FIELDS}
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
