"""The temperature that follows from how alike texts are to a model."""

import json
import logging
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.cli import main
from embedtune.losses import InfoNCE, Matryoshka
from embedtune.training.temperature import derive_temperature


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = ({"query": f"query {i}", "pos": [f"document {i} {i * i}"]} for i in range(8))
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return Path("train.jsonl")


@pytest.mark.parametrize(("alike", "expected"), [(0.2, 0.048), (0.83, 0.01), (0.5, 0.03)])
def test_it_is_a_share_of_what_tells_texts_apart(alike, expected):
    """Embeddings whose cosines with each other are ``alike``: a common axis, and one for each."""
    own = torch.eye(40) * np.sqrt(1 - alike)
    sample = torch.cat([own, torch.full((40, 1), np.sqrt(alike))], dim=1)
    lengths = torch.rand(40, 1) + 0.5  # which are no matter
    assert derive_temperature(sample * lengths) == pytest.approx(expected)


def test_texts_that_are_all_alike_and_a_single_one():
    assert derive_temperature(torch.ones(5, 8)) == 0.01
    assert derive_temperature(torch.ones(1, 8)) == 0.06


def fit(model: Path, **settings) -> EmbeddingModule:
    module = EmbeddingModule(str(model), **settings)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, EmbeddingDataModule("train.jsonl"))
    return module


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 0.03),
        ({"neg": ["another"]}, 0.06),
        ({"pos": ["one", "another"], "scores": [1.0, 0.0]}, 0.06),
    ],
)
def test_rows_with_negatives_of_their_own_take_twice_of_it(
    tiny_bert, rows, monkeypatch, more, expected
):
    made = [{**json.loads(line), **more} for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr("embedtune.training.settled_loss.derive_temperature", lambda sample: 0.03)
    assert fit(tiny_bert).loss.temperature == expected


def test_a_given_temperature_and_a_given_loss_are_as_given(tiny_bert, rows):
    assert fit(tiny_bert, temperature=0.5).loss.temperature == 0.5
    assert fit(tiny_bert, loss=InfoNCE()).loss.temperature == 0.05
    wrapped = fit(tiny_bert, use_mrl=True, mrl_dims=[16, 8]).loss
    assert isinstance(wrapped, Matryoshka)
    assert wrapped.loss.temperature == fit(tiny_bert).loss.temperature != 0.05


def test_a_checkpoint_brings_the_temperature_that_it_was_trained_with(tiny_bert, rows, caplog):
    """Without training rows none could follow, and the loss would be another."""
    model = ["--model.model_name_or_path", str(tiny_bert), "--trainer.accelerator", "cpu"]
    same = [*model, "--data.val_path", "train.jsonl"]
    main(["fit", *same, "--data.train_path", "train.jsonl", "--save_on_epoch_end", "false"])
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=False)
    assert checkpoint["temperatures"]["temperature"] != InfoNCE().temperature
    caplog.set_level(logging.INFO, logger="embedtune")
    said = "losses have temperature 0.05: a fit derives others"
    main(["validate", *same])
    assert said in caplog.text
    caplog.clear()
    main(["validate", *same, "--ckpt_path", "last"])
    assert said not in caplog.text
    measured = json.loads(Path("run/metrics.json").read_text())["metrics"]
    expected = checkpoint["training_facts"]["metrics"]
    assert measured["val/train/loss"] == pytest.approx(expected["val/train/loss"], rel=1e-4)


def test_a_new_temperature_takes_the_teacher_s_along(tiny_bert, rows):
    """Both together ask for the spread that cosines are to have."""
    lists = ({"query": f"q {i}", "pos": [f"a {i}", f"b {i}"], "scores": [i, 2.0]} for i in range(8))
    rows.write_text("".join(json.dumps(row) + "\n" for row in lists))
    found = []
    for epochs, flags in ((1, ["0.05"]), (2, ["0.02", "--ckpt_path", "last"])):
        command = ["fit", "--model.model_name_or_path", str(tiny_bert), "--model.temperature"]
        command += [*flags, "--trainer.accelerator", "cpu", "--data.train_path", "train.jsonl"]
        main([*command, f"--trainer.max_epochs={epochs}", "--save_on_epoch_end", "false"])
        checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=False)
        found.append(checkpoint["temperatures"])
    assert [kept["temperature"] for kept in found] == [0.05, 0.02]
    ratio = found[1]["teacher_temperature"] / found[0]["teacher_temperature"]
    assert ratio == pytest.approx(0.02 / 0.05)
