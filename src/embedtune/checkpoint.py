"""Read training checkpoints of every strategy on one machine, without its processes."""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from embedtune.encoder import EncoderSpec
from embedtune.errors import InputError

FSDP_FACTS = "meta.pt"
"""What Lightning's FSDP strategy saves beside the shards: all but weights and optimiser states."""
PREFIX = "encoder."
"""Of the encoder's weights among those of the module."""


class Checkpoint(NamedTuple):
    """What an encoder is rebuilt from: ``weights`` are whole, float32 and on the CPU."""

    spec: EncoderSpec
    weights: dict[str, Tensor]


def kind_of(path: Path) -> str:
    """Return ``file`` (one process, DDP), ``fsdp`` or ``zero``.

    Raises:
        InputError: Neither a file nor a folder of a known kind.
    """
    path = Path(path)
    if path.is_file():
        return "file"
    if (path / FSDP_FACTS).is_file() and (path / ".metadata").is_file():
        return "fsdp"
    if any(path.glob("*/*_model_states.pt")):
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
        file, safe = min(path.glob("*/*_model_states.pt")), False
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
    readers = {"file": _read_file, "fsdp": _read_fsdp, "zero": _read_zero}
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


def _read_zero(path: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    file = min(path.glob("*/*_model_states.pt"))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trained = get_fp32_state_dict_from_zero_checkpoint(str(path), file.parent.name)
    # Stage 1 keeps weights that are not trained elsewhere.
    module = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["module"]
    return {name: tensor.float() for name, tensor in {**module, **trained}.items()}
