"""What the ranks of a run exchange, and what they divide.

Comes in: tensors of this rank; the name of a strategy. Goes out: tensors of all ranks, with their
gradient; a Lightning strategy that gives the weights of one process. A new strategy goes here: a
class, and its name in ``strategies.NAMED``.

Read first: ``exchange`` (what ranks tell each other), ``strategies`` (names), then ``fsdp``
or ``zero``. Imports from ``checkpoints``.
"""

from embedtune.distributed.fsdp import FSDP
from embedtune.distributed.strategies import named_strategy
from embedtune.distributed.zero import ZeRO

__all__ = ["FSDP", "ZeRO", "named_strategy"]
