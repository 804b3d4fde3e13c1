"""Pick the strategy of a fit that names none."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from embedtune.checkpoints.shards import is_zero3, kind_of
from embedtune.models.architecture import is_decoder
from embedtune.models.encoder import Encoder

AUTO = "auto"
"""The name that asks for a pick."""
SHARE_OF_STATES = 0.5
"""Share of a device's memory that weights, gradients and states may take; activations the rest."""
REDUCE_BUCKET, LIVE_PARAMETERS = 200_000_000, 1_000_000_000
"""``reduce_bucket_size`` and ``stage3_max_live_parameters`` where nobody sets them."""

SHORT = ": activations may not fit beside them; zero3_offload needs less"


class Devices(NamedTuple):
    """Where a run trains.

    Attributes:
        ranks: Processes of the run, over all nodes.
        kind: torch's name of the devices, such as ``cuda``.
        memory: Bytes that each rank has.
    """

    ranks: int
    kind: str
    memory: int


class Picked(NamedTuple):
    """A strategy by its name, and why it is this one, for people to read."""

    name: str
    reason: str


def find_devices(settings: dict[str, Any]) -> Devices:
    """Return where a Trainer with these settings trains.

    Args:
        settings: Of the Trainer: ``accelerator``, ``devices``, ``num_nodes``, ``plugins``.
    """
    # Lightning alone knows what these come to beside torchrun and SLURM; nothing is started here.
    trainer = pl.Trainer(
        **settings,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    strategy: Any = trainer.strategy
    ranks = 1 if isinstance(strategy, SingleDeviceStrategy) else trainer.world_size
    kind = strategy.root_device.type
    if kind == "cuda":
        numbers = range(torch.cuda.device_count())
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in numbers)
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // trainer.num_devices
    else:
        memory = 0  # Windows, which has no DeepSpeed whose stage depended on it
    return Devices(ranks, kind, memory)


def strategy_of(checkpoint: Path, devices: Devices) -> Picked:
    """Return the strategy that goes on from a checkpoint, which is the one that saved it.

    Raises:
        InputError: It is none.
    """
    name: str = kind_of(checkpoint)
    if name == "zero":
        name = "zero3" if is_zero3(checkpoint) else "zero2"
    elif name == "file":
        name = AUTO if devices.ranks == 1 else "ddp"
    return Picked(name, f"to go on from {checkpoint}")


def pick_strategy(
    encoder: Encoder, devices: Devices, precision: str, clips_values: bool = False
) -> Picked:
    """Pick by the kind of encoder: FSDP for those like BERT, DeepSpeed ZeRO for decoders.

    A decoder's stage is the lowest one with which weights, gradients and states fit into half of a
    rank's memory, by the formulas of docs/scaling.md for several chunks.

    Args:
        encoder: What will be trained.
        devices: Where.
        precision: By Lightning's names.
        clips_values: Whether gradients are clipped value by value, which ZeRO does not.
    """
    if devices.ranks == 1:
        return Picked(AUTO, "for one device: nothing is divided")
    among = f"on {devices.ranks} devices"
    if encoder.routes or not encoder.block_classes:
        return Picked("ddp", f"for a model without layers to divide {among}")
    if not is_decoder(getattr(encoder.model[0], "config", None)):
        return Picked("fsdp", f"for an encoder like BERT {among}")
    if find_spec("deepspeed") is None:
        return Picked("fsdp", f"for a decoder {among}, since deepspeed is not installed")
    if clips_values or (devices.kind == "cpu" and precision.startswith("16")):
        return Picked("fsdp", f"for a decoder {among}, since ZeRO does not clip or compute so")
    room, size = SHARE_OF_STATES * devices.memory, 4 if precision.startswith("32") else 2
    parameters = sum(p.numel() for p in encoder.parameters())
    needed = {stage: zero_bytes(stage, parameters, devices.ranks, size) for stage in (1, 2, 3)}
    stage = next((stage for stage in needed if needed[stage] <= room), 3)
    reason = (
        f"for a decoder {among}, {needed[stage] / 1e9:.1f} GB of weights, gradients and states "
        f"a rank, which has {devices.memory / 1e9:.1f} GB"
    )
    return Picked(f"zero{stage}", reason if needed[stage] <= room else reason + SHORT)


def zero_bytes(stage: int, parameters: int, ranks: int, size: int) -> float:
    """Return the bytes a rank that ZeRO needs beside activations, with several chunks a step.

    By the table of docs/scaling.md, after Rajbhandari et al. 2020, section 3.

    Args:
        stage: 1, 2 or 3.
        parameters: All of the model.
        ranks: Over which they are divided.
        size: Bytes of a number that is computed with.
    """
    if stage == 1:
        return 2 * size * parameters + 12 * parameters / ranks + 2 * size * REDUCE_BUCKET
    own, bucket = (12 + size) * parameters / ranks, size * REDUCE_BUCKET
    if stage == 2:
        return 2 * size * parameters + own + 2 * bucket
    live = size * min(parameters, LIVE_PARAMETERS)
    return own + size * parameters / ranks + bucket + live + size * parameters
