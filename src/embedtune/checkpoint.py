"""Training checkpoints: saved as a whole, and read on one machine without a run's processes."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
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
    paths = [*Path(folder).glob("*.ckpt"), *Path(folder).glob("*.ckpt.former")]
    found = sorted(paths, key=lambda path: path.lstat().st_mtime)
    for path in (Path(folder) / "last.ckpt", *reversed(found)):
        with contextlib.suppress(InputError):
            kind_of(path)
            return path
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a fit's folder by ``checkpoint.monitor``, None without one."""
    last = last_checkpoint(folder)
    states = {} if last is None else read_facts(last).get("callbacks", {})
    for name, state in states.items():
        if name.startswith("ModelCheckpoint") and state.get("monitor"):
            # By its name in the folder, which may have been moved.
            path = Path(folder) / Path(state["best_model_path"]).name
            return path if state["best_model_path"] and path.exists() else None
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
    if (path / DEEPSPEED_TAG).is_file() and any(_zero_folder(path).glob("*_model_states.pt")):
        return "zero"
    found = "an incomplete or foreign folder" if path.is_dir() else "nothing"
    raise InputError(f"{path}: expected a checkpoint of embedtune fit, found {found}")


def read_facts(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds beside weights and optimiser states.

    Raises:
        InputError: Not a checkpoint of embedtune.
    """
    kind = kind_of(path)
    if kind == "zero":
        # Any rank's will do. DeepSpeed's own objects are in it, hence not weights_only.
        file, safe = _zero_states(path), False
    else:
        file, safe = (path if kind == "file" else path / FSDP_FACTS), True
    try:
        facts = torch.load(file, map_location="cpu", weights_only=safe, mmap=True)
        EncoderSpec(**facts["encoder_spec"])
    except Exception as error:
        raise InputError(f"{path}: expected a checkpoint of embedtune fit: {error}") from error
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
        InputError: A part of them is missing.
    """
    readers: dict[Kind, Callable[[Path], dict[str, Tensor]]] = {
        "file": _read_file,
        "fsdp": _read_fsdp,
        "zero": _read_zero,
    }
    try:
        return readers[kind_of(path)](path)
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
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def _read_fsdp(path: Path) -> dict[str, Tensor]:
    prefix = "model."
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in stored.items()
        if name.startswith(prefix) and isinstance(facts, TensorStorageMetadata)
    }
    dcp.load(weights, checkpoint_id=path, no_dist=True)  # without the optimiser's states
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def zero_ranks(path: Path) -> int:
    """Return for how many ranks a checkpoint of ZeRO is divided."""
    return len(list(_zero_folder(path).glob("*_optim_states.pt")))


def is_zero3(path: Path) -> bool:
    """Tell whether a checkpoint of ZeRO is of stage 3, which also divides the parameters."""
    return _zero_states(path).name.startswith("zero")


def divide_anew(path: Path) -> None:
    """Add to a checkpoint of ZeRO what any number of ranks can go on from.

    That is DeepSpeed's universal checkpoint (Lian et al. 2024): a folder a parameter, each with the
    weight and the optimiser's states as a whole.
    """
    # Its name is written last: what a killed process left is made once more.
    if (path / "latest_universal").exists():
        return
    _remove(path / "universal")
    command = ["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(_zero_folder(path)), "--output_folder"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(path / "universal")], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{path}: cannot be divided anew: {reason}")


def _zero_folder(path: Path) -> Path:
    return path / (path / DEEPSPEED_TAG).read_text().strip()


def _zero_states(path: Path) -> Path:
    """Return the file of a rank, with all that is not divided."""
    return min(_zero_folder(path).glob("*_model_states.pt"))


def _read_zero(path: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    file = _zero_states(path)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),  # progress bars
    ):
        trained = get_fp32_state_dict_from_zero_checkpoint(str(path), file.parent.name)
    # Stage 1 keeps weights that are not trained elsewhere.
    module = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["module"]
    return {name: tensor.float() for name, tensor in {**module, **trained}.items()}


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that was stopped within an epoch, by time or steps, go on within it.

    Lightning counts such an epoch as done.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]
    trained = loops["epoch_loop.batch_progress"]["current"]["ready"]
    is_open = 0 < trained < checkpoint.get("EmbeddingDataModule", {}).get("batches", 0)
    if is_open and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for progress in epochs.values():
            progress["processed"] -= 1
            progress["completed"] = progress["processed"]


class WholeFiles(TorchCheckpointIO):
    """Saves a checkpoint as a file that is whole or not there, also where /tmp is another disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save beside, and rename."""
        part = Path(path).with_name(f"{Path(path).name}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        _put(part, Path(path))


class SavesFolders(Strategy):
    """Saves a checkpoint as a folder of shards that is whole or not there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save beside, and rename when every rank has written its part."""
        folder = Path(self.broadcast(filepath))
        # A rank that dies while saving leaves the part, and the checkpoint before it as it was.
        part = folder.with_name(f"{folder.name}.part")
        if self.is_global_zero:
            for leftover in folder.parent.glob("*.ckpt.part"):
                _remove(leftover)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            _put(part, folder)


def _put(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path``, and then remove what had that name."""
    former = path.with_name(f"{path.name}.former")
    _remove(former)
    if path.is_dir() or (part.is_dir() and path.exists()):  # files are replaced at once
        path.rename(former)
    part.replace(path)
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
