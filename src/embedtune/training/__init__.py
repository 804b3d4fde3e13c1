"""The step: the LightningModule, and what it decides from the data.

Comes in: batches of ``data``. Goes out: a loss, optimiser steps, checkpoints, metrics.

Read first: ``module``; then what it settles when the data is known: ``settled_loss``
(with ``choose_loss``), ``start_projection``, ``optimizer``. Imports from every room below, but from
no ``export`` or ``reports``: what is written while training, ``callbacks`` see to.
"""

from embedtune.training.module import EmbeddingModule

__all__ = ["EmbeddingModule"]
