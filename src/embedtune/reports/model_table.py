"""A table of models by test set and width."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from embedtune.evaluation.compare import Result
from embedtune.evaluation.intervals import CONFIDENCE, FEWEST, RESAMPLES, outcome
from embedtune.reports.curves import ALL_WIDTHS
from embedtune.reports.model_names import NAME, set_titles, short_names


def format_table(results: Sequence[Result]) -> str:
    """Return the main metric as text, for each test set a row per model and a column per width.

    Below a model that was compared with the first one are the differences, what follows from them,
    and their intervals.

    >>> print(format_table([Result("a", "sts", 64, {"spearman": 0.5})]))
    sts, Spearman     64
    a              .5000
    """
    names = short_names(results)
    labels = {model: textwrap.wrap(name, NAME) for model, name in names.items()}
    widths = sorted({result.width for result in results}, reverse=True, key=_place)
    cells = {(r.data, r.main, r.model, r.width): r for r in results}
    rows: list[list[str]] = []
    for (data, main), title in set_titles(results).items():
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
    return "\n".join([*lines, *told, *_fallen_widths(results, names)])


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
        told = f"{_decimals(difference, '+')} {outcome(between)}"
        changes.append("not compared" if math.isnan(difference) else told)
        ends.append(" to ".join(_decimals(end, "+") for end in between or ()) or "-")
    return [changes, ends]


def _fallen_widths(results: Sequence[Result], names: Mapping[str, str]) -> list[str]:
    """Tell of models that are worse than the first at small widths and not at their full one."""
    told: dict[tuple[str, str], dict[int, str]] = {}
    for result in results:
        if result.intervals is not None:
            by_width = told.setdefault((result.model, result.data), {})
            by_width[result.width] = outcome(result.intervals.get(result.main))
    fallen: dict[str, set[int]] = {}
    for (model, _), by_width in told.items():
        if by_width[max(by_width)] != "worse":
            worse = {width for width, said in by_width.items() if said == "worse"}
            fallen.setdefault(model, set()).update(worse)
    lines = []
    for model, widths in fallen.items():
        if widths:
            at = ", ".join(map(str, sorted(widths, reverse=True)))
            lines += textwrap.wrap(
                f"{names[model]} is worse at {at} alone: widths that a fit does not train may fall "
                "as the full one rises; model.use_mrl trains those of model.mrl_dims.",
                100,
            )
    return ["", *lines] if lines else []


def _explained(first: str) -> list[str]:
    text = (
        f"Changes are from {first}. Intervals: paired bootstrap, {RESAMPLES:,} resamples of the "
        "queries (for Spearman of the pairs), each for itself; better and worse are said where "
        f"they leave out 0. There is none of fewer than {FEWEST}."
    )
    return ["", *textwrap.wrap(text, 100)]


def _decimals(value: float, sign: str = "") -> str:
    text = f"{value:{sign}.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
