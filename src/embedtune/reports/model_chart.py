"""Write what was measured of several models, and draw it."""

import importlib
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedtune.errors import InputError
from embedtune.evaluation.compare import Result
from embedtune.evaluation.intervals import outcome
from embedtune.evaluation.quantise import PRECISIONS, megabytes
from embedtune.reports.model_names import NAME, set_titles, short_names
from embedtune.whole_files import refuse_in_the_way, write_text, writing


def write_results(results: Sequence[Result], out: Path) -> None:
    """Write ``OUT/evaluation.json`` (all metrics) and ``OUT/quality.png`` (the main ones).

    The json is a list with an object per :class:`Result`: ``model``, ``data``, ``width``, each
    metric, null where it is not finite, and ``mb_per_million``, the MB of a million embeddings in
    each precision. Of a model that was compared with the first one, ``against`` is that one's name,
    and ``intervals`` and ``outcomes`` tell by metric in which interval the difference lies and what
    follows from it.

    Raises:
        InputError: ``out`` cannot be made, or matplotlib is not installed.
    """
    out = Path(out)
    refuse_in_the_way(out, f"{out}: expected a folder to write to")
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "model": result.model,
            "data": result.data,
            "width": result.width,
            **{k: v if math.isfinite(v) else None for k, v in result.metrics.items()},
            "mb_per_million": {name: megabytes(result.width, name) for name in PRECISIONS},
            **_compared(result, results[0].model),
        }
        for result in results
    ]
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    write_text(out / "evaluation.json", text)
    require_matplotlib()
    _draw(results, out / "quality.png")


def require_matplotlib() -> None:
    """Refuse to draw without it.

    Raises:
        InputError: It is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise InputError("quality.png needs pip install 'embedtune[plots]'") from None


def _compared(result: Result, first: str) -> dict[str, Any]:
    if not result.intervals:
        return {}
    outcomes = {name: outcome(ends) for name, ends in result.intervals.items()}
    return {"against": first, "intervals": result.intervals, "outcomes": outcomes}


def _draw(results: Sequence[Result], path: Path) -> None:
    """Draw a row of two charts per test set: quality by width, and by MB in each precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets, labels = set_titles(results), short_names(results)
    figure = Figure(figsize=(10, 0.8 + 3.4 * len(sets)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sets), 2, sharex="col", sharey="row", squeeze=False)
    styles = dict(zip(PRECISIONS, ("o-", "s--", "^:"), strict=True))
    for ((data, _), title), (by_width, by_size) in zip(sets.items(), grid, strict=True):
        for number, (model, label) in enumerate(labels.items()):
            own = [r for r in results if (r.data, r.model) == (data, model)]
            widths, colour = [r.width for r in own], f"C{number}"
            name = textwrap.fill(label, NAME)
            by_width.plot(widths, [r.quality() for r in own], "o-", color=colour, label=name)
            for precision, style in styles.items():
                sizes = [megabytes(width, precision) for width in widths]
                values = [r.quality(precision) for r in own]
                by_size.plot(sizes, values, style, color=colour, markersize=5)
        by_width.set_ylabel(title)
    ticks = sorted({result.width for result in results})
    _scale(grid[-1, 0], ticks, "embedding width")
    _scale(grid[-1, 1], [4**power for power in range(1, 7)], "MB per million documents")
    for precision, style in styles.items():
        grid[0, 1].plot([], [], style, color="grey", label=precision)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    grid[0, 1].legend(title="documents")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    with writing(path) as part:
        figure.savefig(part)


def _scale(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    slant = 45 if len(ticks) > 6 else 0  # or long labels overlap
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], rotation=slant)
    axes.minorticks_off()
    axes.set_xlabel(label)
