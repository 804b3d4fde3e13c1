"""Did it get better: metrics of retrieval and similarity.

Comes in: test sets, and their embeddings or the models that make them. Goes out: metrics at every
width, equal on any number of ranks, and in which interval their difference from another model's
lies. A new metric goes here: a pure function in ``metrics``, and its title there.

Read first: ``metrics``, ``measure`` (one test set, several widths), then ``sharded`` (while
training, texts spread over the ranks) or ``compare`` (several models); ``intervals`` tells a change
from chance. Imports from ``data`` test sets, from ``losses`` similarities, from ``distributed``
what ranks exchange, from ``models``.
"""

from embedtune.evaluation.compare import Result, evaluate_models
from embedtune.evaluation.measure import Measured, measure
from embedtune.evaluation.metrics import retrieval_metrics, spearman

__all__ = ["Measured", "Result", "evaluate_models", "measure", "retrieval_metrics", "spearman"]
