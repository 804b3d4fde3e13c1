"""The loss of a run, and what it takes from the data."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from embedtune.cli import main
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.errors import InputError
from embedtune.training.choose_loss import default_loss

LISTS = [[3.5, -2.0, 0.5], [4.0, -4.0], [1.0, 0.0, 0.0, -1.0]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


@pytest.mark.parametrize("flags", [(), ("--model.use_mrl", "true", "--model.mrl_dims", "16,8")])
def test_sentence_pairs_take_cosent(tiny_bert, caplog, flags):
    write([[0.0], [0.5], [1.0]])
    with caplog.at_level(logging.INFO, logger="embedtune"):
        main(
            [
                *("fit", "--model.model_name_or_path", str(tiny_bert)),
                *("--data.train_path", "train.jsonl", "--trainer.max_steps", "1", *flags),
                *("--trainer.accelerator", "cpu", "--save_on_epoch_end", "false"),
            ]
        )
    assert "CoSENT(scale=20.0)" in caplog.text


def test_the_losses_without_a_temperature_refuse_one():
    for arguments in ((Format.DISTILL, 0.1), (Format.SCORED, 0.1)):
        with pytest.raises(InputError, match=r"model.temperature: \w+ has none"):
            default_loss(*arguments, of_pairs=arguments[0] == Format.SCORED)


@pytest.mark.parametrize("flags", [(), ("--model.use_mrl", "true", "--model.mrl_dims", "16,8")])
def test_a_fit_derives_the_teacher_temperature_from_its_scores(tiny_bert, caplog, flags):
    spread = Rows([write(LISTS)]).score_spread
    with caplog.at_level(logging.INFO, logger="embedtune"):
        main(
            [
                *("fit", "--model.model_name_or_path", str(tiny_bert)),
                *("--data.train_path", "train.jsonl", "--trainer.max_steps", "1", *flags),
                *("--trainer.accelerator", "cpu", "--save_on_epoch_end", "false"),
            ]
        )
    derived = 0.02 * spread / 0.15
    said = f"teacher temperature {derived:.3g}, for scores that spread by {spread:.3g}"
    assert said in caplog.text
    assert f"teacher_temperature={derived:.4}" in caplog.text
