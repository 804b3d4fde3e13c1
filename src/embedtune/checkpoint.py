"""Training checkpoints: saved as a whole, and read on one machine without a run's processes."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from embedtune.encoder import EncoderSpec
from embedtune.errors import InputError

FSDP_FACTS = "meta.pt"
"""What Lightning's FSDP strategy saves beside the shards: all but weights and optimiser states."""
DEEPSPEED_TAG = "latest"
"""File with the name of the folder that holds DeepSpeed's shards."""
PREFIX = "encoder."
"""Of the encoder's weights among those of the module."""


Kind = Literal["file", "fsdp", "zero"]
"""``file`` is what one process and DDP save, the others are folders."""


class Checkpoint(NamedTuple):
    """What an encoder is rebuilt from: ``weights`` are whole, float32 and on the CPU."""

    spec: EncoderSpec
    weights: dict[str, Tensor]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a fit's folder to go on from, None where there is none.

    That is ``last.ckpt``; or the newest whole one, if a fit was killed before it could link it.
    """
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.lstat().st_mtime)
    for path in (Path(folder) / "last.ckpt", *reversed(found)):
        with contextlib.suppress(InputError):
            kind_of(path)
            return path
    return None


def kind_of(path: Path) -> Kind:
    """Tell what kind of checkpoint a path is.

    Raises:
        InputError: Neither a file nor a folder of a known kind.
    """
    path = Path(path)
    if path.is_file():
        return "file"
    if (path / FSDP_FACTS).is_file() and (path / ".metadata").is_file():
        return "fsdp"
    if (path / DEEPSPEED_TAG).is_file():
        return "zero"
    found = "an incomplete or foreign folder" if path.is_dir() else "nothing"
    raise InputError(f"{path}: expected a checkpoint of embedtune fit, found {found}")


def read_spec(path: Path) -> EncoderSpec:
    """Return the structure of a checkpoint's encoder.

    Raises:
        InputError: Not a checkpoint of embedtune.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "zero":
        # Any rank's will do. DeepSpeed's own objects are in it, hence not weights_only.
        file, safe = _zero_states(path), False
    else:
        file, safe = (path if kind == "file" else path / FSDP_FACTS), True
    try:
        content = torch.load(file, map_location="cpu", weights_only=safe, mmap=True)
        return EncoderSpec(**content["encoder_spec"])
    except Exception as error:
        raise InputError(f"{path}: expected a checkpoint of embedtune fit: {error}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the encoder of a checkpoint, put together from the shards of all ranks.

    Raises:
        InputError: Not a checkpoint of embedtune, or a part of it is missing.
    """
    path = Path(path)
    readers: dict[Kind, Callable[[Path], dict[str, Tensor]]] = {
        "file": _read_file,
        "fsdp": _read_fsdp,
        "zero": _read_zero,
    }
    spec = read_spec(path)
    try:
        weights = readers[kind_of(path)](path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: cannot read all of its weights: {reason}") from error
    return Checkpoint(
        spec,
        {
            name.removeprefix(PREFIX): tensor
            for name, tensor in weights.items()
            if name.startswith(PREFIX)
        },
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def _read_fsdp(path: Path) -> dict[str, Tensor]:
    prefix = f"model.{PREFIX}"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in stored.items()
        if name.startswith(prefix) and isinstance(facts, TensorStorageMetadata)
    }
    dcp.load(weights, checkpoint_id=path, no_dist=True)  # without the optimiser's states
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _zero_states(path: Path) -> Path:
    """Return the file of a rank, with all that is not divided."""
    tag = (path / DEEPSPEED_TAG).read_text().strip()
    return min((path / tag).glob("*_model_states.pt"))


def _read_zero(path: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    file = _zero_states(path)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trained = get_fp32_state_dict_from_zero_checkpoint(str(path), file.parent.name)
    # Stage 1 keeps weights that are not trained elsewhere.
    module = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["module"]
    return {name: tensor.float() for name, tensor in {**module, **trained}.items()}


class SavesFolders(Strategy):
    """Saves a checkpoint as a folder that is whole or not there, as files are by Lightning."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save beside, and rename when every rank has written its part."""
        folder = Path(self.broadcast(filepath))
        # A rank that dies while saving leaves the part, and the checkpoint before it as it was.
        part = folder.with_name(f"{folder.name}.part")
        if self.is_global_zero:
            _remove(part)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            former = folder.with_name(f"{folder.name}.former")
            if folder.exists():
                folder.rename(former)
            part.rename(folder)
            _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
