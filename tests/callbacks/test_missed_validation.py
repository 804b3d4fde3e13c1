"""What is measured, kept and ended by it does not depend on where a run was stopped."""

import csv
import re
import shutil
import signal
from pathlib import Path

import pytest
from testset_files import write_pairs_and_sts
from told_losses import told

from embedtune.checkpoints import best_checkpoint, last_checkpoint, read_facts
from embedtune.cli import main
from embedtune.losses import InfoNCE
from embedtune.reports.curves import read_curves

MONITOR = "val/sts/spearman"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs_and_sts(16)


def fit(model, root: str, *more: str) -> None:
    """Run a fit of 4 steps an epoch, 2 epochs, that keeps the best."""
    given = {
        "model.model_name_or_path": model,
        "model.lr": 1e-2,
        "data.train_path": "train.jsonl",
        "data.val_path.sts": "sts.jsonl",
        "data.batch_size": 4,
        "checkpoint.monitor": MONITOR,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": False,
        "save_on_epoch_end": False,
        "log_with": "csv",
    }
    temperature = (
        []
        if any("model.loss" in flag for flag in more)
        else [f"--model.temperature={InfoNCE().temperature}"]
    )
    main(["fit", *(f"--{name}={value}" for name, value in given.items()), *temperature, *more])


def stopped(model, root: str, at: int, *more: str) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(model, root, *told(at, signal.SIGTERM), *more)
    assert caught.value.code == 143


def curve(root: str) -> list[float]:
    """Return what was measured after steps, in its order."""
    with Path(root, "metrics.csv").open() as file:
        found = [row[MONITOR] for row in csv.DictReader(file)]
    return [float(value) for value in found if value][1:]


def weights(root: str) -> bytes:
    return Path(root, "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("at", "more"),
    [
        (3, ()),  # at the end of an epoch
        (7, ("--trainer.max_epochs=-1", "--trainer.max_steps=12")),
        (1, ("--trainer.val_check_interval=2",)),
        (5, ("--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null")),
    ],
)
def test_a_run_that_is_stopped_before_a_validation_makes_up_for_it(tiny_bert, at, more):
    """For all of it: what is monitored comes after the batches of another set."""
    more = (*more, "--data.val_path.pairs=train.jsonl")
    fit(tiny_bert, "whole", *more)
    stopped(tiny_bert, "run", at, *more)
    fit(tiny_bert, "run", "--ckpt_path=last", *more)
    assert curve("run") == curve("whole")
    assert weights("run") == weights("whole")


def test_what_it_makes_up_for_is_of_the_epoch_that_has_ended(tiny_bert):
    """Which every second epoch is looked for the best in, and which its file is named by."""
    second = ("--checkpoint.every_n_epochs=2",)
    fit(tiny_bert, "whole", *second)
    stopped(tiny_bert, "run", 7, *second, "--trainer.max_epochs=3")
    fit(tiny_bert, "run", "--ckpt_path=last", *second, "--trainer.max_epochs=3")
    for root in ("whole", "run"):
        assert Path(root, "checkpoints", "best-epoch=1-step=8.ckpt").is_file(), root


def test_a_run_that_keeps_the_best_by_the_loss_of_its_steps_goes_on(tiny_bert):
    """Though a validation is made up for, and accumulated batches come before its first step."""
    by_loss = ("--checkpoint.monitor=train/loss", "--trainer.val_check_interval=2")
    by_loss = (*by_loss, "--trainer.accumulate_grad_batches=2", "--data.batch_size=2")
    stopped(tiny_bert, "run", 3, *by_loss)
    fit(tiny_bert, "run", "--ckpt_path=last", *by_loss)
    best = best_checkpoint(Path("run/checkpoints"))
    assert read_facts(best)["global_step"] > 2  # what comes after no step is no model of it


def test_one_that_is_stopped_elsewhere_measures_no_more_than_the_whole(tiny_bert):
    fit(tiny_bert, "whole")
    stopped(tiny_bert, "run", 4)
    fit(tiny_bert, "run", "--ckpt_path=last")
    assert curve("run") == curve("whole")


def test_what_is_best_is_what_was_measured(tiny_bert, caplog):
    """However often the latest is saved."""
    fit(tiny_bert, "run", "--checkpoint.every_n_train_steps=3", "--trainer.max_epochs=4")
    (step, told) = re.findall(r"model of step (\d+), the best by \S+ \(([\d.]+)\)", caplog.text)[0]
    assert int(step) % 4 == 0
    assert float(told) == pytest.approx(max(curve("run")), abs=1e-4)
    best, last = (
        read_facts(next(Path("run/checkpoints").glob(f"{name}*.ckpt"))) for name in ("best", "last")
    )
    assert best["training_facts"]["metrics"][MONITOR] == pytest.approx(max(curve("run")))
    assert last["global_step"] == 16


def test_a_fit_that_was_ended_early_trains_no_more(tiny_bert, caplog):
    patient = ("--early_stopping_patience=1", "--trainer.max_epochs=8", "--model.lr=0.05")
    fit(tiny_bert, "run", *patient)
    ended = read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"]
    assert ended < 32
    model = weights("run")
    fit(tiny_bert, "run", *patient, "--ckpt_path=last")
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == ended
    assert "early stopping has ended this fit" in caplog.text
    assert weights("run") == model
    patient = ("--early_stopping_patience=9", *patient[1:])
    fit(tiny_bert, "run", *patient, "--ckpt_path=last")
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 32


