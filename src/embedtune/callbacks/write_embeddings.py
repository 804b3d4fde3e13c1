"""Write predicted embeddings to one ``.npy`` file, row i for line i of the input."""

import logging
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from embedtune.data.batch import Batch
from embedtune.data.datamodule import EmbeddingDataModule
from embedtune.errors import InputError
from embedtune.training.module import EmbeddingModule
from embedtune.whole_files import part_of, put, remove

log = logging.getLogger("embedtune")


class WriteEmbeddings(pl.Callback):
    """Write ``<default_root_dir>/embeddings.npy``, float32 ``[rows, width]``.

    Rows are written beside as batches come; the file is there when all ranks have finished. A
    ``fast_dev_run`` leaves what is there.
    """

    def __init__(self) -> None:
        """Start without a file."""
        self._file: np.memmap | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to leave rows out, which would be zeros.

        Raises:
            InputError: A limit leaves some out.
        """
        limit = trainer.limit_predict_batches
        is_whole = isinstance(limit, float) and limit == 1  # the number 1 is one batch
        if stage == "predict" and not is_whole and not cast(Any, trainer).fast_dev_run:
            raise InputError(
                f"trainer.limit_predict_batches: expected 1.0, for embeddings.npy has a row for "
                f"each text, found {limit}"
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where texts are cut shorter than the model's own ``encode`` would."""
        data: EmbeddingDataModule = cast(Any, trainer).datamodule
        encoder = cast(EmbeddingModule, pl_module).encoder
        cut, longest = data.collator(encoder, "predict").query_max_len, encoder.longest("query")
        if cut < longest:
            said = "texts are cut at %s tokens, by data.query_max_len; the model itself takes %s"
            log.info(said, f"{cut:,}", f"{longest:,}")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch at their places; every rank writes its own."""
        if cast(Any, trainer).fast_dev_run:  # which leaves rows out
            return
        if self._file is None:
            self._file = self._create(trainer, outputs.shape[1])
        # Not by the memory map: ranks on other nodes may hold the same page of it.
        embeddings = outputs.float().cpu().numpy()
        with part_of(self.path(trainer)).open("r+b", buffering=0) as file:
            for row, embedding in zip(batch.example_id.tolist(), embeddings, strict=False):
                file.seek(self._file.offset + row * embedding.nbytes)
                file.write(embedding.tobytes())

    def _create(self, trainer: Any, width: int) -> np.memmap:
        data = trainer.datamodule
        assert isinstance(data, EmbeddingDataModule)
        path = part_of(self.path(trainer))
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (len(data.datasets["predict"]), width)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
        trainer.strategy.barrier()
        return np.lib.format.open_memmap(path, mode="r")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the file in its place, and say where it is."""
        if cast(Any, trainer).fast_dev_run:
            return
        assert self._file is not None
        shape, self._file = list(self._file.shape), None
        path = self.path(trainer)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            put(part_of(path), path)
        trainer.strategy.barrier()
        log.info("wrote %s, float32 %s", path, shape)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove what is half written."""
        if self._file is not None and trainer.is_global_zero:
            remove(part_of(self.path(trainer)))

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return where the file goes."""
        return Path(trainer.default_root_dir) / "embeddings.npy"
