"""Refuse ranks that do not see one run folder, before any of them writes into its own."""

import time
import uuid
from pathlib import Path

import lightning.pytorch as pl

from embedtune.distributed import exchange
from embedtune.errors import InputError
from embedtune.whole_files import write_text

SECONDS = 40
"""For which a file that rank 0 has written is looked for: network file systems remember for 30
that there was none."""


class SharedFolder(pl.Callback):
    """Find out at the start whether every rank sees what rank 0 writes into the run folder.

    Checkpoints are written and read there, by every rank under FSDP and ZeRO. The cache may be
    each machine's own.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write a file on rank 0, and look for it on the others.

        Raises:
            InputError: It names the first rank that does not see it; on every rank.
        """
        if not exchange.is_distributed():
            return
        folder, strategy = Path(trainer.default_root_dir), trainer.strategy
        path = folder / strategy.broadcast(f".seen-{uuid.uuid4().hex}")
        if trainer.is_global_zero:
            write_text(path, "Every rank looks for this file when a run starts.\n")
        strategy.barrier()
        try:
            seen = exchange.gather_counts([_is_seen(path)], strategy.root_device)
        finally:
            if trainer.is_global_zero:
                path.unlink(missing_ok=True)
        blind = [rank for rank, (sees,) in enumerate(seen) if not sees]
        if blind:
            raise InputError(
                "trainer.default_root_dir: expected a folder that all ranks share, found that rank "
                f"{blind[0]} does not see in {folder} what rank 0 has written there"
            )


def _is_seen(path: Path) -> bool:
    end = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True
