"""Which checkpoint of a folder a run goes on from."""

import os
from pathlib import Path

import pytest
import torch

from embedtune import InputError
from embedtune.checkpoints import best_checkpoint, last_checkpoint, read_checkpoint
from embedtune.checkpoints.shards import kind_of
from embedtune.models import EncoderSpec


def save(path: Path, age: int = 0, **more) -> Path:
    facts = {"encoder_spec": EncoderSpec("base")._asdict()}
    weights = {"encoder.a": torch.ones(2), "loss.b": torch.zeros(1)}
    torch.save({**facts, "state_dict": weights, **more}, path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_there_may_be_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None
    (tmp_path / "last.ckpt").mkdir()  # no checkpoint, but an empty folder
    assert last_checkpoint(tmp_path) is None


def test_the_last_is_the_one_of_that_name_or_else_the_newest_whole_one(tmp_path):
    save(tmp_path / "step=2.ckpt", age=20)
    newest = save(tmp_path / "step=4.ckpt", age=10)
    (tmp_path / "step=6.ckpt").mkdir()  # a folder of shards without its shards
    assert last_checkpoint(tmp_path) == newest
    last = tmp_path / "last.ckpt"
    last.symlink_to("step=2.ckpt")
    assert last_checkpoint(tmp_path) == last
    (tmp_path / "step=2.ckpt").unlink()  # now it points to nothing
    assert last_checkpoint(tmp_path) == newest


def test_what_was_about_to_be_replaced_counts(tmp_path):
    former = save(tmp_path / "last.ckpt.former")
    assert last_checkpoint(tmp_path) == former


def test_the_best_is_looked_for_in_the_folder_that_it_is_in_now(tmp_path):
    best = save(tmp_path / "best.ckpt", age=5)
    state = {"monitor": "val/a/ndcg@10", "best_model_path": "/elsewhere/best.ckpt"}
    save(tmp_path / "last.ckpt", callbacks={"ModelCheckpoint{'x': 1}": state})
    assert best_checkpoint(tmp_path) == best
    best.unlink()
    assert best_checkpoint(tmp_path) is None


def test_the_encoder_alone_is_read(tmp_path):
    spec, weights = read_checkpoint(save(tmp_path / "a.ckpt"))
    assert spec == EncoderSpec("base")
    assert list(weights) == ["a"]


@pytest.mark.parametrize("kind", ["nothing", "folder"])
def test_what_is_no_checkpoint_is_named(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    if kind == "folder":
        path.mkdir()
    found = "an incomplete or foreign folder" if kind == "folder" else "nothing"
    with pytest.raises(InputError, match=f"a.ckpt: expected a checkpoint .*, found {found}"):
        kind_of(path)
