"""Read a training checkpoint of any strategy on one machine, without a run's processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from embedtune.checkpoints.damage import refuse_damaged_file
from embedtune.checkpoints.pickles import load_tensors, load_zero
from embedtune.checkpoints.shards import (
    FSDP_FACTS,
    Kind,
    kind_of,
    read_fsdp,
    read_zero,
    zero_states,
)
from embedtune.errors import InputError
from embedtune.models.spec import EncoderSpec

PREFIX = "encoder."
"""Of the encoder's weights among those of the module."""


class Checkpoint(NamedTuple):
    """What an encoder is rebuilt from: ``weights`` are whole and on the CPU.

    They are float32, but for frozen ones that ZeRO saved as it computed with them.
    """

    spec: EncoderSpec
    weights: dict[str, Tensor]


def read_facts(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds beside weights and optimiser states.

    Raises:
        InputError: Not a checkpoint of embedtune.
    """
    kind = kind_of(path)
    try:
        if kind == "zero":  # any rank's will do
            facts = load_zero(zero_states(path))
        else:
            facts = load_tensors(path if kind == "file" else path / FSDP_FACTS)
        EncoderSpec(**facts["encoder_spec"])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: expected a checkpoint of embedtune fit: {reason}") from error
    return facts


def read_spec(path: Path) -> EncoderSpec:
    """Return the structure of a checkpoint's encoder.

    Raises:
        InputError: Not a checkpoint of embedtune.
    """
    return EncoderSpec(**read_facts(path)["encoder_spec"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the module's weights, put together from the shards of all ranks, on the CPU.

    Raises:
        InputError: A part of them is missing or damaged.
    """
    readers: dict[Kind, Callable[[Path], dict[str, Tensor]]] = {
        "file": _read_file,
        "fsdp": read_fsdp,
        "zero": read_zero,
    }
    try:
        return readers[kind_of(path)](path)
    except InputError:
        raise
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # it wraps what happened on a rank
            cause = next(iter(error.failures.values()))[0]
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise InputError(f"{path}: cannot read all of its weights: {reason}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the encoder of a checkpoint of any strategy.

    Raises:
        InputError: Not a checkpoint of embedtune, or a part of it is missing.
    """
    return Checkpoint(
        read_spec(path),
        {
            name.removeprefix(PREFIX): tensor
            for name, tensor in read_weights(path).items()
            if name.startswith(PREFIX)
        },
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    refuse_damaged_file(path)
    return load_tensors(path)["state_dict"]
