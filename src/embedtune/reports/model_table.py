"""A table of models by test set and width."""

import textwrap
from collections.abc import Sequence

from embedtune.evaluation.compare import Result
from embedtune.reports.model_names import NAME, set_titles, short_names


def format_table(results: Sequence[Result]) -> str:
    """Return the main metric as text, for each test set a row per model and a column per width.

    >>> print(format_table([Result("a", "sts", 64, {"spearman": 0.5})]))
    sts, Spearman     64
    a              .5000
    """
    labels = {name: textwrap.wrap(label, NAME) for name, label in short_names(results).items()}
    sets, widths = set_titles(results), sorted({result.width for result in results}, reverse=True)
    cells = {(r.data, r.model, r.width): _decimals(r.quality()) for r in results}
    rows: list[list[str]] = []
    for data, title in sets.items():
        rows += [[], [title, *map(str, widths)]] if rows else [[title, *map(str, widths)]]
        for model, (*above, last) in labels.items():
            rows += [[line] for line in above]
            rows.append([last, *(cells.get((data, model, width), "-") for width in widths)])
    first = max(len(row[0]) for row in rows if row)
    longest = max(5, *(len(cell) for row in rows for cell in row[1:]))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(longest) for cell in row[1:])]).rstrip()
        if row
        else ""
        for row in rows
    )


def _decimals(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)
