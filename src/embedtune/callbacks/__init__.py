"""What a fit does beside its steps, a file a callback.

Comes in: the hooks of Lightning's Trainer. Goes out: metrics of the base model, a summary, speed,
exported folders, the report, predicted embeddings, metrics of a validation, an earlier run's files
put aside; an end in time where ranks share no folder, another fit has it, a loss is no number or a
signal comes. A new callback goes here, and its place in the order into ``cli.assembly``.

Read first: ``export_model``. Imports from ``training``, ``export``, ``reports`` and all below.
"""

from embedtune.callbacks.baseline import Baseline
from embedtune.callbacks.earlier_run import EarlierRun, MetricsFile
from embedtune.callbacks.end_on_signal import EndOnSignal
from embedtune.callbacks.export_model import ExportModel
from embedtune.callbacks.finite import Finite
from embedtune.callbacks.last_step import LastStep
from embedtune.callbacks.missed_validation import MissedValidation
from embedtune.callbacks.one_fit import OneFit
from embedtune.callbacks.out_of_memory import OutOfMemory
from embedtune.callbacks.progress_bar import ProgressBar
from embedtune.callbacks.run_report import RunReport
from embedtune.callbacks.run_summary import RunSummary
from embedtune.callbacks.shared_folder import SharedFolder
from embedtune.callbacks.stop_on_signal import StopOnSignal
from embedtune.callbacks.throughput import Throughput
from embedtune.callbacks.unfinished_save import UnfinishedSave
from embedtune.callbacks.write_embeddings import WriteEmbeddings
from embedtune.callbacks.write_metrics import WriteMetrics

__all__ = [
    "Baseline",
    "EarlierRun",
    "EndOnSignal",
    "ExportModel",
    "Finite",
    "LastStep",
    "MetricsFile",
    "MissedValidation",
    "OneFit",
    "OutOfMemory",
    "ProgressBar",
    "RunReport",
    "RunSummary",
    "SharedFolder",
    "StopOnSignal",
    "Throughput",
    "UnfinishedSave",
    "WriteEmbeddings",
    "WriteMetrics",
]
