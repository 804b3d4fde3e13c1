"""Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out.

Each folder is a room of one idea, and its page is the docstring of its ``__init__``. From the top:

``cli`` reads keys and runs; ``tools`` are the commands beside training; ``callbacks`` are what a
fit does beside its steps; ``training`` is the step, ``export`` the folder that proves itself,
``reports`` what people read; ``evaluation`` measures; ``losses`` say what is learnt; ``data`` makes
batches of rows; ``distributed`` divides among ranks; ``checkpoints`` are gone on with; ``models``
are what is trained. A room imports only from those after it; all may use ``errors``,
``whole_files``, ``digests`` and ``secrets``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedtune.callbacks import ExportModel
    from embedtune.data import EmbeddingDataModule
    from embedtune.errors import InputError
    from embedtune.export import export_checkpoint, export_encoder
    from embedtune.losses import Embeddings, Loss, Target
    from embedtune.models import Embedding
    from embedtune.training import EmbeddingModule

__all__ = [
    "Embedding",
    "EmbeddingDataModule",
    "EmbeddingModule",
    "Embeddings",
    "ExportModel",
    "InputError",
    "Loss",
    "Target",
    "export_checkpoint",
    "export_encoder",
]
__version__ = "0.1.0"

HOMES = {
    "Embedding": "models",
    "EmbeddingDataModule": "data",
    "EmbeddingModule": "training",
    "Embeddings": "losses",
    "ExportModel": "callbacks",
    "InputError": "errors",
    "Loss": "losses",
    "Target": "losses",
    "export_checkpoint": "export",
    "export_encoder": "export",
}
"""Where the public names are; fetched on first use, for importing torch takes seconds."""
ROOMS = (*HOMES.values(), "checkpoints", "cli", "distributed", "evaluation", "reports", "tools")


def __getattr__(name: str) -> Any:
    """Fetch a public name or a room."""
    if name in HOMES:
        return getattr(import_module(f"embedtune.{HOMES[name]}"), name)
    if name in ROOMS:
        return import_module(f"embedtune.{name}")
    raise AttributeError(f"module 'embedtune' has no attribute {name!r}")
