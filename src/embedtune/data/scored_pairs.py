"""Pairs of texts with a score each: a test of similarity."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from embedtune.data.records import Format, Record, RecordReader

log = logging.getLogger("embedtune")

PROMPT_IGNORED = "prompt_for_query is ignored; a model's own query prompt is used"
"""Said of scored rows whose correlation is measured."""


class ScoredPairs(NamedTuple):
    """Pairs of texts and a score of each, the higher the more alike the two are."""

    first: list[str]
    second: list[str]
    scores: list[float]


def scored_pairs(records: Iterable[Record]) -> ScoredPairs:
    """Return every query of scored rows with each of its texts."""
    pairs = ScoredPairs([], [], [])
    for record in records:
        pairs.first.extend([record.query] * len(record.positives))
        pairs.second.extend(record.positives)
        pairs.scores.extend(record.scores)
    return pairs


def read_scored(path: Path) -> ScoredPairs:
    """Read rows of the scored format; each positive is a pair with the query.

    Raises:
        InputError: A row does not fit the format.
    """
    reader = RecordReader([path], Format.SCORED)
    pairs = scored_pairs(reader)
    if set(reader.prompts) != {None}:
        log.info("%s: %s", path, PROMPT_IGNORED)
    if min(pairs.scores) == max(pairs.scores):
        log.warning("%s: all scores are %g: a Spearman correlation is 0", path, pairs.scores[0])
    return pairs
