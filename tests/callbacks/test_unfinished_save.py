"""A run that was killed while it saved, and gone on with, keeps no more than one that was not."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.cli import main

ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(16)]
BEST = ("--checkpoint.monitor=train_loss", "--checkpoint.save_top_k=2")
TAILS = ["_remove_checkpoint", "_link_checkpoint"]
"""What Lightning does after it has saved."""


class KilledError(Exception):
    """What ends a run as a kill would: nothing is saved on its account."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def fit(model, root: str, *more: str) -> None:
    """Run a fit of 8 steps that saves every second."""
    given = {
        "model.model_name_or_path": model,
        "model.lr": 1e-2,
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "checkpoint.every_n_train_steps": 2,
        "trainer.max_epochs": 2,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": False,
        "save_on_epoch_end": False,
    }
    main(["fit", *(f"--{name}={value}" for name, value in given.items()), *more])


def killed(model, tail: str, at: int, *more: str) -> None:
    """Kill a fit before it does what follows a save, the ``at``-th time."""
    whole, times = getattr(ModelCheckpoint, tail), 0

    def dies(*args, **kwargs):
        nonlocal times
        times += 1
        if times == at:
            raise KilledError
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCheckpoint, tail, staticmethod(dies) if "link" in tail else dies)
        with pytest.raises(KilledError):
            fit(model, "run", *more)


def kept(root: str) -> dict[str, int]:
    """Return the step of each file in the folder of checkpoints, -1 of a link to none."""
    return {
        path.name: read_facts(path)["global_step"] if path.exists() else -1
        for path in sorted(Path(root, "checkpoints").iterdir())
    }


@pytest.mark.parametrize("more", [(), BEST, ("--checkpoint.save_last=true",)])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_save_leaves_nothing_over(tiny_bert, more, tail, at):
    if "save_last" in str(more) and "link" in tail:
        pytest.skip("it copies")
    fit(tiny_bert, "whole", *more)
    killed(tiny_bert, tail, at, *more)
    fit(tiny_bert, "run", "--ckpt_path=last", *more)
    assert kept("run") == kept("whole")


@pytest.mark.parametrize(("tail", "at"), [(TAILS[0], 3), (TAILS[1], 4)])
def test_nor_does_one_after_the_last_step(tiny_bert, tail, at):
    fit(tiny_bert, "whole")
    killed(tiny_bert, tail, at)
    assert kept("run") != kept("whole")
    fit(tiny_bert, "run", "--ckpt_path=last")
    assert kept("run") == kept("whole")


def test_without_a_link_the_file_gone_on_from_is_replaced_too(tiny_bert):
    unlinked = "--checkpoint.save_last=false"
    killed(tiny_bert, TAILS[0], 1, unlinked)
    assert list(kept("run").values()) == [2, 4]
    fit(tiny_bert, "run", unlinked, "--ckpt_path=last")
    assert list(kept("run").values()) == [2, 8]  # nothing tells that 4 replaced 2
    fit(tiny_bert, "run", unlinked, "--ckpt_path=last")
    assert list(kept("run").values()) == [2, 8]


def test_nor_do_several(tiny_bert):
    fit(tiny_bert, "whole")
    killed(tiny_bert, *(TAILS[0], 1))
    killed(tiny_bert, *(TAILS[1], 1), "--ckpt_path=last")
    killed(tiny_bert, *(TAILS[0], 1), "--ckpt_path=last")
    fit(tiny_bert, "run", "--ckpt_path=last")
    assert kept("run") == kept("whole")


def test_what_a_run_keeps_all_of_stays(tiny_bert):
    everything = "--checkpoint.save_top_k=-1"
    fit(tiny_bert, "whole", everything)
    killed(tiny_bert, TAILS[1], 3, everything)
    fit(tiny_bert, "run", everything, "--ckpt_path=last")
    assert len(kept("run")) == 5
    assert kept("run") == kept("whole")


def test_a_file_that_was_named_stays(tiny_bert):
    killed(tiny_bert, TAILS[1], 2)
    named = last_checkpoint(Path("run/checkpoints"))
    fit(tiny_bert, "run", f"--ckpt_path={named}")
    assert named.name in kept("run")


def test_a_refused_fit_changes_nothing(tiny_bert):
    killed(tiny_bert, TAILS[0], 1)
    before = kept("run")
    with pytest.raises(SystemExit):
        fit(tiny_bert, "run", "--ckpt_path=last", "--model.lr=-1")
    with pytest.raises(SystemExit):
        fit(tiny_bert, "run", "--ckpt_path=last", "--model.use_mrl=true")
    assert kept("run") == before
