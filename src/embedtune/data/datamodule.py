"""The LightningDataModule: files in, batches out."""

from os import PathLike
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from embedtune.checkpoints.resume import Place
from embedtune.data import device_defaults
from embedtune.data.collate import Collator
from embedtune.data.opened import Files, OpenedData, Part
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.data.sampler import Cursor, GlobalBatchSampler
from embedtune.data.testset_batches import TEXTS_PER_BATCH, TextCollator
from embedtune.data.token_table import TokenTable
from embedtune.distributed.exchange import refuse_other_ranks
from embedtune.errors import InputError, require_not_negative, require_positive
from embedtune.models.encoder import Encoder
from embedtune.models.spec import Role
from embedtune.models.towers import layer_width

Evaluated = str | list[str] | dict[str, Any] | None
"""See ``testsets.name_sets``. Under a narrower type what does not fit would be one odd path."""
NEEDED: dict[str, tuple[Part, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The parts of the data that each Trainer function reads; the first of them is required."""
DATA_OF: dict[Part, str] = {
    "train": "training",
    "val": "validation",
    "test": "test",
    "predict": "prediction",
}
"""What the data of each part are called."""
LENGTHS_SAMPLE, LONGEST_TEXTS = 1000, 64
"""Examples whose texts tell how long texts are, where not all are tokenised ahead; and how many of
these texts, the longest in characters, are."""


class EmbeddingDataModule(pl.LightningDataModule):
    """Batches from jsonl files of the four formats.

    The data module owns the order of the examples, so a Trainer must leave it alone:
    ``Trainer(use_distributed_sampler=False)`` (the command line sees to it).
    """

    trainer: Any  # attached by Lightning before any hook is called

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: Evaluated = None,
        test_path: Evaluated = None,
        predict_path: str | None = None,
        format: Literal["auto", "pair", "triplet", "scored", "distill"] = "auto",
        batch_size: int = 32,
        neg_nums: int = 15,
        query_max_len: int | None = None,
        passage_max_len: int = 512,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
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
            val_path: What a fit is measured on, before the first step and after each epoch: a BEIR
                folder or one of its qrels files (nDCG@10 and more), scored rows (Spearman
                correlation), or rows of the training format (loss); several as a list, or by name.
            test_path: The same, for ``embedtune test``.
            predict_path: A jsonl file with ``query`` fields, or a text file with a text a line.
            format: Format of the rows; auto takes it from the fields, over all rows.
            batch_size: Per rank: query-positive pairs (pair, triplet), lists (scored) or texts
                (distill).
            neg_nums: Hard negatives drawn per query in each epoch (triplet).
            query_max_len: Longest query in tokens; the default is 128, for distill 512, and for
                ``embedtune predict`` the model's own longest input.
            passage_max_len: Longest positive or negative in tokens.
            query_prompt: Prepended to each query, and exported as the model's own; empty for none.
                The default is what the rows bring, or else the model's own.
            document_prompt: The same for documents, whose prompt no row brings.
            teacher_path: float32 memory map of the teacher's embeddings of ``train_path``
                (distill), or several, which are concatenated along the width.
            val_teacher_path: The same for ``val_path``.
            test_teacher_path: The same for ``test_path``.
            teacher_embedding_dim: Width of all of ``teacher_path`` together; the default takes it
                from the files' sizes.
            shuffle: False trains in the files' order.
            num_workers: Processes of each rank that make batches ahead; 0 makes them in the
                training process. The default is 0 on a CPU, whose cores the model needs, and where
                processes cannot be forked, else as many as there are cores for a rank, at most 8.
            tokens_per_chunk: Tokens, padding included, that are encoded at once; the default is
                2,048 on a CPU, whose caches they fill, else 65,536 (131,072 for layers of at most
                512 numbers; half of it with ``grad_cache``).
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
        if num_workers is not None and num_workers < 0:
            raise InputError(f"data.num_workers: expected a number from 0 on, found {num_workers}")
        paths = {"train": train_path, "val": val_path, "test": test_path, "predict": predict_path}
        self.paths: dict[str, Any] = {part: _as_texts(given) for part, given in paths.items()}
        teachers = {
            "train": _as_texts(teacher_path),
            "val": _as_texts(val_teacher_path),
            "test": _as_texts(test_teacher_path),
        }
        require_not_negative("data.seed", seed)
        if format not in ("auto", *Format):
            raise InputError(f"data.format: expected auto, {', '.join(Format)}, found {format!r}")
        declared = None if format == "auto" else Format(format)
        files = Files(self.paths, teachers, declared, teacher_embedding_dim, neg_nums, seed)
        self.batch_size, self.neg_nums = batch_size, neg_nums
        self.shuffle, self.seed = shuffle, seed
        self._query_max_len, self.passage_max_len = query_max_len, passage_max_len
        self._prompts: dict[Role, str | None] = {"query": query_prompt, "document": document_prompt}
        self.teacher_embedding_dim = teacher_embedding_dim
        self._num_workers, self._tokens_per_chunk = num_workers, tokens_per_chunk
        self._opened = OpenedData(files)
        self.datasets, self.testsets = self._opened.datasets, self._opened.testsets
        self._tokens: TokenTable | None = None

    # --- Reading ------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fill the Arrow cache, on one rank a node."""
        self._open_all()

    def setup(self, stage: str) -> None:
        """Open the rows that a stage needs.

        Raises:
            InputError: A file is broken, or a rank has another than rank 0.
        """
        self._open_all()
        refuse_other_ranks(self._told_by_all(), self.trainer.strategy.root_device)

    def _told_by_all(self) -> dict[str, str]:
        """Return the digests of the parts of the data, by what to call each in a message."""
        digests = self._digests()
        found: dict[str, list[str]] = {part: [] for part in DATA_OF}
        for name in sorted(digests):
            found[name.partition("/")[0]].append(f"{name} {digests[name]}")
        return {f"{called} data": "\n".join(found[part]) for part, called in DATA_OF.items()}

    def _open_all(self) -> None:
        needed = self._needed()
        for part in needed:
            self._opened.open(part, self.trainer.lightning_module.loss_formats)
        for examples in self.datasets.values():
            self._refuse_two_prompts(examples.rows)
        # Anew in each run, whose model may be another.
        self._tokens = self._open_tokens() if "train" in needed else None

    def _refuse_two_prompts(self, rows: Rows) -> None:
        if self._prompts["query"] is not None and rows.has_prompts:
            raise InputError(
                f"data.query_prompt: expected none, for rows of {rows.paths[0]} bring prompts, "
                f"found {self._prompts['query']!r}"
            )

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

    def _needed(self) -> list[Part]:
        parts = NEEDED[str(self.trainer.state.fn.value)]
        if not self.paths[parts[0]]:
            raise InputError(f"data.{parts[0]}_path: expected a file, found nothing")
        return [part for part in parts if self.paths[part]]

    # --- Facts that others ask for ------------------------------------------------------

    @property
    def format(self) -> Format | None:
        """Format of the opened data; None when there is none (predict)."""
        return self._opened.format

    @property
    def prompts(self) -> dict[Role, str | None]:
        """Prompts by role: asked for, or shared by all training rows; None is the model's own."""
        prompts = dict(self._prompts)
        if prompts["query"] is None and "train" in self.datasets:
            prompts["query"] = self.datasets["train"].rows.prompt
        return prompts

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
        module = self.trainer.lightning_module
        width = layer_width(module.encoder.model)
        return device_defaults.tokens_per_chunk(self._device_type, width, module.grad_cache)

    @property
    def num_workers(self) -> int:
        """Processes of each rank that make batches ahead."""
        if self._num_workers is not None:
            return self._num_workers
        return device_defaults.num_workers(self._device_type, self.trainer.num_devices)

    @property
    def _device_type(self) -> str:
        return self.trainer.strategy.root_device.type

    def longest_text(self, encoder: Encoder) -> int:
        """Return the tokens of the longest training text, cut as it is encoded.

        Of a sample, where texts are tokenised as the run goes.
        """
        if self._tokens is not None:
            return self._tokens.longest
        collate = self.collator(encoder)
        sample = self.datasets["train"].sample(LENGTHS_SAMPLE)
        # In an order of their own: of equally long ones every run and rank takes the same.
        texts = dict.fromkeys(text for example in sample for text in collate.texts(example))
        longest = sorted(texts, key=lambda text: len(text.text))[-LONGEST_TEXTS:]
        features = [encoder.tokenize([t.text], t.role, t.prompt, t.max_len) for t in longest]
        return max(found["input_ids"].shape[-1] for found in features)

    @property
    def teacher_dim(self) -> int | None:
        """Width of the teacher's embeddings; None without a teacher."""
        stores = [data.teacher for data in self.datasets.values() if data.teacher is not None]
        return stores[0].width if stores else None

    def evaluated(self, part: Literal["val", "test"]) -> list[str]:
        """Return the names of the sets, such as ``val/dev``, whose batches a step gets.

        In the order of the loaders; scored rows that have a loss as well are in it twice.
        """
        names = (*self.datasets, *self.testsets)
        return [name for name in names if name.startswith(f"{part}/")]

    def digests(self, part: Literal["val", "test"]) -> dict[str, str]:
        """Return the digest of each set that is evaluated, by its name."""
        found = self._digests()
        return {name: found[name] for name in self.evaluated(part)}

    def _digests(self) -> dict[str, str]:
        found = {name: data.rows.digest for name, data in self.datasets.items()}
        return found | {name: texts.digest for name, texts in self.testsets.items()}

    def sampler(self, name: str) -> GlobalBatchSampler:
        """Return the order of one data set's batches on this rank."""
        is_train = name == "train"
        return self._order(
            len(self.datasets[name]),
            self.batch_size,
            shuffle=self.shuffle and is_train,
            cursor=self._cursor if is_train else lambda: (0, 0),
        )

    def _cursor(self) -> Cursor:
        """Return where an epoch starts: asked at its start, and after a resume in its middle."""
        loop = self.trainer.fit_loop
        # Overfitting is on the same batches again and again.
        epoch = 0 if self.trainer.overfit_batches else loop.epoch_progress.current.completed
        return epoch, loop.epoch_loop.batch_progress.current.ready

    def _order(self, count: int, batch_size: int, **more: Any) -> GlobalBatchSampler:
        ranks = {"rank": self.trainer.global_rank, "num_ranks": self.trainer.world_size}
        return GlobalBatchSampler(count, batch_size, seed=self.seed, **ranks, **more)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that an epoch trains on."""
        batches, limit = len(self.sampler("train")), self.trainer.limit_train_batches
        if isinstance(limit, int):
            return min(batches, limit)
        return batches if limit is None else int(batches * limit)

    @property
    def start(self) -> Place:
        """The start of the training data, with what a place in the middle of an epoch depends on.

        Without training data, as when a model is only evaluated, it tells nothing.
        """
        if "train" not in self.datasets:
            return Place()
        sampler = self.sampler("train")
        return Place(
            batches=self.batches_per_epoch,
            examples=sampler.num_examples,
            global_batch=sampler.global_batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            data=self.datasets["train"].rows.digest,
        )

    def collator(self, encoder: Encoder, name: str = "train") -> Collator:
        """Return what makes batches of a data set for ``encoder``."""
        query_max_len = self.query_max_len
        if name == "predict" and self._query_max_len is None:
            query_max_len = encoder.longest("query")
        prompts: dict[Role, str | None] = {
            role: encoder.default_prompt(role) if prompt is None else prompt or None
            for role, prompt in self.prompts.items()
        }
        limits = (query_max_len, self.passage_max_len, self.tokens_per_chunk)
        return Collator(encoder, *limits, prompts)

    # --- Loaders ------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, in the order of :class:`GlobalBatchSampler`."""
        return self._loader("train")

    def val_dataloader(self) -> list[DataLoader]:
        """Return the batches of each set of ``val_path``, none without it."""
        return self._evaluated_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Return the batches of each set of ``test_path``."""
        return self._evaluated_loaders("test")

    def predict_dataloader(self) -> DataLoader:
        """Return batches of queries alone, in the file's order."""
        return self._loader("predict")

    def _evaluated_loaders(self, part: Literal["val", "test"]) -> list[DataLoader]:
        names = self.evaluated(part)
        with_loss = [name for name in self.datasets if name in names]
        return [
            *(self._loader(name) for name in with_loss),
            *(self.text_loader(name) for name in names[len(with_loss) :]),
        ]

    def text_loader(self, name: str, encoder: Encoder | None = None) -> DataLoader:
        """Return batches of the texts of a test set, as an encoder, or the module's, has them."""
        texts = self.testsets[name]
        encoder = encoder or self.trainer.lightning_module.encoder
        collate = TextCollator(encoder, self.tokens_per_chunk)
        return self._batches(
            texts, self._order(len(texts), TEXTS_PER_BATCH, shuffle=False), collate
        )

    def _loader(self, name: str) -> DataLoader:
        data = self.datasets[name]
        collate = self.collator(self.trainer.lightning_module.encoder, name)
        if name == "train" and self._tokens is not None:
            if self._tokens.key != collate.tokens_key:  # a checkpoint has brought a prompt
                self._tokens = self._open_tokens()
            # Here alone: who else reads the examples may have other limits.
            data = data.with_tokens(self._tokens.find) if self._tokens is not None else data
        return self._batches(data, self.sampler(name), collate)

    def _batches(self, data: Any, sampler: GlobalBatchSampler, collate: Any) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device_type == "cuda",
        )


def _as_texts(paths: Any) -> Any:
    """Return paths as a YAML has them, of which Python has some as objects."""
    if isinstance(paths, list | tuple):
        return [_as_texts(path) for path in paths]
    return str(paths) if isinstance(paths, PathLike) else paths
