"""What is learnt: losses over embeddings, as pure functions and a thin module each.

Comes in: the embeddings of a batch and what they are trained towards. Goes out: the scalar "loss",
and parts to log beside it. A loss never sees the model. A new loss goes here: its formula in
``functional``, and a module beside ``infonce`` that holds its hyper-parameters; users name theirs
by import path and need nothing of this.

Read first: ``contract`` (what a loss is), ``inputs`` (what it is given), ``infonce``. Imports from
``distributed`` what ranks exchange, from ``data`` the names of the formats.
"""

from embedtune.losses.contract import Loss
from embedtune.losses.distillation import Distillation
from embedtune.losses.infonce import InfoNCE
from embedtune.losses.inputs import Embeddings, Target
from embedtune.losses.matryoshka import Matryoshka
from embedtune.losses.scored import CoSENT, ListwiseKL

__all__ = [
    "CoSENT",
    "Distillation",
    "Embeddings",
    "InfoNCE",
    "ListwiseKL",
    "Loss",
    "Matryoshka",
    "Target",
]
