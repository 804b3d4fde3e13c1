"""Write ``report.html``: whether the model got better, where, and how training went.

The page is one file that loads nothing. What it says is computed here; how it says it is in
``report.html.jinja``.
"""

import importlib.resources
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from embedtune.evaluation.intervals import CONFIDENCE, FEWEST, RESAMPLES, Interval, decimals
from embedtune.evaluation.metric_name import parse_name
from embedtune.evaluation.metrics import DEPTH, TITLES
from embedtune.reports.changes import Change, Comparison, Queries, compare_queries
from embedtune.reports.chart import Axis
from embedtune.reports.curves import (
    ALL_WIDTHS,
    WHOLE,
    ByWidth,
    arrange,
    read_curves,
    width_name,
)
from embedtune.reports.headline import Monitored, headline
from embedtune.reports.panels import (
    Panel,
    quantity_panels,
    step_panels,
    training_panels,
    width_panels,
)
from embedtune.reports.ticks import number
from embedtune.secrets import withhold
from embedtune.whole_files import write_text


def report_path(folder: Path) -> Path:
    """Return where the report of a run folder lies."""
    return folder / "report.html"


def write_report(
    folder: Path,
    *,
    facts: Mapping[str, str],
    base: Mapping[str, float],
    trained: Mapping[str, float],
    width: int,
    model_note: str,
    comparisons: Sequence[Comparison],
    intervals: Mapping[str, Interval],
    monitor: str | None = None,
    base_width: int | None = None,
) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        folder: The run folder; of its ``config.yaml`` and ``metrics*.csv`` is shown what is there.
        facts: What the run understood, a text a label.
        base: The base model's metrics, ``val/<set>/<metric>`` at its full width and
            ``val/<set>/<metric>/<width>``; some or all may be missing.
        trained: The same of the model in ``folder/model``; empty where it was not measured, and
            then the base's values and the curves are shown alone.
        width: Full width of the trained model.
        model_note: A sentence that tells which model that is.
        comparisons: What both find in the retrieval test sets.
        intervals: By the names of metrics, in which their difference lies, where that is known.
        monitor: The metric by which the best checkpoint is found, if there is one.
        base_width: Full width of the base model; None is that of the trained one.
    """
    curves, config = read_curves(folder), folder / "config.yaml"
    given = (base, trained, intervals, curves)
    own_widths = base_width or width, width
    # A wider base model has other metrics at the trained one's full width than at its own.
    full = WHOLE if own_widths[0] > width else width
    sets = _sets([arrange(metrics, full) for metrics in given], comparisons, full, own_widths)
    text = (importlib.resources.files("embedtune.reports") / "report.html.jinja").read_text("utf-8")
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined, **blocks)
    page = template.render(
        folder=folder.as_posix(),
        model=(folder / "model").as_posix(),
        verdict=_verdict(sets, monitor, full) if sets else None,
        model_note=model_note,
        sets=sets,
        names=TITLES,
        depth=DEPTH,
        confidence=f"{CONFIDENCE:.0%}",
        resamples=f"{RESAMPLES:,}",
        fewest=FEWEST,
        widths=sorted({w for s in sets for w in s.widths} - {ALL_WIDTHS, WHOLE}, reverse=True),
        width_name=width_name,
        training=training_panels(curves),
        speed=quantity_panels(curves, "examples_per_s", "padding_efficiency", "input_wait"),
        facts=withhold(facts),
        config=config.read_text("utf-8") if config.is_file() else None,
        number=number,
        decimals=decimals,
        quote=shlex.quote,
    )
    path = report_path(folder)
    write_text(path, page)
    return path


def _sets(
    arranged: Sequence[Mapping[str, ByWidth]],
    comparisons: Sequence[Comparison],
    full: int,
    own_widths: tuple[int, int],
) -> list["SetReport"]:
    base, trained, _, curves = arranged
    queries = {comparison.name: compare_queries(comparison) for comparison in comparisons}
    # Without values of the model, all that was ever measured is worth a look.
    names = dict.fromkeys([*trained, *base, *(() if trained else curves)])
    own = {name: [one.get(name, {}) for one in arranged] for name in names}
    sets = [
        SetReport(name, before, after, ends, over_steps, queries.get(name), full, own_widths)
        for name, (before, after, ends, over_steps) in own.items()
    ]
    return sorted(sets, key=lambda one: one.main not in TITLES)  # losses last


def _verdict(sets: Sequence["SetReport"], monitor: str | None, full: int) -> str:
    if not any(one.trained for one in sets):
        return "No verdict: this model was not measured"
    outcomes = {
        one.name: {w: one.at(one.main, w).outcome for w in one.known[one.main]}
        for one in sets
        if one.main in TITLES
    }
    name = parse_name(monitor or "")
    if monitor is None or name is None or name.is_loss:
        return headline(outcomes)
    own = next((s for s in sets if s.name == name.dataset and name.metric in s.trained), None)
    if own is None:
        return headline(outcomes)
    at = name.width or full
    place = (own.name, at) if name.metric == own.main else None
    return headline(outcomes, Monitored(monitor, own.at(name.metric, at).outcome, place))


class SetReport(NamedTuple):
    """All about one set; any of it may be missing, but not all.

    Attributes:
        full: Under which width the metrics of whole embeddings are.
        own_widths: The full widths of the base model and of the trained one.
    """

    name: str
    base: ByWidth
    trained: ByWidth
    intervals: ByWidth
    curves: ByWidth
    queries: Queries | None
    full: int
    own_widths: tuple[int, int]

    @property
    def known(self) -> ByWidth:
        """What tells metrics and widths: of the trained model, else of the base, else curves."""
        return self.trained or self.base or self.curves

    @property
    def widths(self) -> list[int]:
        """All at which something was measured, the widest first."""
        return sorted(set().union(*self.known.values()), reverse=True)

    def at(self, metric: str, width: int) -> Change:
        """Return what became of a metric at a width."""
        sides = (self.base, self.trained, self.intervals)
        base, trained, interval = (m.get(metric, {}).get(width) for m in sides)
        return Change(base, trained, metric in TITLES, interval)

    @property
    def main(self) -> str:
        """The metric that sums the set up."""
        return next(iter(self.known))

    @property
    def change(self) -> Change:
        """What became of that, at full width."""
        widths = self.known[self.main]
        return self.at(self.main, ALL_WIDTHS if ALL_WIDTHS in widths else max(widths))

    @property
    def panels(self) -> list[Panel]:
        """That over the steps, and by width where there are several."""
        y = Axis(TITLES.get(self.main, self.main))
        base, curves = self.base.get(self.main, {}), self.curves.get(self.main, {})
        start = {width: {0: value} for width, value in base.items()}
        # What was measured of the base model wins over what the file has at step 0.
        over_steps = {
            width_name(w): {**start.get(w, {}), **curve, **start.get(w, {})}
            for w, curve in curves.items()
        }
        trained = self.trained.get(self.main, {})
        sides = zip(("base", "trained"), (base, trained), self.own_widths, strict=True)
        by_width = {
            name: {own if w == self.full else w: v for w, v in values.items()}
            for name, values, own in sides
            if values
        }
        return step_panels("over the steps", y, over_steps) + width_panels("by width", y, by_width)
