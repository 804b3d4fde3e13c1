"""A checkpoint with a flipped bit is named, and never loaded as other weights."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from embedtune import InputError
from embedtune.checkpoints import read_weights
from embedtune.checkpoints.damage import refuse_damaged_shards, write_shard_digests
from embedtune.checkpoints.write import WholeFiles
from embedtune.models import EncoderSpec

FACTS = {"encoder_spec": EncoderSpec("base")._asdict()}
WEIGHTS = {f"encoder.{i}": torch.randn(40, 30) for i in range(3)}
FLIPS = 60


def save_file(path: Path) -> Path:
    torch.save({**FACTS, "state_dict": WEIGHTS}, path)
    return path


def save_fsdp(path: Path) -> Path:
    dcp.save({f"model.{k}": v for k, v in WEIGHTS.items()} | {"lr": 0.5}, checkpoint_id=path)
    torch.save(FACTS, path / "meta.pt")
    write_shard_digests(path)
    return path


def save_zero(path: Path) -> Path:
    """Save the files of ZeRO alone: DeepSpeed's own reader is tried in tests/distributed."""
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save({**FACTS, "module": WEIGHTS}, path / "checkpoint" / "mp_rank_00_model_states.pt")
    return path


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


def flip_weight(path: Path) -> None:
    flip_bit(path, path.read_bytes().index(WEIGHTS["encoder.1"].numpy().tobytes()) + 17)


def read_or_refuse(path: Path) -> tuple[dict | None, str]:
    try:
        return read_weights(path), ""
    except InputError as error:
        return None, str(error)


@pytest.mark.parametrize("save", [save_file, save_fsdp])
def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path, save):
    """Of every file, at random places: those of torch's zip files have some that nobody reads."""
    rng, refused = random.Random(save.__name__), 0
    whole = save(tmp_path / "whole")
    files = [whole] if whole.is_file() else [p for p in whole.rglob("*") if p.is_file()]
    for number in range(FLIPS):
        path = tmp_path / str(number)
        copy = shutil.copytree if whole.is_dir() else shutil.copy
        copy(whole, path)
        file = path / files[number % len(files)].relative_to(whole)
        flip_bit(file, rng.randrange(file.stat().st_size))
        found, said = read_or_refuse(path)
        refused += found is None
        assert "\n" not in said
        assert found is not None or str(path) in said
        for name, tensor in (found or WEIGHTS).items():
            assert torch.equal(tensor, WEIGHTS[name])
    assert refused > FLIPS // 3


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_file, ""),
        (save_fsdp, "__0_0.distcp"),
        (save_zero, "checkpoint/mp_rank_00_model_states.pt"),
    ],
)
def test_the_damaged_file_is_named(tmp_path, save, name):
    path = save(tmp_path / "a.ckpt")
    file = path / name
    flip_weight(file)
    for read in (read_weights, WholeFiles().load_checkpoint) if not name else (read_shards,):
        with pytest.raises(InputError, match=rf"{file}: is damaged: .* found other bytes in"):
            read(path)


def read_shards(path: Path) -> None:
    refuse_damaged_shards(path)


def test_what_says_where_shards_start_has_a_digest(tmp_path):
    path = save_fsdp(tmp_path / "a.ckpt")
    metadata = (path / ".metadata").read_bytes()
    flip_bit(path / ".metadata", metadata.index(b"\x8a") if b"\x8a" in metadata else 40)
    with pytest.raises(InputError, match=r"\.metadata: is damaged"):
        refuse_damaged_shards(path)


def test_ranks_read_a_share_of_the_files_each(tmp_path):
    path = save_zero(tmp_path / "a.ckpt")
    for rank in range(3):
        torch.save(WEIGHTS, path / "checkpoint" / f"rank_{rank}_optim_states.pt")
    flip_weight(path / "checkpoint" / "rank_1_optim_states.pt")
    found = []
    for rank in range(2):
        try:
            refuse_damaged_shards(path, rank, 2)
        except InputError:
            found.append(rank)
    assert len(found) == 1


def test_checkpoints_of_before_and_copies_are_taken(tmp_path):
    folder = save_fsdp(tmp_path / "a.ckpt")
    (folder / "digests.xxh128").unlink()  # as before there were any
    shutil.copytree(folder, tmp_path / "copied")
    for path in (folder, tmp_path / "copied"):
        assert torch.equal(read_weights(path)["encoder.0"], WEIGHTS["encoder.0"])
