"""From a row to a batch.

Comes in: jsonl files of four formats, teacher embeddings, BEIR folders. Goes out: batches of token
chunks, in an order that is a pure function of seed, epoch and step. A new data format goes here: a
member of ``records.Format`` with its fields, and how ``examples`` makes examples of its rows.

Read first, in the order of a row: ``lines``, ``records`` (a line becomes a record), ``rows`` (in
Arrow), ``examples``, ``collate`` (examples become chunks); ``opened`` opens all files of a run,
``datamodule`` makes their batches. Test sets are read by ``beir`` and ``scored_pairs``, and batched
by ``testset_batches``. Imports from ``models`` how texts become tokens, from ``checkpoints`` the
place in the data.
"""

from embedtune.data.batch import Batch
from embedtune.data.beir import RetrievalSet, read_beir
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.data.examples import Example, ExampleDataset
from embedtune.data.records import Format, Record
from embedtune.data.rows import Rows
from embedtune.data.scored_pairs import ScoredPairs, read_scored
from embedtune.data.teacher_store import TeacherStore, TeacherWriter
from embedtune.data.testsets import open_testset

__all__ = [
    "Batch",
    "EmbeddingDataModule",
    "Example",
    "ExampleDataset",
    "Format",
    "Record",
    "RetrievalSet",
    "Rows",
    "ScoredPairs",
    "TeacherStore",
    "TeacherWriter",
    "open_testset",
    "read_beir",
    "read_scored",
]
