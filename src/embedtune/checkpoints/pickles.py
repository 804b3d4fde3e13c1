"""Read pickles of strangers: they name classes, and none but those listed here are ever looked up.

Loading an ordinary pickle runs what its author wants. torch's own ``weights_only`` reads tensors
and plain values; a few classes come on top, which DeepSpeed and torch save beside them.
"""

import io
import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from embedtune.errors import InputError

FSDP_METADATA = ".metadata"
"""What FSDP's shards hold, and where."""

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Plain records in the shards of ZeRO."""
SHARD_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
}
"""What FSDP's ``.metadata`` is made of, by module; the types of torch's numbers come on top."""


def load_tensors(file: Path | IO[bytes]) -> Any:
    """Return what torch has saved, on the CPU; tensors of a file stay there until they are used.

    Raises:
        pickle.UnpicklingError: It holds more than tensors and plain values, or is another file.
    """
    is_file = isinstance(file, Path)
    if isinstance(file, Path) and not _begins_as_zip(file):
        raise pickle.UnpicklingError("a file that torch has not saved")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_file)
    except pickle.UnpicklingError as error:  # torch's own message tells how to run the code
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = named[1] if named else "something else"
        raise pickle.UnpicklingError(f"a pickle that wants to use {found}") from error


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_zero(file: Path) -> Any:
    """Return what a rank has saved under ZeRO, on the CPU, as :func:`load_tensors`.

    Raises:
        pickle.UnpicklingError: It holds more than DeepSpeed saves.
    """
    homes = (name.rpartition(".") for name in DEEPSPEED)
    with torch.serialization.safe_globals([getattr(import_module(m), n) for m, _, n in homes]):
        return load_tensors(file)


def refuse_code_in_file(file: Path) -> None:
    """Refuse a checkpoint of one file that holds more than tensors and plain values.

    Raises:
        InputError: It does, or is no file of torch.
    """
    try:
        load_tensors(file)
    except Exception as error:  # whatever bytes that are no pickle lead to
        raise _refusal(file, error) from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_number or name in SHARD_METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a pickle that wants to use {module}.{name}")


def read_fsdp_metadata(folder: Path) -> Metadata:
    """Return what a folder of FSDP's shards says of them.

    Raises:
        pickle.UnpicklingError: It holds more than torch saves.
    """
    with (folder / FSDP_METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(type(metadata).__name__)
    return metadata


def refuse_code_in_fsdp(folder: Path) -> None:
    """Refuse a folder of FSDP's shards that torch would run code of.

    torch loads ``.metadata``, and of the shards what that declares to be no tensor, as ordinary
    pickles.

    Raises:
        InputError: Something else than what torch saves is there.
    """
    try:
        _refuse_code_in_bytes(folder, read_fsdp_metadata(folder))
    except Exception as error:  # whatever bytes that are no pickle lead to
        raise _refusal(folder, error) from error


def _refuse_code_in_bytes(folder: Path, metadata: Metadata) -> None:
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"a shard outside the folder: {place.relative_path}")
        is_pickle = isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
        shard = folder / place.relative_path
        if is_pickle and shard.is_file():  # who reads the weights says what is missing
            with shard.open("rb") as file:
                file.seek(place.offset)
                load_tensors(io.BytesIO(file.read(place.length)))


def refuse_code_in_zero(folder: Path) -> None:
    """Refuse a folder of ZeRO's shards that DeepSpeed would run code of.

    DeepSpeed loads all of its files as ordinary pickles.

    Raises:
        InputError: Something else than what DeepSpeed saves is there.
    """
    for file in sorted(folder.rglob("*")):
        try:
            if file.is_symlink() and file.is_dir():
                raise pickle.UnpicklingError("a link to another folder")
            if file.suffix == ".pt":
                load_zero(file)
        except Exception as error:  # whatever bytes that are no pickle lead to
            raise _refusal(file, error) from error


def _refusal(path: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"{path}: expected tensors and plain values alone, which run no code, found {reason}"
    )
