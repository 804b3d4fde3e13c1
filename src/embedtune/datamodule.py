"""The LightningDataModule: files in, batches out."""

import multiprocessing
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from embedtune.batch import Collator
from embedtune.dataset import ExampleDataset, Rows, resolve_paths
from embedtune.encoder import Encoder
from embedtune.errors import InputError, require_positive
from embedtune.records import Format
from embedtune.sampler import Cursor, GlobalBatchSampler
from embedtune.teacher_store import TeacherStore
from embedtune.tokens import TokenTable

DataSet = Literal["train", "val", "test", "predict"]
NEEDED: dict[str, tuple[DataSet, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The data sets that each Trainer function reads; the first of them is required."""


class EmbeddingDataModule(pl.LightningDataModule):
    """Batches from jsonl files of the four formats.

    The data module owns the order of the examples, so a Trainer must leave it alone:
    ``Trainer(use_distributed_sampler=False)`` (the command line sees to it).
    """

    trainer: Any  # attached by Lightning before any hook is called

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        predict_path: str | None = None,
        format: Literal["auto", "pair", "triplet", "scored", "distill"] = "auto",
        batch_size: int = 32,
        neg_nums: int = 15,
        query_max_len: int | None = None,
        passage_max_len: int = 512,
        teacher_path: str | list[str] | None = None,
        val_teacher_path: str | list[str] | None = None,
        test_teacher_path: str | list[str] | None = None,
        teacher_embedding_dim: int | None = None,
        shuffle: bool = True,
        num_workers: int | None = None,
        tokens_per_chunk: int | None = None,
        seed: int = 666,
    ) -> None:
        """Describe the data; nothing is read before ``prepare_data``.

        Args:
            train_path: A jsonl file (plain, .gz or .zst), a glob, or a list of these.
            val_path: The same, for the loss (scored: and Spearman correlation) after each epoch.
            test_path: The same, for ``embedtune test``.
            predict_path: A jsonl file with ``query`` fields, or a text file with a text a line.
            format: Format of the rows; auto takes it from the fields, over all rows.
            batch_size: Per rank: query-positive pairs (pair, triplet), lists (scored) or texts
                (distill).
            neg_nums: Hard negatives drawn per query in each epoch (triplet).
            query_max_len: Longest query in tokens; the default is 128, for distill 512, and for
                ``embedtune predict`` the model's own longest input.
            passage_max_len: Longest positive or negative in tokens.
            teacher_path: float32 memory map of the teacher's embeddings of ``train_path``
                (distill), or several, which are concatenated along the width.
            val_teacher_path: The same for ``val_path``.
            test_teacher_path: The same for ``test_path``.
            teacher_embedding_dim: Width of all of ``teacher_path`` together; the default takes it
                from the files' sizes.
            shuffle: False trains in the files' order.
            num_workers: Processes of each rank that make batches ahead; 0 makes them in the
                training process. The default is 0 on a CPU, whose cores the model needs, and where
                processes cannot be forked, else 4.
            tokens_per_chunk: Tokens, padding included, that are encoded at once; the default is
                2,048 on a CPU, whose caches they fill, and 16,384 elsewhere.
            seed: Seed of the order and of the negatives.
        """
        super().__init__()
        for key, value in {
            "batch_size": batch_size,
            "neg_nums": neg_nums,
            "passage_max_len": passage_max_len,
            "query_max_len": query_max_len,
            "tokens_per_chunk": tokens_per_chunk,
        }.items():
            if value is not None:
                require_positive(f"data.{key}", value)
        self.paths: dict[DataSet, str | list[str] | None] = {
            "train": train_path,
            "val": val_path,
            "test": test_path,
            "predict": predict_path,
        }
        self.teacher_paths: dict[DataSet, str | list[str] | None] = {
            "train": teacher_path,
            "val": val_teacher_path,
            "test": test_teacher_path,
        }
        self.declared = None if format == "auto" else Format(format)
        self.batch_size, self.neg_nums = batch_size, neg_nums
        self.shuffle, self.seed = shuffle, seed
        self._query_max_len, self.passage_max_len = query_max_len, passage_max_len
        self.teacher_embedding_dim = teacher_embedding_dim
        self._num_workers, self._tokens_per_chunk = num_workers, tokens_per_chunk
        self.datasets: dict[DataSet, ExampleDataset] = {}
        self._tokens: TokenTable | None = None
        self._resumed: dict[str, int] = {}

    # --- Reading ------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the Arrow cache, on one rank a node."""
        self._open_all()

    def setup(self, stage: str) -> None:
        """Open the rows that a stage needs."""
        self._open_all()

    def _open_all(self) -> None:
        needed = self._needed()
        for name in needed:
            if name not in self.datasets:
                self.datasets[name] = self._open(name)
        formats = self._formats()
        if len(set(formats.values())) > 1:
            found = ", ".join(f"{name}: {row_format}" for name, row_format in formats.items())
            raise InputError(f"data: expected one format in all data sets, found {found}")
        # Anew in each run, whose model may be another.
        self._tokens = self._open_tokens() if "train" in needed else None

    def _open_tokens(self) -> TokenTable | None:
        """Open the token ids of the training rows, which are tokenised where there are none yet.

        A run that encodes fewer texts than the rows hold tokenises as it goes, so that a short one
        on many rows starts at once.
        """
        module, data = self.trainer.lightning_module, self.datasets["train"]
        batches = module.num_steps * self.trainer.accumulate_grad_batches
        encoded = data.num_texts * batches / len(self.sampler("train"))
        if encoded < data.rows.texts_per_row.sum():
            return None
        collator = self.collator(module.encoder)
        key = collator.tokens_key
        return None if key is None else TokenTable(data.rows, collator, key)

    def _formats(self) -> dict[DataSet, Format]:
        # Of what has a loss: predict takes the queries of any format.
        opened = {name: data.rows.format for name, data in self.datasets.items()}
        return {name: row_format for name, row_format in opened.items() if name != "predict"}

    def _needed(self) -> list[DataSet]:
        names = NEEDED[str(self.trainer.state.fn.value)]
        if self.paths[names[0]] is None:
            raise InputError(f"data.{names[0]}_path: expected a file, found nothing")
        return [name for name in names if self.paths[name] is not None]

    def _read(self, name: DataSet) -> Rows:
        # Queries alone are what predict takes from rows of any format.
        declared = Format.DISTILL if name == "predict" else self.declared
        return Rows(resolve_paths(self.paths[name] or [], f"data.{name}_path"), declared)

    def _open(self, name: DataSet) -> ExampleDataset:
        rows = self._read(name)
        paths = self.teacher_paths.get(name)
        key = "data.teacher_path" if name == "train" else f"data.{name}_teacher_path"
        teacher = None
        if rows.format == Format.DISTILL and name != "predict":
            if paths is None:
                raise InputError(
                    f"{key}: expected the teacher's memory map for distill data, found nothing"
                )
            teacher = TeacherStore(
                [paths] if isinstance(paths, str) else paths,
                len(rows),
                self.teacher_embedding_dim,
                rows.queries_digest,
            )
        elif paths is not None:
            raise InputError(
                f"{key}: expected distill data (rows of 'query' alone), found {rows.format} rows"
            )
        return ExampleDataset(rows, self.neg_nums, self.seed, teacher)

    # --- Facts that others ask for ------------------------------------------------------

    @property
    def format(self) -> Format | None:
        """Format of the opened data; None when there is none (predict)."""
        return next(iter(self._formats().values()), None)

    @property
    def query_max_len(self) -> int:
        """Longest query in tokens."""
        if self._query_max_len is not None:
            return self._query_max_len
        return 512 if self.format == Format.DISTILL else 128

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that are encoded at once."""
        if self._tokens_per_chunk is not None:
            return self._tokens_per_chunk
        return 2048 if self._is_on_cpu else 16384

    @property
    def num_workers(self) -> int:
        """Processes of each rank that make batches ahead."""
        if self._num_workers is not None:
            return self._num_workers
        # Started otherwise than by fork, each would be sent a copy of the encoder.
        return 4 if multiprocessing.get_start_method() == "fork" and not self._is_on_cpu else 0

    @property
    def _is_on_cpu(self) -> bool:
        return self.trainer.strategy.root_device.type == "cpu"

    @property
    def max_len(self) -> int:
        """Longest text of the opened data in tokens."""
        if self.format == Format.DISTILL:
            return self.query_max_len
        return max(self.query_max_len, self.passage_max_len)

    @property
    def teacher_dim(self) -> int | None:
        """Width of the teacher's embeddings; None without a teacher."""
        stores = [data.teacher for data in self.datasets.values() if data.teacher is not None]
        return stores[0].width if stores else None

    def sampler(self, name: DataSet) -> GlobalBatchSampler:
        """Return the order of one data set's batches on this rank."""
        return GlobalBatchSampler(
            len(self.datasets[name]),
            self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle and name == "train",
            rank=self.trainer.global_rank,
            num_ranks=self.trainer.world_size,
            cursor=self._cursor if name == "train" else lambda: (0, 0),
        )

    def _cursor(self) -> Cursor:
        # Asked at the start of each epoch, and once after a resume in the middle of one.
        epoch, batches = self.trainer.current_epoch, self._batches_trained
        if self._ended_with_an_epoch:
            # Loader workers ask before Lightning has turned to the next epoch.
            epoch, batches = self.trainer.fit_loop.epoch_progress.current.ready, 0
        return epoch, batches

    @property
    def _batches_trained(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    @property
    def _ended_with_an_epoch(self) -> bool:
        return bool(self._resumed) and self._batches_trained >= self._resumed["batches"]

    @property
    def batches_per_epoch(self) -> int:
        """Batches that an epoch trains on."""
        batches, limit = len(self.sampler("train")), self.trainer.limit_train_batches
        if isinstance(limit, int):
            return min(batches, limit)
        return batches if limit is None else int(batches * limit)

    def state_dict(self) -> dict[str, int]:
        """Return what a place in the middle of an epoch depends on."""
        if "train" not in self.datasets:
            return {}
        sampler = self.sampler("train")
        return {
            "global_batch": sampler.global_batch_size,
            "examples": sampler.num_examples,
            "batches": self.batches_per_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the state of a checkpoint."""
        self._resumed = state_dict

    def _refuse_another_order(self) -> None:
        if not self._resumed or not self._batches_trained or self._ended_with_an_epoch:
            return
        saved, now = self._resumed, self.state_dict()
        if saved["examples"] != now["examples"]:
            raise InputError(
                "ckpt_path: it was saved in the middle of an epoch: expected the same data, "
                f"{saved['examples']:,} examples, found {now['examples']:,}"
            )
        if saved["global_batch"] != now["global_batch"]:
            ranks = self.trainer.world_size
            raise InputError(
                "ckpt_path: it was saved in the middle of an epoch: expected its global batch of "
                f"{saved['global_batch']}, found data.batch_size {self.batch_size} x {ranks} "
                f"rank(s) = {now['global_batch']}; give data.batch_size "
                f"{saved['global_batch'] / ranks:g}"
            )

    def collator(self, encoder: Encoder, name: DataSet = "train") -> Collator:
        """Return what makes batches of a data set for ``encoder``."""
        query_max_len = self.query_max_len
        if name == "predict" and self._query_max_len is None:
            query_max_len = encoder.max_seq_length or query_max_len
        return Collator(encoder, query_max_len, self.passage_max_len, self.tokens_per_chunk)

    # --- Loaders ------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, in the order of :class:`GlobalBatchSampler`."""
        self._refuse_another_order()
        return self._loader("train")

    def val_dataloader(self) -> DataLoader | list:
        """Return the validation batches in the files' order, none without ``val_path``."""
        return self._loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """Return the test batches in the files' order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return batches of queries alone, in the file's order."""
        return self._loader("predict")

    def _loader(self, name: DataSet) -> DataLoader:
        data = self.datasets[name]
        if name == "train" and self._tokens is not None:
            # Here alone: who else reads the examples may have other limits.
            data = data.with_tokens(self._tokens.find)
        return DataLoader(
            data,
            batch_sampler=self.sampler(name),
            collate_fn=self.collator(self.trainer.lightning_module.encoder, name),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
