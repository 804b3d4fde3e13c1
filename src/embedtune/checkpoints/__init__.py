"""Training checkpoints: saved as a whole, read on one machine, gone on with.

Comes in: the path of a checkpoint of any strategy, a file or a folder of shards. Goes out: whole
weights in float32 on one machine, what the fit said of itself, and the place in the data where it
goes on.

Read first: ``read`` (weights and facts), ``pickles`` (no code of strangers), ``write`` (whole or
not there), ``resume`` (where a fit goes on). Imports from ``models`` what describes an encoder, and
no weights of its own.
"""

from embedtune.checkpoints.find import best_checkpoint, last_checkpoint
from embedtune.checkpoints.read import (
    Checkpoint,
    read_checkpoint,
    read_facts,
    read_spec,
    read_weights,
)
from embedtune.checkpoints.training_facts import TrainingFacts

__all__ = [
    "Checkpoint",
    "TrainingFacts",
    "best_checkpoint",
    "last_checkpoint",
    "read_checkpoint",
    "read_facts",
    "read_spec",
    "read_weights",
]
