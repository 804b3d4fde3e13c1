"""The loss of a run, and what it takes from the data."""

import json
import logging
import re
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.cli import main
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.errors import InputError
from embedtune.losses import Distillation, ListwiseKL
from embedtune.training.choose_loss import default_loss

LISTS = [[3.5, -2.0, 0.5], [4.0, -4.0], [1.0, 0.0, 0.0, -1.0]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="embedtune")


def write(lists: list[list[float]]) -> Path:
    rows = (
        {"query": f"query {i}", "pos": [f"text {i} {j}" for j in range(len(s))], "scores": s}
        for i, s in enumerate(lists)
    )
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path("train.jsonl")


def test_the_spread_of_scores_is_that_within_lists():
    lists = [[value + 100 * i for value in scores] for i, scores in enumerate(LISTS)]
    expected = np.sqrt(np.mean(np.concatenate([(np.array(s) - np.mean(s)) ** 2 for s in LISTS])))
    assert Rows([write(lists)]).score_spread == pytest.approx(expected)


def fit(model: Path, *flags: str) -> None:
    """Train a step; a flag of the loss makes it ListwiseKL."""
    asked = any(flag.startswith("--model.loss.") for flag in flags)
    main(
        [
            *("fit", "--model.model_name_or_path", str(model)),
            *("--data.train_path", "train.jsonl", "--trainer.max_steps", "1"),
            *("--trainer.accelerator", "cpu", "--save_on_epoch_end", "false"),
            *(["--model.loss=ListwiseKL"] if asked else []),
            *flags,
        ]
    )


@pytest.mark.parametrize("flags", [(), ("--model.use_mrl", "true", "--model.mrl_dims", "16,8")])
def test_sentence_pairs_take_cosent_at_a_scale_of_the_model(tiny_bert, caplog, flags):
    """A quarter of 1 / the temperature that pairs take, which is half of that of lists."""
    write([[0.0], [0.5], [1.0]])
    fit(tiny_bert, *flags)
    (scale,) = re.findall(r"CoSENT\(scale=([\d.]+)\)", caplog.text)
    write(LISTS)
    fit(tiny_bert)
    (temperature,) = re.findall(r"ListwiseKL\(.*, temperature=([\d.]+)", caplog.text)
    assert float(scale) == pytest.approx(0.25 / (float(temperature) / 2), rel=0.1)


def test_a_given_loss_stays_as_it_was_given(tiny_bert):
    """Widths and what is derived from one's data are none of another module's."""
    lists, distill = ListwiseKL(), Distillation()
    for scale in (1, 3):
        write([[scale * score for score in scores] for scores in LISTS])
        module = EmbeddingModule(str(tiny_bert), loss=lists)
        train(module, EmbeddingDataModule("train.jsonl"))
        derived = ListwiseKL().derive_teacher_temperature(Rows([Path("train.jsonl")]).score_spread)
        assert module.loss.teacher_temperature == pytest.approx(derived)
        assert lists.teacher_temperature is None
    Path("train.jsonl").write_text("".join(f'{{"query": "text {i}"}}\n' for i in range(4)))
    np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32).tofile("teacher.f32")
    data = EmbeddingDataModule("train.jsonl", teacher_path="teacher.f32")
    module = EmbeddingModule(str(tiny_bert), loss=distill, use_mrl=True, mrl_dims=[2, 8])
    train(module, data)
    assert (module.loss.mrl_dims, distill.mrl_dims) == ([2, 8], None)


def train(module: EmbeddingModule, data: EmbeddingDataModule) -> None:
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)


def test_a_given_scale_stays(tiny_bert, caplog):
    write([[0.0], [0.5], [1.0]])
    fit(tiny_bert, "--model.loss=embedtune.losses.CoSENT", "--model.loss.scale=20")
    assert "CoSENT(scale=20.0)" in caplog.text


