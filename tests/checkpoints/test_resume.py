"""What a fit that goes on takes from its checkpoint, and what it refuses."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune import InputError
from embedtune.checkpoints.resume import follow_move, keep_states, refuse_other_weights

SCORES = {"a.ckpt": 0.2, "b.ckpt": 0.4, "c.ckpt": 0.3}


@pytest.mark.parametrize(
    ("mode", "count", "known", "worst"),
    [
        ("max", 1, ["b"], "b"),
        ("max", 2, ["b", "c"], "c"),
        ("min", 2, ["a", "c"], "c"),
        ("max", 3, ["b", "c", "a"], "a"),
        ("max", 5, ["a", "b", "c"], ""),
        ("max", -1, ["a", "b", "c"], ""),
        ("max", 0, ["a", "b", "c"], ""),
    ],
)
def test_of_the_kept_checkpoints_the_better_ones_stay_known(tmp_path, mode, count, known, worst):
    saved = ModelCheckpoint(tmp_path, monitor="val/a", mode=mode, save_top_k=4)
    for name, score in SCORES.items():
        path = Path(saved.dirpath, name)
        path.touch()
        saved.best_k_models[str(path)] = torch.tensor(score)
    state = saved.state_dict()
    now = ModelCheckpoint(tmp_path, monitor="val/a", mode=mode, save_top_k=count)
    follow_move([now], {now.state_key: state}, tmp_path)
    now.load_state_dict(state)
    assert [Path(path).stem for path in now.best_k_models] == known
    assert Path(now.kth_best_model_path).stem == worst
    if worst:
        assert now.kth_value == torch.tensor(SCORES[f"{worst}.ckpt"])
        assert len(now.best_k_models) == count


def test_who_saves_more_or_less_often_knows_what_was_kept(tmp_path):
    """Of the same metric and mode alone; what another callback has kept is its own."""
    often = {"monitor": "val/a", "mode": "max"}
    saved = ModelCheckpoint(tmp_path, **often, every_n_epochs=1)
    latest = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    states = {callback.state_key: callback.state_dict() for callback in (saved, latest)}
    rarer = ModelCheckpoint(tmp_path, **often, every_n_epochs=2)
    other = ModelCheckpoint(tmp_path, monitor="val/a", mode="min")
    keep_states([rarer, other, latest], states)
    assert states.keys() == {rarer.state_key, latest.state_key}
    assert states[rarer.state_key]["monitor"] == "val/a"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": torch.zeros(2)}, r"loss\.scale of shape \[\], found none"),
        ({"a": torch.zeros(3), "loss.scale": torch.zeros(())}, r"a of shape \[2\], found .*\[3\]"),
        (
            {"a": torch.zeros(2), "loss.scale": torch.zeros(()), "b": torch.zeros(4, 2)},
            r"b none, found of shape \[4, 2\]",
        ),
    ],
)
def test_other_weights_are_named(saved, message):
    own = {"a": torch.zeros(2), "loss.scale": torch.zeros(())}
    refuse_other_weights(dict(own), own)
    with pytest.raises(InputError, match=f"ckpt_path: .*: {message}; give .*model.use_mrl"):
        refuse_other_weights(saved, own)
