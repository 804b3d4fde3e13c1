"""Save checkpoints that are whole or not there, and load none that is damaged."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy

from embedtune.checkpoints.damage import (
    refuse_damaged_file,
    refuse_damaged_shards,
    write_shard_digests,
)
from embedtune.checkpoints.pickles import refuse_code_in_file
from embedtune.checkpoints.shards import refuse_code
from embedtune.errors import InputError
from embedtune.whole_files import discard, naming, part_of, put, remove, sweep_together

CHECKPOINTS = "*.ckpt"
"""What a process that died while saving has left a part of, beside those before it."""


class WholeFiles(TorchCheckpointIO):
    """Saves a checkpoint as a file that is whole or not there, also where /tmp is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save beside, and rename."""
        path = Path(path)
        sweep_together(path.parent, CHECKPOINTS)
        with naming(path):
            super().save_checkpoint(checkpoint, part_of(path), storage_options)
        put(part_of(path), path)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values alone, which run no code."""
        refuse_code_in_file(Path(path))
        refuse_damaged_file(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)


class SavesFolders(ParallelStrategy):
    """Saves a checkpoint as a folder of shards that is whole or not there."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load what holds tensors and plain values alone, which run no code."""
        refuse_code(Path(checkpoint_path))
        self._refuse_damaged(Path(checkpoint_path))
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _refuse_damaged(self, folder: Path) -> None:
        """Refuse a damaged folder on every rank, though each reads its share of the files alone."""
        damage = ""
        try:
            refuse_damaged_shards(folder, self.global_rank, self.world_size)
        except InputError as error:
            damage = str(error)
        for rank in range(self.world_size):
            found = self.broadcast(damage, src=rank)
            if found:
                raise InputError(found)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save beside, and rename when every rank has written its part."""
        folder = Path(self.broadcast(filepath))
        if self.is_global_zero:
            sweep_together(folder.parent, CHECKPOINTS)
            remove(part_of(folder))
        self.barrier()
        super().save_checkpoint(checkpoint, part_of(folder), storage_options)
        self.barrier()
        if self.is_global_zero:
            write_shard_digests(part_of(folder))
            put(part_of(folder), folder)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a folder in a way that a kill leaves no half of it."""
        if self.is_global_zero:
            discard(Path(filepath))
