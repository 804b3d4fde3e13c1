"""The names under which metrics of sets are logged, monitored and told."""

import re
from typing import NamedTuple

from embedtune.evaluation.metrics import TITLES

NAME = re.compile(r"(?P<stage>val|test)/(?P<dataset>[^/]+)/(?P<metric>[^/]+)(/(?P<width>\d+))?")


class MetricName(NamedTuple):
    """What a name such as ``val/dev/ndcg@10/128`` says.

    Attributes:
        stage: ``val`` or ``test``.
        dataset: Name of the set.
        metric: One of :data:`~embedtune.evaluation.metrics.TITLES`, or a part of a loss.
        width: Leading dimensions that are compared; None is all of them.
    """

    stage: str
    dataset: str
    metric: str
    width: int | None

    @property
    def is_loss(self) -> bool:
        """Whether less is better."""
        return self.metric not in TITLES


def parse_name(name: str) -> MetricName | None:
    """Return what a name says, None where it is none of a set's metrics.

    >>> parse_name("val/dev/ndcg@10/128")
    MetricName(stage='val', dataset='dev', metric='ndcg@10', width=128)
    >>> parse_name("train/loss")
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    stage, dataset, metric = match["stage"], match["dataset"], match["metric"]
    return MetricName(stage, dataset, metric, int(match["width"]) if match["width"] else None)
