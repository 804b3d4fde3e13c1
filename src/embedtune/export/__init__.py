"""The sentence-transformers folder that proves itself.

Comes in: a trained encoder, or a checkpoint. Goes out: a folder that plain sentence-transformers
loads, whose embeddings were compared with the trained model's, with a model card.

Read first: ``folder`` (written, reloaded, compared), ``probes`` (on which texts), ``rebuild`` (from
a checkpoint). Imports from ``checkpoints``, ``data`` (chunks) and ``models``.
"""

from embedtune.export.folder import export_encoder
from embedtune.export.rebuild import export_checkpoint, rebuild

__all__ = ["export_checkpoint", "export_encoder", "rebuild"]
