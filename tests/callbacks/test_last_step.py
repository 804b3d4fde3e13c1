"""``last.ckpt`` is of the step that the exported model is of, wherever a fit validates or saves."""

import json
import re

import pytest
import torch
from forks import Ranks, embedtune
from sentence_transformers import SentenceTransformer

from embedtune.checkpoints import best_checkpoint, last_checkpoint, read_facts
from embedtune.checkpoints.read import read_weights

WAYS = {
    "validated every second epoch": (["--trainer.check_val_every_n_epoch=2"], 12),
    "within epochs": (["--trainer.val_check_interval=3"], 12),
    "ended within an epoch": (["--trainer.val_check_interval=2", "--trainer.max_steps=7"], 7),
    "saved by steps": (["--checkpoint.every_n_train_steps=5"], 12),
    "saved by more steps than there are": (["--checkpoint.every_n_train_steps=50"], 12),
    "with the best": (
        ["--checkpoint.monitor=val/loss/loss", "--trainer.val_check_interval=3"],
        12,
    ),
    "a copy": (["--checkpoint.save_last=true", "--checkpoint.every_n_train_steps=5"], 12),
    "under fsdp": (["--checkpoint.every_n_train_steps=5", "--trainer.strategy=fsdp"], 12),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_last_checkpoint_is_of_the_last_step(tiny_bert, tmp_path, way):
    flags, steps = WAYS[way]
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("fit", f"--model.model_name_or_path={tiny_bert}", "--data.train_path=train.jsonl"),
        *("--data.val_path={loss: train.jsonl}", "--data.batch_size=4", "--model.lr=1e-2"),
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=3"),
        *("--trainer.default_root_dir=run", *flags),
    ]
    fit = Ranks(embedtune, command, folder=tmp_path)
    assert fit.wait() == [0], fit.output()
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert last_checkpoint(last.parent) == last
    assert read_facts(last)["global_step"] == steps
    if "monitor" in str(flags):
        return
    model = SentenceTransformer(str(tmp_path / "run/model"), device="cpu")
    exported = model.state_dict()
    weights = {k.removeprefix("encoder.model."): v for k, v in read_weights(last).items()}
    assert all(
        torch.equal(exported[name], value) for name, value in weights.items() if name in exported
    )
    assert weights.keys() & exported.keys()


def test_a_fit_that_is_asked_for_again_has_the_model_that_it_had(tiny_bert, tmp_path):
    """The last checkpoint knows of the last validation, whose model is the best, and is a link."""
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("fit", f"--model.model_name_or_path={tiny_bert}", "--data.train_path=train.jsonl"),
        *("--data.val_path={loss: train.jsonl}", "--data.batch_size=4", "--model.lr=1e-2"),
        *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=2"),
        *("--checkpoint.monitor=val/loss/loss", "--checkpoint.every_n_train_steps=4"),
        *("--trainer.default_root_dir=run", "--ckpt_path=last"),
    ]
    checkpoints, found = tmp_path / "run/checkpoints", []
    for _ in range(2):
        fit = Ranks(embedtune, command, folder=tmp_path)
        assert fit.wait() == [0], fit.output()
        assert "model/ is the model of step 8, the best by val/loss/loss" in fit.output()
        assert best_checkpoint(checkpoints) == checkpoints / "best-epoch=1-step=8.ckpt"
        assert (checkpoints / "last.ckpt").is_symlink()
        names = ("README.md", "model.safetensors")
        found.append([(tmp_path / "run/model" / name).read_bytes() for name in names])
    assert found[0] == found[1]


def test_what_ends_a_fit_early_or_lets_it_train_nothing_is_said(tiny_bert, tmp_path):
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("fit", f"--model.model_name_or_path={tiny_bert}", "--data.train_path=train.jsonl"),
        *("--data.batch_size=4", "--trainer.accelerator=cpu", "--save_on_epoch_end=false"),
    ]
    timed = [*command, "--trainer.max_epochs=9000", "--trainer.max_time=00:00:00:02"]
    nothing = "nothing is left to train after step {}: trainer.{}"
    said = []
    for arguments in (
        [*timed, "--trainer.default_root_dir=timed"],
        [*timed, "--trainer.default_root_dir=timed", "--ckpt_path=last"],
        [*command, "--trainer.max_epochs=1"],
        [*command, "--trainer.max_epochs=1", "--ckpt_path=last"],
    ):
        fit = Ranks(embedtune, arguments, folder=tmp_path)
        assert fit.wait() == [0], fit.output()
        said.append(fit.output())
    (steps,) = re.findall(r"trainer.max_time: the fit ends after step ([\d,]+) of 18,000", said[0])
    assert nothing.format(steps, "max_time, which counts the time before too") in said[1]
    assert "nothing is left" not in said[0] + said[2]
    assert nothing.format(2, "max_epochs or max_steps is reached") in said[3]
