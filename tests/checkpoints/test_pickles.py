"""A stranger's checkpoint is read, and runs no code."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from embedtune import InputError
from embedtune.checkpoints import last_checkpoint, pickles, read_facts, read_weights
from embedtune.checkpoints.shards import divide_anew, kind_of, refuse_code
from embedtune.checkpoints.write import WholeFiles
from embedtune.models import EncoderSpec

FACTS = {"encoder_spec": EncoderSpec("base")._asdict()}


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def code(tmp_path):
    """Return what would leave a trace, and check that it has not run."""
    yield Code(tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


def save_fsdp(path: Path, **more) -> Path:
    dcp.save({"model.encoder.a": torch.ones(2), "lr": 0.5, **more}, checkpoint_id=path)
    torch.save(FACTS, path / "meta.pt")
    return path


def save_zero(path: Path, tag: str = "checkpoint") -> Path:
    (path / tag).mkdir(parents=True)
    (path / "latest").write_text(tag)
    torch.save({**FACTS, "module": {}}, path / tag / "mp_rank_00_model_states.pt")
    return path


def test_a_file_is_no_more_than_tensors_and_plain_values(tmp_path, code):
    path = tmp_path / "a.ckpt"
    torch.save({**FACTS, "state_dict": {"encoder.a": code}}, path)
    for read in (read_facts, read_weights, WholeFiles().load_checkpoint):
        with pytest.raises(InputError, match=r"wants to use \w+\.mkdir"):
            read(path)


# --- FSDP -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_torch_saves_is_read(tmp_path):
    path = save_fsdp(tmp_path / "a.ckpt", half=torch.ones(3, 2, dtype=torch.bfloat16))
    refuse_code(path)
    assert read_weights(path).keys() == {"encoder.a"}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("where", ["meta.pt", ".metadata", "shard"])
def test_code_in_a_folder_of_fsdp_is_refused(tmp_path, code, where):
    path = save_fsdp(tmp_path / "a.ckpt")
    if where == "meta.pt":
        torch.save({**FACTS, "more": code}, path / where)
        with pytest.raises(InputError, match=r"expected a checkpoint .* wants to use \w+\.mkdir"):
            read_facts(path)
        with pytest.raises(InputError, match=r"which run no code, .* wants to use \w+\.mkdir"):
            refuse_code(path)
        return
    if where == ".metadata":
        (path / where).write_bytes(pickle.dumps(code))
    else:
        shard = io.BytesIO()
        torch.save(code, shard)
        metadata = FileSystemReader(path).read_metadata()
        (index,) = (i for i in metadata.storage_data if i.fqn == "lr")
        assert isinstance(metadata.state_dict_metadata["lr"], BytesStorageMetadata)
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "b", 0, len(shard.getvalue())
        (path / "b").write_bytes(shard.getvalue())
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (refuse_code, read_weights):
        with pytest.raises(InputError, match="which run no code"):
            read(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_shard_outside_the_folder_is_refused(tmp_path):
    path = save_fsdp(tmp_path / "a.ckpt")
    metadata = FileSystemReader(path).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = f"../a.ckpt/{place.relative_path}"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="a shard outside the folder"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_shard_that_is_missing_is_no_code(tmp_path):
    path = save_fsdp(tmp_path / "a.ckpt")
    for shard in path.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(InputError, match=r"a\.ckpt: cannot read all of its weights: "):
        read_weights(path)


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch", "Size.__class__"),
        ("pathlib", "os.system"),
    ],
)
def test_a_class_that_is_not_listed_is_not_looked_up(tmp_path, name):
    module, attribute = name
    names = b"".join(b"\x8c" + bytes([len(n)]) + n.encode() for n in (module, attribute))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + names + b"\x93.")  # STACK_GLOBAL
    with pytest.raises(InputError, match=f"wants to use {module}.{attribute}"):
        pickles.refuse_code_in_fsdp(tmp_path)


# --- ZeRO -----------------------------------------------------------------------------------------


def test_what_deepspeed_saves_is_read(tmp_path):
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    fragment = pytest.importorskip("deepspeed.utils.tensor_fragment")
    path = save_zero(tmp_path / "a.ckpt")
    states = {
        "loss_scaler": scaler.LossScaler(scale=2),
        "dynamic": scaler.DynamicLossScaler(8, 2.0, 1000, 1, 1, False),
        "zero_stage": config.ZeroStageEnum.gradients,
        "place": fragment.fragment_address(3, 4),
    }
    torch.save(states, path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refuse_code(path)
    (path.parent / "last.ckpt").symlink_to(path.name)
    refuse_code(path.parent / "last.ckpt")
    assert read_facts(path)["encoder_spec"] == FACTS["encoder_spec"]


@pytest.mark.parametrize(
    "file",
    [
        "checkpoint/mp_rank_00_model_states.pt",
        "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "universal/zero/encoder.a/exp_avg.pt",
    ],
)
def test_code_in_a_folder_of_zero_is_refused(tmp_path, code, file):
    pytest.importorskip("deepspeed")
    path = save_zero(tmp_path / "a.ckpt")
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save({**FACTS, "module": {}, "more": code}, path / file)
    for read in (refuse_code, read_weights, divide_anew):
        with pytest.raises(InputError, match="which run no code"):
            read(path)


def test_a_folder_elsewhere_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    path = save_zero(tmp_path / "a.ckpt")
    (path / "universal").symlink_to(save_zero(tmp_path / "other.ckpt"))
    with pytest.raises(InputError, match="a link to another folder"):
        refuse_code(path)


@pytest.mark.parametrize("tag", ["", ".", "..", "../b", "sub/../checkpoint", "/tmp", "link"])
def test_a_tag_names_a_folder_beside_it(tmp_path, tag):
    path = save_zero(tmp_path / "last.ckpt")
    (path / "sub").mkdir()
    (path / "link").symlink_to(save_zero(tmp_path / "b") / "checkpoint")
    (path / "latest").write_text(tag)
    with pytest.raises(InputError, match="latest: expected the name of a folder beside it"):
        kind_of(path)
    assert last_checkpoint(tmp_path) is None
    (path / "latest").write_text("checkpoint")
    (path / "latest_universal").write_text(tag)
    with pytest.raises(InputError, match="latest_universal: expected the name"):
        divide_anew(path)