@pytest.mark.parametrize(("given", "said"), [(10.0, "all alike"), (0.01, "one text that is all")])
def test_a_teacher_temperature_of_another_scale_is_told(tiny_bert, caplog, given, said):
    spread = Rows([write(LISTS)]).score_spread
    fit(tiny_bert, f"--model.loss.teacher_temperature={given}", "--model.loss.over=list")
    (told,) = (r.getMessage() for r in caplog.records if "teacher_temperature:" in r.getMessage())
    assert said in told
    assert told.endswith(f"here {0.05 * spread / 0.15:.3g}")
    caplog.clear()
    fit(tiny_bert, f"--model.loss.teacher_temperature={spread / 2}")
    assert not [r for r in caplog.records if "teacher_temperature:" in r.getMessage()]


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_over_the_batch_none_is_given_or_derived(tiny_bert, caplog, scale):
    write([[scale * score for score in scores] for scores in LISTS])
    fit(tiny_bert, "--model.loss.over=batch")
    assert "teacher_temperature:" not in caplog.text
    assert "teacher temperature" not in caplog.text


def test_the_losses_without_a_temperature_refuse_one():
    for arguments in ((Format.DISTILL, 0.1), (Format.SCORED, 0.1)):
        with pytest.raises(InputError, match=r"model.temperature: \w+ has none"):
            default_loss(*arguments, of_pairs=arguments[0] == Format.SCORED)


@pytest.mark.parametrize("flags", [(), ("--model.use_mrl", "true", "--model.mrl_dims", "16,8")])
def test_a_fit_derives_the_teacher_temperature_from_its_scores(tiny_bert, caplog, flags):
    spread = Rows([write(LISTS)]).score_spread
    fit(tiny_bert, "--model.temperature=0.05", *flags)
    derived = 0.05 * spread / 0.15
    said = f"teacher temperature {derived:.3g}, for scores that spread by {spread:.3g}"
    assert said in caplog.text
    (used,) = re.findall(r"ListwiseKL\(.*teacher_temperature=([\d.]+)", caplog.text)
    assert float(used) == pytest.approx(derived)


def pairs(name: str, scores: list[float]) -> str:
    rows = ({"query": f"a {i}", "pos": [f"b {i}"], "scores": [s]} for i, s in enumerate(scores))
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_sentence_pairs_may_validate_a_fit_on_lists(tiny_bert, caplog):
    write(LISTS)
    fit(tiny_bert, "--data.val_path.sts", pairs("sts.jsonl", [0.1, 0.9, 0.4]))
    assert "val/sts: no loss, for ListwiseKL compares the texts of a list" in caplog.text
    assert re.search(r"step 1: val/sts/spearman", caplog.text)


@pytest.mark.parametrize(("offset", "is_told"), [(1e7, True), (1e3, False), (0.0, False)])
def test_scores_that_float32_does_not_tell_apart_are_told(tiny_bert, caplog, offset, is_told):
    write([[offset + score for score in scores] for scores in LISTS])
    fit(tiny_bert)
    assert ("subtract what they have in common" in caplog.text) == is_told


@pytest.mark.parametrize("dims", ["8,16", "16,32"])
def test_a_given_matryoshka_is_that_of_the_widths(tiny_bert, capsys, dims, caplog):
    write(LISTS)
    flags = ["--model.loss=Matryoshka", "--model.loss.loss=ListwiseKL", "--model.loss.dims=[8,16]"]
    own = ["--model.loss.weights=[3,1]", "--model.use_mrl=true", f"--model.mrl_dims={dims}"]
    run = [*("fit", "--model.model_name_or_path", str(tiny_bert)), *flags, *own]
    run += ["--data.train_path=train.jsonl", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    if dims == "8,16":
        main(run)
        assert caplog.text.count("Matryoshka(") == 1
        return
    with pytest.raises(SystemExit):
        main(run)
    said = "model.loss: expected Matryoshka of model.mrl_dims [16, 32], found [8, 16]"
    assert said in capsys.readouterr().err