def test_what_was_measured_of_another_set_counts_no_more(tiny_bert, caplog):
    """Neither for the best nor for patience."""
    once = ("--trainer.max_epochs=2", "--early_stopping_patience=1", "--model.lr=0.05")
    fit(tiny_bert, "run", *once)
    known = max(curve("run"))
    rows = Path("sts.jsonl").read_text().splitlines(keepends=True)
    Path("sts.jsonl").write_text("".join(rows[:9]))
    more = ("--trainer.max_epochs=3", "--early_stopping_patience=3", "--model.lr=0.05")
    fit(tiny_bert, "run", *more, "--ckpt_path=last")
    assert "ckpt_path: val/sts: other data than before" in caplog.text
    (*_, (step, told)) = re.findall(
        r"model of step (\d+), the best by \S+ \(([\d.-]+)\)", caplog.text
    )
    before = read_facts(last_checkpoint(Path("run/checkpoints")))["training_facts"]
    assert int(step) >= 8
    measured = read_curves(Path("run"))[MONITOR]  # after the change alone
    assert list(measured) == [8, 12]
    assert float(told) == pytest.approx(max(measured.values()), abs=1e-4) != known
    assert before["base_metrics"][MONITOR] != known


def test_another_base_model_to_compare_with_is_told(tiny_bert, caplog):
    fit(tiny_bert, "run", "--trainer.max_epochs=1")
    shutil.copytree(tiny_bert, "another")
    fit("another", "run", "--ckpt_path=last")
    assert f"it was trained from {tiny_bert}: what compares" in caplog.text


def test_the_latest_is_the_latest_whatever_it_is_called(tiny_bert):
    named = ("--checkpoint.monitor=null", "--checkpoint.save_last=false")
    stopped(tiny_bert, "run", 1, *named)
    fit(tiny_bert, "run", *named, "--ckpt_path=last")
    folder = Path("run/checkpoints")
    assert read_facts(folder / "last.ckpt")["global_step"] == 2
    assert read_facts(last_checkpoint(folder))["global_step"] == 8


def test_the_best_is_known_whatever_its_name(tiny_bert, capsys):
    """A metric's name makes folders; intervals of the latest are not of the best."""
    named = "--checkpoint.filename={epoch}-{" + MONITOR + ":.3f}"
    stopped(tiny_bert, "run", 5, named)
    fit(tiny_bert, "run", named, "--ckpt_path=last", "--checkpoint.every_n_train_steps=3")
    fit(tiny_bert, "whole", named)
    assert weights("run") == weights("whole")
    assert curve("run")[0] > curve("run")[1]
    main(
        [
            "validate",
            *("--model.model_name_or_path", str(tiny_bert), "--ckpt_path=best"),
            *("--data.val_path.sts=sts.jsonl", "--trainer.accelerator=cpu"),
        ]
    )
    assert f"{max(curve('run')):.4f}".lstrip("0") in capsys.readouterr().out


def test_who_goes_on_from_it_is_in_the_same_run(tiny_bert):
    named = "--checkpoint.filename={epoch}-{" + MONITOR + ":.3f}"
    stopped(tiny_bert, "run", 5, named)
    fit(tiny_bert, "run", named, "--ckpt_path=best")
    fit(tiny_bert, "whole", named)
    assert weights("run") == weights("whole")
    assert not Path("run/checkpoints-1").exists()


def test_where_it_is_all_that_a_kill_has_left_a_run_goes_on_from_it(tiny_bert):
    named = ("--checkpoint.filename={epoch}-{" + MONITOR + ":.3f}", "--checkpoint.save_last=false")
    stopped(tiny_bert, "run", 5, *named)
    Path("run/checkpoints/last.ckpt").unlink()
    fit(tiny_bert, "run", *named, "--ckpt_path=last")
    fit(tiny_bert, "whole", *named)
    assert weights("run") == weights("whole")
    assert curve("run") == curve("whole")
    assert not Path("run/checkpoints-1").exists()


@pytest.mark.parametrize("at", [2, 6])
def test_what_is_measured_between_accumulated_batches_is_counted_once(tiny_bert, caplog, at):
    """Who goes on trains on them, and validates between them, once more."""
    within = ("--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2")
    patient = (*within, "--early_stopping_patience=5", "--model.lr=1e-12", "--trainer.max_epochs=8")
    stopped(tiny_bert, "run", at, *patient)
    fit(tiny_bert, "run", "--ckpt_path=last", *patient)
    said = "early stopping has ended this fit after step 3 of 8"
    assert caplog.text.count(said) == 1
    caplog.clear()
    fit(tiny_bert, "whole", *patient)
    assert caplog.text.count(said) == 1
    assert weights("run") == weights("whole")


def test_a_run_that_is_stopped_within_its_first_step_has_the_base_s_row(tiny_bert):
    within = ("--trainer.accumulate_grad_batches=4",)
    stopped(tiny_bert, "run", 1, *within)
    fit(tiny_bert, "run", "--ckpt_path=last", *within)
    fit(tiny_bert, "whole", *within)
    assert curve("run") == curve("whole")


def test_an_empty_last_is_told_before_the_base_model_is_measured(tiny_bert, caplog, capsys):
    last = Path("run/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    last.touch()
    with pytest.raises(SystemExit):
        fit(tiny_bert, "run", "--ckpt_path=last")
    assert f"error: {last}: expected a checkpoint of embedtune fit" in capsys.readouterr().err
    assert "measuring the base model" not in caplog.text
