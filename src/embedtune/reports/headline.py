"""The headline of a report: where the trained model is better, worse or neither."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedtune.reports.changes import OUTCOMES
from embedtune.reports.curves import WHOLE

LONGEST = 160
"""Characters about places; where they would be more, they are counted."""

Outcomes = Mapping[str, Mapping[int, str]]  # of each set's main metric by width


class Monitored(NamedTuple):
    """What became of the metric of ``checkpoint.monitor``.

    Attributes:
        name: As it was given.
        outcome: One of :data:`OUTCOMES`.
        place: Set and width, where it is the set's main metric.
    """

    name: str
    outcome: str
    place: tuple[str, int] | None


def headline(outcomes: Outcomes, monitored: Monitored | None = None) -> str:
    """Return a sentence on the monitored metric and on the main metric of all sets and widths.

    Args:
        outcomes: Of each set whose main metric gives a verdict, by width.
        monitored: Told first.

    >>> headline({"dev": {384: "unclear", 128: "better", 32: "better"}})
    'Better on dev at 128 and 32 dimensions, unclear on dev at 384 dimensions'
    >>> headline({"a": {64: "equal"}, "b": {64: "equal"}}, Monitored("val/a/mrr@10", "worse", None))
    'Worse by val/a/mrr@10, the monitored metric; by main metric equal on a and b'
    """
    known = {outcome for by_width in outcomes.values() for outcome in by_width.values()}
    if not known:
        return "No verdict: only losses were measured"
    if known == {"not compared"}:
        return "Not compared with the base model"
    if monitored is None or (monitored.place and known == {monitored.outcome}):
        text = _told(outcomes)
    else:
        rest = {
            name: {w: found for w, found in by_width.items() if (name, w) != monitored.place}
            for name, by_width in outcomes.items()
        }
        by_main = "" if monitored.place else "by main metric "
        text = f"{monitored.outcome} by {monitored.name}, the monitored metric; {by_main}"
        text += _told(rest, outcomes)
    return text[0].upper() + text[1:]


def _told(told: Outcomes, outcomes: Outcomes | None = None) -> str:
    """Return each outcome with the sets and widths that have it.

    Args:
        told: What to tell.
        outcomes: All there is, where that is more.
    """
    clauses = []
    for outcome in OUTCOMES:
        sets_at: dict[str, list[str]] = {}
        for name, by_width in told.items():
            widths = [width for width, found in by_width.items() if found == outcome]
            if widths:
                sets_at.setdefault(_at(widths, (outcomes or told)[name]), []).append(name)
        places = [f"on {listed(names)}{at}" for at, names in sets_at.items()]
        clauses += [f"{outcome} {' and '.join(places)}"] if places else []
    text = ", ".join(clauses)
    return text if len(text) <= LONGEST else _counted(told)


def _at(widths: Sequence[int], all_widths: Mapping[int, str]) -> str:
    if len(all_widths) == 1:
        return ""
    if len(widths) == len(all_widths):
        return " at every width"
    numbers = [str(width) for width in widths if width != WHOLE]
    names = ["full width"] * (WHOLE in widths) + numbers
    return f" at {listed(names)}{' dimensions' if numbers else ''}"


def _counted(told: Outcomes) -> str:
    counts = Counter(found for by_width in told.values() for found in by_width.values())
    parts = [f"{outcome} at {counts[outcome]}" for outcome in OUTCOMES if counts[outcome]]
    return f"{', '.join(parts)} of the {counts.total()} widths of {len(told)} sets"


def listed(names: Sequence[str]) -> str:
    """Return names with commas, and "and" before the last.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
