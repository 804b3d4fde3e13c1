"""Pages, charts and tables for people.

Comes in: plain values, and the files of a run folder. Goes out: ``report.html``, the table and the
chart of ``embedtune evaluate``.

Read first: ``report`` (what the page says), ``changes`` (did it get better), ``chart`` (how a line
is drawn). Imports from ``evaluation`` and ``data``; it knows of no Trainer.
"""

from embedtune.reports.model_chart import require_matplotlib, write_results
from embedtune.reports.model_table import format_table
from embedtune.reports.report import write_report

__all__ = ["format_table", "require_matplotlib", "write_report", "write_results"]
