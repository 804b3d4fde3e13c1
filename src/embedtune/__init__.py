"""Fine-tune text-embedding models: jsonl files in, a sentence-transformers folder out."""

from embedtune.datamodule import EmbeddingDataModule
from embedtune.embedding import Embedding
from embedtune.errors import InputError
from embedtune.export import ExportModel, export_checkpoint, export_encoder
from embedtune.losses import Loss
from embedtune.module import EmbeddingModule
from embedtune.target import Embeddings, Target

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
