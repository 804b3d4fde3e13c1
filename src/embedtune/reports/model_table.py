"""A table of models by test set and width."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

from embedtune.evaluation.compare import Result
from embedtune.evaluation.intervals import CONFIDENCE, FEWEST, RESAMPLES, decimals, outcome
from embedtune.reports.curves import ALL_WIDTHS
from embedtune.reports.model_names import NAME, set_names, set_titles, short_names


def format_table(results: Sequence[Result], are_paths: bool = True) -> str:
    """Return the main metric as text, for each test set a row per model and a column per width.

    Below a model that was compared with the first one are the differences, what follows from them,
    and their intervals.

    Args:
        results: What was measured.
        are_paths: Whether test sets are paths, which are shortened; else they are names.

    >>> print(format_table([Result("a", "sts.jsonl", 64, {"spearman": -1e-9})]))
    sts, Spearman     64
    a              .0000
    """
    names = short_names(results)
    labels = {model: textwrap.wrap(name, NAME) for model, name in names.items()}
    widths = sorted({result.width for result in results}, reverse=True, key=_place)
    cells = {(r.data, r.main, r.model, r.width): r for r in results}
    rows: list[list[str]] = []
    for (data, main), title in set_titles(results, are_paths).items():
        heads = [title, *(str(width or "all") for width in widths)]
        rows += [[], heads] if rows else [heads]
        for model, (*above, last) in labels.items():
            rows += [[line] for line in above]
            own = [cells.get((data, main, model, width)) for width in widths]
            rows.append([last, *(_decimals(r.quality()) if r else "-" for r in own)])
            if any(r and r.intervals is not None for r in own):
                firsts = [cells.get((data, main, results[0].model, width)) for width in widths]
                rows += _changes(firsts, own)
    first = max(len(row[0]) for row in rows if row)
    longest = max(5, *(len(cell) for row in rows for cell in row[1:]))
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(longest) for cell in row[1:])]).rstrip()
        if row
        else ""
        for row in rows
    ]
    compares = any(result.intervals is not None for result in results)
    told = _explained(names[results[0].model]) if compares else []
    return "\n".join([*lines, *told, *_fallen_widths(results, names, are_paths)])


def _place(width: int) -> float:
    return float("inf") if width == ALL_WIDTHS else width


def _changes(firsts: Sequence[Result | None], own: Sequence[Result | None]) -> list[list[str]]:
    """Return the rows of the differences from the first model, and of their intervals."""
    changes, ends = ["  change"], [f"  {CONFIDENCE:.0%} interval"]
    for before, after in zip(firsts, own, strict=True):
        if before is None or after is None or after.intervals is None:
            changes.append("-")
            ends.append("-")
            continue
        between = after.intervals.get(after.main)
        difference = after.quality() - before.quality()
        digits = decimals(between, 4)
        told = f"{_decimals(difference, '+', digits)} {outcome(between)}"
        changes.append("not compared" if math.isnan(difference) else told)
        ends.append(" to ".join(_decimals(end, "+", digits) for end in between or ()) or "-")
    return [changes, ends]


def _fallen_widths(
    results: Sequence[Result], names: Mapping[str, str], are_paths: bool
) -> list[str]:
    """Tell of models that are worse than the first at small widths of a set and rose at their own.

    What was not measured at a model's own width says nothing of how that one went.
    """
    cells = {(r.data, r.main, r.model, r.width): r for r in results}
    sets = set_names(results, are_paths)
    told: dict[str, list[str]] = {}
    for (data, main), model in itertools.product(set_titles(results), names):
        own = {r.width: r for place, r in cells.items() if place[:3] == (data, main, model)}
        full = next(iter(own.values())).own_width if own else None
        before = cells.get((data, main, results[0].model, full or 0))
        if full not in own or before is None or not own[full].quality() > before.quality():
            continue
        worse = [width for width, after in own.items() if _fell(after)]
        if worse:
            at = ", ".join(map(str, sorted(worse, reverse=True)))
            told.setdefault(model, []).append(f"on {sets[data]} at {at}")
    lines = []
    for model, places in told.items():
        lines += textwrap.wrap(
            f"{names[model]} is worse {', '.join(places)} alone: widths that a fit does not train "
            "may fall as the full one rises; model.use_mrl trains those of model.mrl_dims.",
            100,
        )
    return ["", *lines] if lines else []


def _fell(after: Result) -> bool:
    return outcome((after.intervals or {}).get(after.main)) == "worse"


def _explained(first: str) -> list[str]:
    text = (
        f"Changes are from {first}. Intervals: paired bootstrap, {RESAMPLES:,} resamples of the "
        "queries (for Spearman of the pairs), each for itself; better and worse are said where "
        f"they leave out 0. There is none of fewer than {FEWEST}."
    )
    return ["", *textwrap.wrap(text, 100)]


def _decimals(value: float, sign: str = "", digits: int = 4) -> str:
    # A change keeps the sign that rounding leaves of it: an interval may end just below 0.
    text = f"{value:{sign or 'z'}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
