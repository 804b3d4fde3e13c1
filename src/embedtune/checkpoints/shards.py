"""The folders of shards that FSDP and DeepSpeed save, read and divided anew."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from embedtune.checkpoints.damage import refuse_damaged_shards
from embedtune.checkpoints.pickles import (
    FSDP_METADATA,
    load_zero,
    read_fsdp_metadata,
    refuse_code_in_file,
    refuse_code_in_fsdp,
    refuse_code_in_zero,
)
from embedtune.errors import InputError
from embedtune.whole_files import remove

FSDP_FACTS = "meta.pt"
"""What Lightning's FSDP strategy saves beside the shards: all but weights and optimiser states."""
FSDP_PREFIX = "model."
"""Of the module's weights among what the shards hold."""
DEEPSPEED_TAG = "latest"
"""File with the name of the folder that holds DeepSpeed's shards."""
UNIVERSAL_TAG = "latest_universal"
"""The same of those that were divided anew."""

Kind = Literal["file", "fsdp", "zero"]
"""``file`` is what one process and DDP save, the others are folders."""


def kind_of(path: Path) -> Kind:
    """Tell what kind of checkpoint a path is.

    Raises:
        InputError: Neither a file nor a folder of a known kind.
    """
    path = Path(path)
    if path.is_file():
        return "file"
    if (path / FSDP_FACTS).is_file() and (path / FSDP_METADATA).is_file():
        return "fsdp"
    if (path / DEEPSPEED_TAG).is_file() and any(_zero_folder(path).glob("*_model_states.pt")):
        return "zero"
    found = "an incomplete or foreign folder" if path.is_dir() else "nothing"
    raise InputError(f"{path}: expected a checkpoint of embedtune fit, found {found}")


def refuse_code(path: Path) -> None:
    """Refuse a folder of shards that the libraries which load it would run code of.

    Raises:
        InputError: Not such a folder, or it holds more than tensors and plain values.
    """
    kind = kind_of(path)
    if kind == "file":
        raise InputError(f"{path}: expected a folder of shards, found a file")
    if kind == "zero":
        refuse_code_in_zero(path)
    else:
        refuse_code_in_file(path / FSDP_FACTS)
        refuse_code_in_fsdp(path)


def fsdp_shapes(path: Path) -> dict[str, Tensor]:
    """Return the module's weights in the shards of FSDP without their values, on ``meta``."""
    stored = read_fsdp_metadata(path).state_dict_metadata
    return {
        name.removeprefix(FSDP_PREFIX): torch.empty(
            facts.size, dtype=facts.properties.dtype, device="meta"
        )
        for name, facts in stored.items()
        if name.startswith(FSDP_PREFIX) and isinstance(facts, TensorStorageMetadata)
    }


def read_fsdp(path: Path) -> dict[str, Tensor]:
    """Return the module's weights from the shards of FSDP."""
    refuse_code_in_fsdp(path)
    refuse_damaged_shards(path)
    weights: dict[str, Any] = {
        FSDP_PREFIX + name: torch.empty_like(shape, device="cpu")
        for name, shape in fsdp_shapes(path).items()
    }
    dcp.load(weights, checkpoint_id=path, no_dist=True)  # without the optimiser's states
    return {name.removeprefix(FSDP_PREFIX): tensor for name, tensor in weights.items()}


def zero_shapes(path: Path) -> dict[str, Tensor]:
    """Return the weights that ZeRO trained without their values, on ``meta``."""
    groups = load_zero(zero_states(path))["param_shapes"]
    return {
        name: torch.empty(shape, device="meta") for group in groups for name, shape in group.items()
    }


def zero_ranks(path: Path) -> int:
    """Return for how many ranks a checkpoint of ZeRO is divided."""
    return len(list(_zero_folder(path).glob("*_optim_states.pt")))


def is_zero3(path: Path) -> bool:
    """Tell whether a checkpoint of ZeRO is of stage 3, which also divides the parameters."""
    return zero_states(path).name.startswith("zero")


def divide_anew(path: Path) -> None:
    """Add to a checkpoint of ZeRO what any number of ranks can go on from.

    That is DeepSpeed's universal checkpoint (Lian et al. 2024): a folder a parameter, each with the
    weight and the optimiser's states as a whole.
    """
    # Its name is written last: what a killed process left is made once more.
    if (path / UNIVERSAL_TAG).exists():
        _folder_of(path / UNIVERSAL_TAG)
        return
    refuse_code_in_zero(path)
    refuse_damaged_shards(path)
    remove(path / "universal")
    command = ["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(_zero_folder(path)), "--output_folder"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(path / "universal")], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{path}: cannot be divided anew: {reason}")


def _zero_folder(path: Path) -> Path:
    return _folder_of(path / DEEPSPEED_TAG)


def _folder_of(tag: Path) -> Path:
    """Return the folder that a file names, which must lie beside it."""
    name = tag.read_text("utf-8", errors="replace").strip()
    folder = tag.parent / name
    if Path(name).name != name or folder.resolve().parent != tag.parent.resolve():
        raise InputError(f"{tag}: expected the name of a folder beside it, found {name!r}")
    return folder


def zero_states(path: Path) -> Path:
    """Return the file of a rank, with all that is not divided."""
    return min(_zero_folder(path).glob("*_model_states.pt"))


def read_zero(path: Path) -> dict[str, Tensor]:
    """Return the module's weights from the shards of ZeRO.

    In float32, but for those that are frozen: in what was computed with.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    refuse_code_in_zero(path)
    refuse_damaged_shards(path)
    file = zero_states(path)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),  # progress bars
    ):
        trained = get_fp32_state_dict_from_zero_checkpoint(str(path), file.parent.name)
    # Stage 1 keeps weights that are not trained elsewhere.
    module = load_zero(file)["module"]
    return {**module, **trained}
